"""A rollout: prompts → rewrites → pictures → rewards, kept so that the step on it can be computed again later."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from PIL import Image

from grpo_kit.config.display import GROUPS, Shown, cell, group_table
from grpo_kit.config.prompts import Prompt
from grpo_kit.config.seeds import derive_seed
from grpo_kit.grpo.advantages import group_advantages, group_spread
from grpo_kit.models.decoding import even_batches, stacked
from grpo_kit.models.generator import Generator, Pair
from grpo_kit.models.policy import Policy, Scores
from grpo_kit.models.prompt_format import EncodedPrompts
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rewards.protocol import ABSTAINED
from grpo_kit.rewards.slow import started

_UNWIND_SECONDS = 2.0  # that a call of the rewards has to end after an error or Ctrl-C; it cannot be stopped

Pictures = list[list[Image.Image | None]]  # N x M; None where a picture came out unusable
# the columns of `Samples`: P long, (N, T), and all of them but for the scores
BY_PROMPT, BY_TOKEN = ("prompts", "prompt_images"), ("completion_ids", "completion_mask", "old_logprobs")
COLUMNS = (*BY_PROMPT, *BY_TOKEN, "enhanced_prompts", "images", "group_ids", "image_seeds", "truncated", "unmatched")


@dataclass(frozen=True, kw_only=True, repr=False)
class Samples(Shown):
    """N = P·G rows, group-major: G rewrites of each of P prompts, what was drawn of them, each reward's scores."""

    prompts: list[Prompt]  # P
    group_ids: torch.Tensor  # (N,) int64: which prompt a row answers
    completion_ids: torch.Tensor  # (N, T) sampled token ids, right-padded
    completion_mask: torch.Tensor  # (N, T) bool, True through the first end-of-sequence token
    enhanced_prompts: list[str]  # N decoded texts: for the generator and for people, never tokenised again
    images: Pictures  # N x M
    image_seeds: torch.Tensor  # (N, M) int64
    reward_parts: dict[str, torch.Tensor]  # name → (N,) raw mean over the M images; NaN: none scored, inf: abstained
    old_logprobs: torch.Tensor | None  # (N, T) of the sampled ids, when they were sampled
    truncated: torch.Tensor | None = None  # (N,) bool: ended by the length limit
    unmatched: torch.Tensor | None = None  # (N,) bool: `prompt_part` found no prompt in it; None where that is "whole"
    attempts: torch.Tensor | None = None  # (P,) how often a group was drawn again; None where that is not asked for
    prompt_images: list[Image.Image] | None = None  # P pictures that the policy saw
    encoded: EncodedPrompts | None = None  # the P prompts as the policy read them; None: to be encoded again
    seconds: dict[str, float] = field(default_factory=dict)  # sampling, images, and what the rewards take beyond them

    def _shown(self) -> dict[str, object]:
        scores = ({"reward": self.rewards} if isinstance(self, Rollout) else {}) | self.reward_parts
        shown = {"prompts": len(self.prompts), "rewrites": len(self.images)}
        return shown | {name: float(values.nanmean()) for name, values in scores.items()}


@dataclass(frozen=True, kw_only=True, repr=False)
class Rollout(Samples):
    """Samples with the rewards that training uses: all that is needed to compute the step on them."""

    rewards: torch.Tensor  # (N,) the weighted total, of shaped parts where the rewards say so, less what is penalised
    totals: torch.Tensor | None = None  # (N,) weighted raw total, where it differs from `rewards`
    ref_logprobs: torch.Tensor | None = None  # (N, T) under the reference

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
        if self.unmatched is not None:
            found["completions/unmatched_ratio"] = float(self.unmatched.float().mean())
        if self.attempts is not None:
            found["resampled_groups"] = float(self.attempts.sum())
        for name, values in self.reward_parts.items():
            found[f"rewards/{name}/mean"], found[f"rewards/{name}/std"] = _mean_and_std(values)
            if abstained := int((values == ABSTAINED).sum()):
                found[f"rewards/{name}/abstained"] = float(abstained)
        return found

    def _repr_html_(self) -> str:
        parts, groups = [], self.group_ids.unique()
        for group in groups[:GROUPS]:
            at = (self.group_ids == group).nonzero().flatten()
            rewards = self.rewards[at].nan_to_num(torch.nan, torch.nan, torch.nan)  # infinite ones are none
            some = [(self.images[row][0], self.enhanced_prompts[row]) for row in at]
            parts.append(group_table(self.prompts[group].user_prompt, some, rewards, group_advantages(rewards, 0 * at)))
        return f"{cell(self)}{''.join(parts)}<div>{len(groups):,} groups, {len(parts)} shown</div>"


