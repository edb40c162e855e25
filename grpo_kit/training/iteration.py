"""One iteration: its prompts, its rollout and the step on it; groups without spread are drawn again, up to a limit.

A group whose rewards are all alike has no advantage: its pictures teach nothing. Other prompts take its place, as in
DAPO's dynamic sampling (arXiv 2503.14476), where there are others; else it is the same prompt from other seeds.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch

from grpo_kit.config.prompts import Prompt, balanced_batch
from grpo_kit.config.schedule import scheduled_rates
from grpo_kit.config.seeds import derive_seed
from grpo_kit.experiment import Experiment
from grpo_kit.rollout import (
    BY_CONTEXT,
    BY_PROMPT,
    BY_TOKEN,
    COLUMNS,
    Rollout,
    Samples,
    collect_samples,
    joined,
    with_rewards,
)
from grpo_kit.training.accumulation import set_rate
from grpo_kit.training.processes import ALONE, Processes
from grpo_kit.training.step import StepStats, grpo_step, rollout_advantages


def run_iteration(
    kit: Experiment, optimizer: torch.optim.Optimizer, iteration: int, processes: Processes = ALONE
) -> tuple[Rollout, StepStats]:
    """One iteration without any files: its prompts, its rollout and the step on it, all fixed by (seed, iteration)."""
    with processes.whole_policy(), kit.generator.steps(kit.config.generation_settings.rollout_steps):
        rollout = collect(kit, iteration, processes)
    rates = scheduled_rates(kit.config.training_settings, iteration)
    stats = grpo_step(kit.policy, optimizer, rollout, kit.config, processes, rates)
    set_rate(optimizer, rates[-1])  # also where nothing was to be learned
    return rollout, stats


def collect(kit: Experiment, iteration: int, processes: Processes) -> Rollout:
    """The rollout of an iteration, fixed by (seed, iteration): its prompts, and those of each further attempt."""
    settings = kit.config.training_settings
    prompts = balanced_batch(kit.train_prompts, settings.prompts_per_iteration, settings.seed, iteration)
    statistics = kit.rewards.state_dict()
    rollout = collect_groups(kit, prompts, rollout_seed(settings.seed, iteration), processes)
    if not settings.max_resampling:
        return rollout
    rollout = replace(rollout, attempts=torch.zeros(len(prompts), dtype=torch.int64))
    for attempt in range(1, settings.max_resampling + 1):
        advantages, _ = rollout_advantages(rollout, settings)
        places = [group for group in range(len(prompts)) if not advantages[rollout.group_ids == group].any()]
        if not places:
            break
        others = _others(kit, iteration, attempt, rollout.prompts, len(places))
        again = collect_groups(kit, others, rollout_seed(settings.seed, iteration, attempt), processes)
        kit.rewards.load_state_dict(statistics)  # they take in the rollout that is trained on, once
        samples = _with_groups(rollout, again, places, kit.policy.tokenizer.pad_token_id)
        rollout = rewarded(kit, samples)
    return rollout


def _others(kit: Experiment, iteration: int, attempt: int, prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """So many prompts for a further attempt: others than there are, as long as there are others."""
    seed = derive_seed(kit.config.training_settings.seed, "attempt", attempt)
    drawn = balanced_batch(kit.train_prompts, len(prompts) + count, seed, iteration)
    return ([prompt for prompt in drawn if prompt not in prompts] + drawn)[:count]


def prompts_of(kit: Experiment, iteration: int, attempts: Sequence[int]) -> list[Prompt]:
    """The prompts of an iteration whose groups were drawn again so often."""
    settings = kit.config.training_settings
    prompts = balanced_batch(kit.train_prompts, len(attempts), settings.seed, iteration)
    for attempt in range(1, max(attempts) + 1):
        places = [place for place, number in enumerate(attempts) if number >= attempt]
        others = _others(kit, iteration, attempt, prompts, len(places))
        for place, prompt in zip(places, others, strict=True):
            prompts[place] = prompt
    return prompts


def rollout_seed(seed: int, iteration: int, attempt: int = 0) -> int:
    """The seed of an iteration's rollout, or of an attempt to draw some of its groups again."""
    return derive_seed(seed, "rollout", iteration, *([attempt] if attempt else []))


def collect_groups(kit: Experiment, prompts: Sequence[Prompt], seed: int, processes: Processes) -> Rollout:
    """`collect_rollout` as the settings say, by all processes: each collects some groups and then has all of them.

    Only the main process has all pictures. A `ProcessError` where one of them failed.
    """
    settings, generation = kit.config.training_settings, kit.config.generation_settings
    shard = processes.shards(len(prompts))[processes.rank]
    own: list[Samples] = []

    def collect_share() -> Samples | None:
        if not shard:
            return None
        share = collect_samples(
            kit.policy,
            kit.generator,
            kit.rewards,
            prompts[shard.start : shard.stop],
            settings.group_size,
            seed,
            images_per_prompt=generation.images_per_prompt,
            share_seeds=generation.share_seeds,
            use_image=kit.config.model_settings.use_image,
            overlap=kit.overlap,
            first_prompt=shard.start,
            turns=generation.turns,
            branches=generation.branches,
            look_at=kit.config.model_settings.look_at,
        )
        own.append(share)
        return replace(share, images=[], encoded=None)  # what travels

    gathered = processes.gather(collect_share)
    if processes.count == 1:
        return rewarded(kit, own[0])
    shares = [share for share in gathered if share is not None]
    pictures = processes.gather_on_main(own[0].images if own else [])
    nothing = [None] * generation.images_per_prompt
    images = [
        found or [nothing] * len(share.group_ids)
        for found, share in zip(pictures, gathered, strict=True)
        if share is not None
    ]
    both = joined(shares, kit.policy.tokenizer.pad_token_id)
    both = replace(both, images=list(chain(*images)), seconds=own[0].seconds if own else {})
    return rewarded(kit, both)


def rewarded(kit: Experiment, samples: Samples) -> Rollout:
    """`with_rewards` as the settings say."""
    settings, credit = kit.config.training_settings, kit.config.generation_settings.credit
    return with_rewards(samples, kit.rewards, settings.truncation_penalty, credit, settings.redraw_cost)


def _with_groups(samples: Samples, again: Samples, places: Sequence[int], pad_token_id: int) -> Samples:
    """Samples in which the groups at some places are others: those of `again`, in their order."""
    both, count = joined([samples, again], pad_token_id), len(samples.prompts)
    order = [count + places.index(group) if group in places else group for group in range(count)]
    groups = torch.cat([samples.group_ids, count + again.group_ids])
    rows = torch.cat([(groups == group).nonzero().flatten() for group in order]).tolist()
    longest = int(both.completion_mask[rows].sum(dim=1).max())

    def taken(name: str) -> list | torch.Tensor | None:
        value = getattr(both, name)
        if torch.is_tensor(value):
            return value[rows, :longest] if name in BY_TOKEN else value[rows]
        return value and [value[place] for place in (order if name in (*BY_PROMPT, *BY_CONTEXT) else rows)]

    seconds = {name: samples.seconds.get(name, 0.0) + spent for name, spent in again.seconds.items()}
    attempts = samples.attempts.clone()
    attempts[list(places)] += 1
    return Samples(
        **{name: taken(name) for name in COLUMNS} | {"group_ids": samples.group_ids},
        reward_parts={name: values[rows] for name, values in both.reward_parts.items()},
        seconds=samples.seconds | seconds,
        attempts=attempts,
    )
