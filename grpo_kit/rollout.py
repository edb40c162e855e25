"""A rollout: prompts → rewrites → images → rewards, kept so that the step on it can be computed again later."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import torch
from PIL import Image

from grpo_kit.config.prompts import Prompt
from grpo_kit.config.seeds import derive_seed
from grpo_kit.drawing import Wanted, draw_and_score
from grpo_kit.grpo.advantages import group_spread
from grpo_kit.models.generator import Generator
from grpo_kit.models.policy import Completions, Policy, Scores
from grpo_kit.rewards.composition import Rewards
from grpo_kit.training.processes import ALONE, Processes

_BY_ROW = ("group_ids", "image_seeds", "rewards", "truncated")  # columns of which a share has its own rows


@dataclass(frozen=True)
class Rollout:
    """N = P·G rows, group-major: what G rewrites of each of P prompts led to."""

    prompts: list[Prompt]  # P
    group_ids: torch.Tensor  # (N,) int64: which prompt a row answers
    completion_ids: torch.Tensor  # (N, T) sampled token ids, right-padded
    completion_mask: torch.Tensor  # (N, T) bool, True through the first end-of-sequence token
    enhanced_prompts: list[str]  # N decoded texts: for the generator and for people, never tokenised again
    images: list[list[Image.Image | None]]  # N x M; None where the picture came out unusable
    image_seeds: torch.Tensor  # (N, M) int64
    reward_parts: dict[str, torch.Tensor]  # name → (N,) raw mean over the M images, NaN where none could be scored
    rewards: torch.Tensor  # (N,) what training uses: the weighted total, of shaped parts where the rewards say so
    old_logprobs: torch.Tensor | None  # (N, T) of the sampled ids, when they were sampled
    ref_logprobs: torch.Tensor | None = None  # (N, T) under the reference
    truncated: torch.Tensor | None = None  # (N,) bool: ended by the length limit
    prompt_images: list[Image.Image] | None = None  # P pictures that the policy saw
    seconds: dict[str, float] = field(default_factory=dict)  # sampling, images, and what the rewards take beyond them
    totals: torch.Tensor | None = None  # (N,) weighted raw total, where it differs from `rewards`

    def score(self, policy: Policy, rows: torch.Tensor | None = None, *, reference: bool = False) -> Scores:
        """Score some of its rows (all where None) under a policy or its reference, running only the prompts they need.

        Returns:
            Log-probabilities and entropy, (rows, T) each.
        """
        rows = torch.arange(len(self.group_ids)) if rows is None else rows.cpu()
        groups, local = self.group_ids[rows].unique(return_inverse=True)
        prompts = [self.prompts[group].user_prompt for group in groups.tolist()]
        seen = None if self.prompt_images is None else [self.prompt_images[group] for group in groups.tolist()]
        ids, mask = self.completion_ids[rows], self.completion_mask[rows]
        return policy.score(prompts, local, ids, mask, images=seen, reference=reference)

    def metrics(self) -> dict[str, float]:
        """Rewards and lengths under TRL's names; samples that could not be scored are left out of the means."""
        spread = group_spread(self.rewards.where(self.rewards.isfinite(), torch.nan), self.group_ids)
        raw = self.rewards if self.totals is None else self.totals
        deviations = [_mean_and_std(raw[self.group_ids == group])[1] for group in self.group_ids.unique()]
        found = {
            "reward": _mean_and_std(raw)[0],
            "reward_std": float(torch.tensor(deviations).nanmean().nan_to_num(0.0)),  # within groups
            "frac_reward_zero_std": float((spread == 0).float().mean()),
            "completions/mean_length": float(self.completion_mask.sum(dim=1).float().mean()),
            "completions/clipped_ratio": float(self.truncated.float().mean()),
        }
        for name, values in self.reward_parts.items():
            found[f"rewards/{name}/mean"], found[f"rewards/{name}/std"] = _mean_and_std(values)
        return found


def collect_rollout(
    policy: Policy,
    generator: Generator,
    rewards: Rewards,
    prompts: Sequence[Prompt | str],
    num_generations: int = 8,
    seed: int = 0,
    *,
    images_per_prompt: int = 1,
    share_seeds: bool = True,
    use_image: bool = False,
    overlap: bool = False,
    processes: Processes = ALONE,
) -> Rollout:
    """Sample G rewrites of each prompt, draw M images of each rewrite, score every image against the user's prompt.

    Several processes share the prompts by whole groups; each then has the whole rollout, but for the pictures, which
    only the main process has all of.

    Args:
        num_generations: G, at least 2: a sample is judged against its group.
        seed: fixes tokens and latents; the same call gives the same rollout.
        images_per_prompt: M images a rewrite; its reward is their mean.
        share_seeds: a group's rewrites are drawn from the same M latents, so that they differ by their words alone.
        use_image: the policy sees the picture that the user's own prompt gives.
        overlap: score the groups that are drawn while the next are drawn, for rewards that compute or wait elsewhere.
        processes: those that share the work.

    Raises:
        ProcessError: there are more processes than prompts, or one of them failed.
        ValueError: fewer than two generations, or no prompts.
    """
    if num_generations < 2:
        raise ValueError(
            f"num_generations: found {num_generations}, allowed: at least 2 (a group of 1 has nothing to compare)"
        )
    if not prompts:
        raise ValueError("prompts: found none, allowed: at least one")
    prompts = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    shard = processes.shards(len(prompts))[processes.rank]

    share = partial(
        _collect_share,
        policy,
        generator,
        rewards,
        prompts[shard.start : shard.stop],
        num_generations,
        seed,
        shard.start,
        images_per_prompt=images_per_prompt,
        share_seeds=share_seeds,
        use_image=use_image,
        overlap=overlap,
    )
    rollout = _gathered(share, policy.tokenizer.pad_token_id, processes)
    return replace(
        rollout,
        rewards=rewards.combined(rollout.reward_parts, rollout.group_ids),
        totals=rewards.total(rollout.reward_parts) if rewards.is_shaped else None,
    )