def collect_rollout(
    policy: Policy,
    generator: Generator,
    rewards: Rewards,
    prompts: Sequence[Prompt | str],
    num_generations: int = 8,
    seed: int = 0,
    truncation_penalty: float = 0.0,
    **options: int | bool,
) -> Rollout:
    """Sample G rewrites of each prompt, draw M images of each rewrite, score every image against the user's prompt.

    Args:
        num_generations: G, at least 2: a sample is judged against its group.
        seed: fixes tokens and latents; the same call gives the same rollout.
        truncation_penalty: taken from the reward of a completion that the length limit ended.
        options: `images_per_prompt=1`, `share_seeds=True`, `use_image=False`, `overlap=False`; see `collect_samples`.
    """
    samples = collect_samples(policy, generator, rewards, prompts, num_generations, seed, **options)
    return with_rewards(samples, rewards, truncation_penalty)


def with_rewards(samples: Samples, rewards: Rewards, truncation_penalty: float = 0.0) -> Rollout:
    """The rollout of whole groups of samples: their scores as the rewards weigh them, less penalties, and raw."""
    combined = rewards.combined(samples.reward_parts, samples.group_ids)
    differs = rewards.is_shaped or truncation_penalty
    return Rollout(
        **vars(samples),
        rewards=combined - truncation_penalty * samples.truncated if truncation_penalty else combined,
        totals=rewards.total(samples.reward_parts) if differs else None,
    )


def joined(shares: Sequence[Samples], pad_token_id: int) -> Samples:
    """The rows of all shares, one after the other, as long as the longest completion."""

    def column(name: str) -> list | torch.Tensor | None:
        values = [getattr(share, name) for share in shares]
        if name in BY_TOKEN:
            return stacked(values, pad_token_id if name == "completion_ids" else 0)
        if values[0] is None:
            return None
        return torch.cat(values) if torch.is_tensor(values[0]) else list(chain(*values))

    parts = {name: torch.cat([share.reward_parts[name] for share in shares]) for name in shares[0].reward_parts}
    return Samples(**{name: column(name) for name in COLUMNS}, reward_parts=parts)


def collect_samples(
    policy: Policy,
    generator: Generator,
    rewards: Rewards,
    prompts: Sequence[Prompt | str],
    num_generations: int,
    seed: int,
    *,
    images_per_prompt: int = 1,
    share_seeds: bool = True,
    use_image: bool = False,
    overlap: bool = False,
    first_prompt: int = 0,
) -> Samples:
    """Sample, draw and score; how the scores become rewards is decided from whole batches (`with_rewards`).

    A `ValueError` where there are no prompts, or fewer than two generations.

    Args:
        images_per_prompt: M images a rewrite; its reward is their mean.
        share_seeds: a group's rewrites are drawn from the same M latents, so that they differ by their words alone.
        use_image: the policy sees the picture that the user's own prompt gives.
        overlap: score the groups that are drawn while the next are drawn, for rewards that compute or wait elsewhere.
        first_prompt: the first prompt's place in the batch that these are a share of.
    """
    if num_generations < 2:
        raise ValueError(f"num_generations: found {num_generations}, allowed: at least 2 (1 has nothing to compare)")
    if not prompts:
        raise ValueError("prompts: found none, allowed: at least one")
    prompts = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    texts = [prompt.user_prompt for prompt in prompts]
    clock = time.perf_counter()
    seen = picture_prompts(generator, texts, seed, first_prompt) if use_image else None
    encoded = policy.encode(texts, seen)
    completions = policy.sample(encoded, num_generations, seed=derive_seed(seed, "sampling"), first_prompt=first_prompt)
    sampling_seconds = time.perf_counter() - clock
    group_ids = first_prompt + torch.arange(len(prompts)).repeat_interleave(num_generations)
    seeds = latent_seeds(seed, group_ids, num_generations, images_per_prompt, share_seeds)
    asked = [prompt for prompt in prompts for _ in range(num_generations)]
    words, fields = [prompt.user_prompt for prompt in asked], [prompt.metadata for prompt in asked]
    request = DrawRequest(words, completions.texts, group_ids, seeds, fields)
    drawn = draw_and_score(generator, rewards, request, overlap=overlap)
    return Samples(
        prompts=prompts,
        group_ids=group_ids,
        completion_ids=completions.ids.cpu(),
        completion_mask=completions.mask.cpu(),
        enhanced_prompts=completions.texts,
        images=drawn.images,
        image_seeds=seeds,
        reward_parts=drawn.parts,
        old_logprobs=completions.logprobs.cpu(),
        truncated=completions.truncated.cpu(),
        unmatched=completions.unmatched,
        prompt_images=seen,
        encoded=encoded,
        seconds={"sampling": sampling_seconds, **drawn.seconds},
    )


