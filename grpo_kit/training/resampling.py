"""An iteration's rollout; groups without spread in their rewards are drawn again, up to a limit.

A group whose rewards are all alike has no advantage: its pictures teach nothing. Other prompts take its place, as in
DAPO's dynamic sampling (arXiv 2503.14476), where there are others; else it is the same prompt from other seeds.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from grpo_kit.config.prompts import Prompt, balanced_batch
from grpo_kit.config.seeds import derive_seed
from grpo_kit.experiment import Experiment
from grpo_kit.rollout import Rollout, Samples, joined, with_rewards
from grpo_kit.training.processes import Processes, collect_shared_rollout
from grpo_kit.training.step import rollout_advantages


def collect(kit: Experiment, iteration: int, processes: Processes) -> Rollout:
    """The rollout of an iteration, fixed by (seed, iteration): its prompts, and those of each further attempt."""
    settings = kit.config.training_settings
    prompts = balanced_batch(kit.train_prompts, settings.prompts_per_iteration, settings.seed, iteration)
    statistics = kit.rewards.state_dict()
    rollout = _collected(kit, prompts, iteration, 0, processes)
    if not settings.max_resampling:
        return rollout
    rollout = replace(rollout, attempts=torch.zeros(len(prompts), dtype=torch.int64))
    for attempt in range(1, settings.max_resampling + 1):
        advantages, _ = rollout_advantages(rollout, settings)
        places = [group for group in range(len(prompts)) if not advantages[rollout.group_ids == group].any()]
        if not places:
            break
        others = _other_prompts(kit.train_prompts, rollout.prompts, len(places), settings.seed, iteration, attempt)
        again = _collected(kit, others, iteration, attempt, processes)
        kit.rewards.load_state_dict(statistics)  # they take in the rollout that is trained on, once
        samples = with_groups(rollout, again, places, kit.policy.tokenizer.pad_token_id)
        rollout = with_rewards(samples, kit.rewards, settings.truncation_penalty)
    return rollout


def with_groups(samples: Samples, again: Samples, places: Sequence[int], pad_token_id: int) -> Samples:
    """Samples in which the groups at some places are others, as if these had been sampled there.

    Args:
        again: their groups 0, 1, … take these places.
    """
    group_ids = torch.tensor(places)[again.group_ids]
    both, old = joined([samples, replace(again, group_ids=group_ids)], pad_token_id), samples.group_ids
    rows = torch.cat([(~torch.isin(old, group_ids)).nonzero().flatten(), len(old) + torch.arange(len(group_ids))])
    rows = rows[both.group_ids[rows].argsort(stable=True)]
    longest = int(both.completion_mask[rows].sum(dim=1).max())
    groups = torch.arange(len(samples.prompts))
    groups[list(places)] = len(groups) + torch.arange(len(places))

    def taken(name: str, value: object) -> object:
        if value is None or isinstance(value, dict):
            return value and {key: column[rows] for key, column in value.items()}
        if torch.is_tensor(value):
            return (
                value[rows][:, :longest]
                if name in ("completion_ids", "completion_mask", "old_logprobs")
                else value[rows]
            )
        return [value[place] for place in (groups if name in ("prompts", "prompt_images") else rows)]

    seconds = {name: samples.seconds.get(name, 0.0) + spent for name, spent in again.seconds.items()}
    attempts = samples.attempts.index_add(0, torch.tensor(places), torch.ones(len(places), dtype=torch.int64))
    columns = {name: taken(name, value) for name, value in vars(both).items()}
    return Samples(**columns | {"seconds": samples.seconds | seconds, "attempts": attempts})


def rollout_seed(seed: int, iteration: int, attempt: int = 0) -> int:
    """The seed of an iteration's rollout, or of an attempt to draw some of its groups again."""
    return derive_seed(seed, "rollout", iteration, *([attempt] if attempt else []))


def _other_prompts(
    prompts: Sequence[Prompt], batch: Sequence[Prompt], count: int, seed: int, iteration: int, attempt: int
) -> list[Prompt]:
    """So many prompts that are not in the batch, as long as there are any."""
    drawn = balanced_batch(prompts, len(batch) + count, derive_seed(seed, "attempt", attempt), iteration)
    return ([prompt for prompt in drawn if prompt not in batch] + drawn)[:count]


def _collected(
    kit: Experiment, prompts: Sequence[Prompt], iteration: int, attempt: int, processes: Processes
) -> Rollout:
    settings, generation = kit.config.training_settings, kit.config.generation_settings
    return collect_shared_rollout(
        processes,
        kit.policy,
        kit.generator,
        kit.rewards,
        prompts,
        settings.group_size,
        seed=rollout_seed(settings.seed, iteration, attempt),
        truncation_penalty=settings.truncation_penalty,
        images_per_prompt=generation.images_per_prompt,
        share_seeds=generation.share_seeds,
        use_image=kit.config.model_settings.use_image,
        overlap=kit.overlap,
    )