def _collect_share(
    policy: Policy,
    generator: Generator,
    rewards: Rewards,
    prompts: list[Prompt],
    num_generations: int,
    seed: int,
    first: int,
    *,
    images_per_prompt: int,
    share_seeds: bool,
    use_image: bool,
    overlap: bool,
) -> Rollout:
    """The rows of some prompts, of which the `first` one's place in the batch is given; with the raw rewards."""
    texts = [prompt.user_prompt for prompt in prompts]
    seconds, clock = {}, time.perf_counter()
    seen = picture_prompts(generator, texts, seed, first) if use_image else None
    seed_of_tokens = derive_seed(seed, "sampling")
    completions = policy.sample(texts, num_generations, seed=seed_of_tokens, images=seen, first_prompt=first)
    seconds["sampling"] = time.perf_counter() - clock
    group_ids = first + torch.arange(len(prompts)).repeat_interleave(num_generations)
    seeds = latent_seeds(seed, group_ids, num_generations, images_per_prompt, share_seeds)
    wanted = Wanted([texts[group - first] for group in group_ids], completions.texts, group_ids, seeds)
    drawn = draw_and_score(generator, rewards, wanted, overlap=overlap)
    return Rollout(
        prompts=prompts,
        group_ids=group_ids,
        completion_ids=completions.ids.cpu(),
        completion_mask=completions.mask.cpu(),
        enhanced_prompts=completions.texts,
        images=drawn.images,
        image_seeds=seeds,
        reward_parts=drawn.parts,
        rewards=rewards.total(drawn.parts),
        old_logprobs=completions.logprobs.cpu(),
        truncated=_truncated(completions, policy),
        prompt_images=seen,
        seconds=seconds | drawn.seconds,
    )


def _gathered(share: Callable[[], Rollout], pad_token_id: int, processes: Processes) -> Rollout:
    """The rollout whose shares the processes collect; in one process its only share."""
    if processes.count == 1:
        return share()
    own: list[Rollout] = []

    def without_pictures() -> Rollout:
        own.append(share())
        return replace(own[0], images=[])

    shares = processes.gather(without_pictures)
    pictures = processes.gather_on_main(own[0].images)
    nothing = [None] * own[0].image_seeds.shape[1]
    images = [found or [nothing] * len(one.group_ids) for found, one in zip(pictures, shares, strict=True)]
    return replace(_joined(shares, pad_token_id), images=list(chain(*images)), seconds=own[0].seconds)


def _joined(shares: Sequence[Rollout], pad_token_id: int) -> Rollout:
    """The rows of all shares, one after the other, as long as the longest completion; the first one's pictures."""
    longest = max(share.completion_ids.shape[1] for share in shares)

    def rows(name: str, fill: float = 0) -> torch.Tensor:
        return torch.cat([_widened(getattr(share, name), longest, fill) for share in shares])

    seen = [share.prompt_images for share in shares]
    return replace(
        shares[0],
        prompts=[prompt for share in shares for prompt in share.prompts],
        enhanced_prompts=[text for share in shares for text in share.enhanced_prompts],
        completion_ids=rows("completion_ids", pad_token_id),
        reward_parts={n: torch.cat([share.reward_parts[n] for share in shares]) for n in shares[0].reward_parts},
        prompt_images=None if None in seen else list(chain(*seen)),
        completion_mask=rows("completion_mask"),
        old_logprobs=rows("old_logprobs"),
        **{name: torch.cat([getattr(share, name) for share in shares]) for name in _BY_ROW},
    )


def _widened(column: torch.Tensor, length: int, fill: float) -> torch.Tensor:
    return torch.nn.functional.pad(column, (0, length - column.shape[1]), value=fill)


def _mean_and_std(values: torch.Tensor) -> tuple[float, float]:
    """Mean and unbiased standard deviation of the finite values; NaN where there are too few."""
    kept = values[values.isfinite()]
    return float(kept.mean()), float(kept.std()) if len(kept) > 1 else float("nan")


def latent_seeds(
    seed: int, group_ids: torch.Tensor, num_generations: int, images_per_prompt: int, share_seeds: bool
) -> torch.Tensor:
    """(N, M) seeds from (seed, prompt, image), and from the sample too where a group does not share them."""

    def one(row: int, image: int) -> int:
        sample = "shared" if share_seeds else row % num_generations
        return derive_seed(seed, "latents", int(group_ids[row]), sample, image)

    return torch.tensor([[one(row, image) for image in range(images_per_prompt)] for row in range(len(group_ids))])


def picture_prompts(
    generator: Generator, prompts: Sequence[str], seed: int, first_prompt: int = 0
) -> list[Image.Image]:
    """What the users' own prompts give, for a policy that looks at it; `first_prompt` is the first one's place."""
    places = range(first_prompt, first_prompt + len(prompts))
    return [
        generator.generate_image(prompt, derive_seed(seed, "seen", i))
        for i, prompt in zip(places, prompts, strict=True)
    ]


def _truncated(completions: Completions, policy: Policy) -> torch.Tensor:
    ends = torch.tensor(policy.eos_token_ids, device=completions.ids.device)
    return ~(torch.isin(completions.ids, ends) & completions.mask).any(dim=1).cpu()