def with_encoded(rollout: Rollout, policy: Policy) -> Rollout:
    """The rollout with its prompts as the policy reads them, encoded where it has none: one from a file."""
    texts, seen = [prompt.user_prompt for prompt in rollout.prompts], rollout.prompt_images
    if rollout.encoded is not None and (rollout.encoded.prompts, rollout.encoded.images) == (texts, seen):
        return rollout
    return replace(rollout, encoded=policy.encode(texts, seen))


def score_rows(
    policy: Callable[..., Scores], rollout: Rollout, rows: torch.Tensor, *, reference: bool = False
) -> Scores:
    """Log-probabilities and entropy, (rows, T) each, of some rows; only the prompts that these need are run.

    Args:
        policy: a `Policy`, or the module that several processes made of it.
        rollout: one with its encoded prompts.
    """
    rows = rows.cpu()
    groups, local = rollout.group_ids[rows].unique(return_inverse=True)
    prompts = rollout.encoded.take(groups.tolist())
    return policy(prompts, local, rollout.completion_ids[rows], rollout.completion_mask[rows], reference=reference)


def latent_seeds(
    seed: int, group_ids: torch.Tensor, num_generations: int, images_per_prompt: int, share_seeds: bool
) -> torch.Tensor:
    """(N, M) seeds from (seed, prompt, image), and from the sample too where a group does not share them."""
    rows = [(group, "shared" if share_seeds else row % num_generations) for row, group in enumerate(group_ids.tolist())]
    images = range(images_per_prompt)
    return torch.tensor([[derive_seed(seed, "latents", *row, image) for image in images] for row in rows])


def picture_prompts(generator: Generator, prompts: Sequence[str], seed: int, first: int = 0) -> list[Image.Image]:
    """What the users' own prompts give, for a policy that looks at it; `first` is the first one's place."""
    seeds = [derive_seed(seed, "seen", place) for place in range(first, first + len(prompts))]
    return list(map(generator.generate_image, prompts, seeds))


def _mean_and_std(values: torch.Tensor) -> tuple[float, float]:
    """Mean and unbiased standard deviation of the finite values; NaN where there are too few."""
    kept = values[values.isfinite()]
    return float(kept.mean()), float(kept.std()) if len(kept) > 1 else float("nan")


# --- pictures and their scores ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrawRequest:
    """What to draw: N rewrites, group-major, each from M latent seeds."""

    prompts: list[str]  # N users' prompts, which the pictures are scored against
    rewrites: list[str]  # N
    group_ids: torch.Tensor  # (N,), ascending
    seeds: torch.Tensor  # (N, M)
    metadata: list[dict] = field(default_factory=list)  # N, the prompts' further fields; empty: none has any

    def __getitem__(self, rows: slice) -> "DrawRequest":
        """Some consecutive rows of it."""
        return DrawRequest(*(values[rows] for values in vars(self).values()))

    def pairs(self) -> list[list[Pair]]:
        """N x M pairs of a text and a seed; equal ones are one picture."""
        rows = zip(self.rewrites, self.seeds.tolist(), strict=True)
        return [[(text, seed) for seed in seeds] for text, seeds in rows]


@dataclass(frozen=True)
class DrawResult:
    """The pictures, each reward's (N,) mean over a rewrite's pictures, and the seconds of both."""

    images: Pictures
    parts: dict[str, torch.Tensor]
    seconds: dict[str, float]  # images; rewards: what they take beyond the drawing


def draw_and_score(
    generator: Generator, rewards: Rewards, request: DrawRequest, *, overlap: bool = False
) -> DrawResult:
    """Draw what is asked for, equal pairs once, and score it; it raises what the generator or the rewards raise.

    Args:
        overlap: score the groups that are drawn to their end in a thread, while the next batch is drawn. The pictures
            are the same to the last bit. A reward sees whole groups, but no longer all of them in one call.
    """
    if overlap:
        return _draw_while_scoring(generator, rewards, request)
    clock = time.perf_counter()
    pairs = request.pairs()
    flat = iter(generator.generate_images(*zip(*(pair for row in pairs for pair in row), strict=True)))
    images = [[next(flat) for _ in row] for row in pairs]
    drawn = time.perf_counter()
    parts = _score(rewards, request, images)
    return DrawResult(images, parts, {"images": drawn - clock, "rewards": time.perf_counter() - drawn})


def _draw_while_scoring(generator: Generator, rewards: Rewards, request: DrawRequest) -> DrawResult:
    """Score one part at a time in a thread; the seconds for which the drawing waits for it count as the rewards'."""
    clock, waited = time.perf_counter(), 0.0
    images: Pictures = []
    scoring: list[Future] = []
    try:
        for part, pictures in _whole_groups(generator, request):
            waited += _waited(scoring[-1:])
            scoring.append(started(_score, rewards, part, pictures))
            images += pictures
        waited += _waited(scoring[-1:])
    except BaseException:
        wait(scoring, _UNWIND_SECONDS)  # models of an object must not compute for two at once
        raise
    scores = [part.result() for part in scoring]
    parts = {name: torch.cat([found[name] for found in scores]) for name in scores[0]}
    return DrawResult(images, parts, {"images": time.perf_counter() - clock - waited, "rewards": waited})


def _waited(scoring: Sequence[Future]) -> float:
    """Seconds until that is done; raises what the rewards raised."""
    began = time.perf_counter()
    for part in scoring:
        part.result()
    return time.perf_counter() - began


def _whole_groups(generator: Generator, request: DrawRequest) -> Iterator[tuple[DrawRequest, Pictures]]:
    """Rows with their pictures, in order, as soon as all of their groups are drawn.

    The batches are those that the generator makes of the whole, and equal pairs are drawn once in the whole.
    """
    pairs = request.pairs()
    drawn: dict[Pair, Image.Image | None] = {}
    begin = 0
    at_once = getattr(generator, "images_at_once", generator.batch_size)  # the second in a class of a user's own
    for batch in even_batches(list(dict.fromkeys(pair for row in pairs for pair in row)), at_once):
        drawn.update(zip(batch, generator.generate_images(*zip(*batch, strict=True)), strict=True))
        missing = next((row for row in range(begin, len(pairs)) if not drawn.keys() >= set(pairs[row])), None)
        groups = request.group_ids
        end = len(pairs) if missing is None else int(torch.searchsorted(groups, groups[missing]))
        if end > begin:
            yield request[begin:end], [[drawn[pair] for pair in row] for row in pairs[begin:end]]
            begin = end


def _score(rewards: Rewards, request: DrawRequest, images: Pictures) -> dict[str, torch.Tensor]:
    """Each part's mean over a rewrite's images that could be scored: {name: (N,)}."""
    count = request.seeds.shape[1]
    flat = [image for row in images for image in row]
    columns = (request.prompts, request.rewrites, request.metadata)
    prompts, rewrites, metadata = ([value for value in column for _ in range(count)] for column in columns)
    context = {"group_ids": request.group_ids.repeat_interleave(count), "image_seeds": request.seeds.flatten()}
    scores = rewards.score(flat, prompts, rewrites, metadata=metadata, **context)
    means = {}
    for name, values in scores.items():
        abstained = (values == ABSTAINED).reshape(-1, count).any(dim=1)
        means[name] = values.masked_fill(values == ABSTAINED, torch.nan).reshape(-1, count).nanmean(dim=1)
        means[name] = means[name].masked_fill(abstained & means[name].isnan(), ABSTAINED)
    return means
