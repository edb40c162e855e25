"""A rollout: prompts → rewrites → pictures → rewards, kept so that the step on it can be computed again later.

With several turns the policy sees the picture that it caused and writes again. Each turn of a prompt is then a group
of its own, so that advantages, loss and step are what they are with one.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, chain

import torch
from PIL import Image

from grpo_kit.config.display import GROUPS, Shown, cell, group_table
from grpo_kit.config.media import thumbnail
from grpo_kit.config.prompts import Prompt
from grpo_kit.config.quiet import quiet_libraries
from grpo_kit.config.seeds import derive_seed
from grpo_kit.grpo.advantages import group_advantages, group_spread
from grpo_kit.grpo.credit import Credit, turn_credits
from grpo_kit.models.conversation import Conversation, LookAt, require_words
from grpo_kit.models.decoding import stacked
from grpo_kit.models.drawing import DrawRequest, DrawResult, Pictures, draw_and_score
from grpo_kit.models.generator import Generator
from grpo_kit.models.policy import Completions, Policy, Scores
from grpo_kit.models.prompt_format import EncodedPrompts
from grpo_kit.models.prompt_format import joined as joined_prompts
from grpo_kit.models.turns import by_prompt, origins, rows_to_draw, turn_columns, what_is_read, with_turn
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rewards.protocol import ABSTAINED

# the columns of `Samples`: a group long, a context long, (N, T), and all of them but for the scores
BY_PROMPT, BY_CONTEXT = ("prompts",), ("contexts",)
BY_TOKEN = ("completion_ids", "completion_mask", "old_logprobs")
BY_ROW = ("enhanced_prompts", "images", "group_ids", "context_ids", "image_seeds", "truncated", "unmatched", "kept")
COLUMNS = (*BY_PROMPT, *BY_CONTEXT, *BY_TOKEN, *BY_ROW)


@dataclass(frozen=True, kw_only=True, repr=False)
class Samples(Shown):
    """N = P·G rows, group-major: G rewrites of each of P prompts, what was drawn of them, each reward's scores.

    With several turns a prompt has as many groups, one after the other: P counts (prompt, turn).
    """

    prompts: list[Prompt]  # P
    group_ids: torch.Tensor  # (N,) int64: which prompt a row answers, in which turn
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
    turns: int = 1  # how often the policy wrote
    branched: bool = False  # all of a group's later turns go on from one of its first pictures
    kept: torch.Tensor | None = None  # (N,) bool: left the picture of the turn before; None with one turn
    contexts: list[Conversation] | None = None  # C: what the policy read; None: the prompts' words alone
    context_ids: torch.Tensor | None = None  # (N,) int64: which of them a row answers; None: each group has one
    encoded: EncodedPrompts | None = None  # the C contexts as the policy read them; None: to be encoded again
    seconds: dict[str, float] = field(default_factory=dict)  # sampling, images, and what the rewards take beyond them

    @property
    def turn_ids(self) -> torch.Tensor:
        """(N,) the turn of each row, from 0."""
        return self.group_ids % self.turns

    def asked(self) -> list[Conversation]:
        """What the policy read: its contexts, or the prompts' words where it has none."""
        return self.contexts or [Conversation(prompt.user_prompt) for prompt in self.prompts]

    def _shown(self) -> dict[str, object]:
        scores = ({"reward": self.rewards} if isinstance(self, Rollout) else {}) | self.reward_parts
        told = {"prompts": len(self.prompts) // self.turns, "rewrites": len(self.images)}
        told |= {"turns": self.turns} if self.turns > 1 else {}
        return told | {name: float(values.nanmean()) for name, values in scores.items()}


@dataclass(frozen=True, kw_only=True, repr=False)
class Rollout(Samples):
    """Samples with the rewards that training uses: all that is needed to compute the step on them."""

    rewards: torch.Tensor  # (N,) the weighted total, of shaped parts where the rewards say so, less what is penalised
    totals: torch.Tensor | None = None  # (N,) weighted raw total, where it differs from `rewards`
    ref_logprobs: torch.Tensor | None = None  # (N, T) under the reference

    def metrics(self) -> dict[str, float]:
        """Rewards and lengths under TRL's names; samples that could not be scored are left out of the means.

        With several turns the rewards are those of the last pictures; `turn_1/reward` and so on are those of each turn.
        """
        spread = group_spread(self.rewards.where(self.rewards.isfinite(), torch.nan), self.group_ids)
        raw, last = self.rewards if self.totals is None else self.totals, self.turn_ids == self.turns - 1
        groups = self.group_ids[last].unique()
        deviations = [_mean_and_std(raw[self.group_ids == group])[1] for group in groups]
        found = {
            "reward": _mean_and_std(raw[last])[0],
            "reward_std": float(torch.tensor(deviations).nanmean().nan_to_num(0.0)),  # within groups
            "frac_reward_zero_std": float((spread == 0).float().mean()),
            "completions/mean_length": float(self.completion_mask.sum(dim=1).float().mean()),
            "completions/clipped_ratio": float(self.truncated.float().mean()),
        }
        if self.unmatched is not None:
            found["completions/unmatched_ratio"] = float(self.unmatched.float().mean())
        if self.attempts is not None:
            found["resampled_groups"] = float(self.attempts.sum())
        for turn in range(self.turns if self.turns > 1 else 0):
            rows = self.turn_ids == turn
            found[f"turn_{turn + 1}/reward"] = _mean_and_std(raw[rows])[0]
            if turn:
                found[f"turn_{turn + 1}/kept"] = float(self.kept[rows].float().mean())
        for name, column in self.reward_parts.items():
            values = column[last]
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
            title = self.prompts[group].user_prompt
            title += f", turn {int(group) % self.turns + 1}" if self.turns > 1 else ""
            parts.append(group_table(title, some, rewards, group_advantages(rewards, 0 * at)))
        return f"{cell(self)}{''.join(parts)}<div>{len(groups):,} groups, {len(parts)} shown</div>"


def collect_rollout(
    policy: Policy,
    generator: Generator,
    rewards: Rewards,
    prompts: Sequence[Prompt | str],
    num_generations: int = 8,
    seed: int = 0,
    truncation_penalty: float = 0.0,
    credit: Credit = "final",
    redraw_cost: float = 0.0,
    **options: int | bool | str,
) -> Rollout:
    """Sample G rewrites of each prompt, draw M images of each rewrite, score every image against the user's prompt.

    Args:
        num_generations: G, at least 2: a sample is judged against its group.
        seed: fixes tokens and latents; the same call gives the same rollout.
        truncation_penalty: taken from the reward of a completion that the length limit ended.
        credit: how the rewards of several turns are shared among them; see `grpo.credit`.
        redraw_cost: taken from the reward for each answer after the first that is not "keep it".
        options: `images_per_prompt=1`, `share_seeds=True`, `use_image=False`, `overlap=False`, `turns=1`,
            `look_at="own"`, `branches=False`; see `collect_samples`.
    """
    samples = collect_samples(policy, generator, rewards, prompts, num_generations, seed, **options)
    return with_rewards(samples, rewards, truncation_penalty, credit, redraw_cost)


def with_rewards(
    samples: Samples,
    rewards: Rewards,
    truncation_penalty: float = 0.0,
    credit: Credit = "final",
    redraw_cost: float = 0.0,
) -> Rollout:
    """The rollout of whole groups of samples: their scores as the rewards weigh them, less penalties, and raw."""
    combined = rewards.combined(samples.reward_parts, samples.group_ids)
    if samples.turns > 1:
        combined = _shared_among_turns(combined, samples, credit, redraw_cost)
    differs = rewards.is_shaped or truncation_penalty or samples.turns > 1
    return Rollout(
        **vars(samples),
        rewards=combined - truncation_penalty * samples.truncated if truncation_penalty else combined,
        totals=rewards.total(samples.reward_parts) if differs else None,
    )


def _shared_among_turns(rewards: torch.Tensor, samples: Samples, credit: Credit, redraw_cost: float) -> torch.Tensor:
    """(N,) what each row is given of its episode's rewards, less what further pictures cost.

    In a group with branches one of the first pictures is gone on from, and the others' episodes end with their own.
    """
    grid = rewards.view(len(samples.prompts) // samples.turns, samples.turns, -1)  # prompt, turn, sample
    redrawn = (~samples.kept & (samples.turn_ids > 0)).view(grid.shape).cumsum(dim=1)
    grid = grid - redraw_cost * redrawn
    alone, shared = (grid[:, :1], grid[:, 1:]) if samples.branched else (grid[:, :0], grid)
    episodes = shared.transpose(1, 2)
    credits = turn_credits(episodes.flatten(0, 1), credit).view(episodes.shape).transpose(1, 2)
    return torch.cat([alone, credits], dim=1).flatten()


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
    told = {"turns": shares[0].turns, "branched": shares[0].branched}
    return Samples(**{name: column(name) for name in COLUMNS}, reward_parts=parts, **told)


@quiet_libraries()
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
    turns: int = 1,
    look_at: LookAt = "own",
    branches: bool = False,
) -> Samples:
    """Sample, draw and score; how the scores become rewards is decided from whole batches (`with_rewards`).

    A `ValueError` where there are no prompts, or fewer than two generations.

    Args:
        images_per_prompt: M images a rewrite; its reward is their mean.
        share_seeds: a group's rewrites are drawn from the same M latents, so that they differ by their words alone.
        use_image: the policy sees the picture that the user's own prompt gives.
        overlap: score the groups that are drawn to their end in a thread, while the next are drawn, for rewards that
            compute or wait elsewhere.
        first_prompt: the first prompt's place in the batch that these are a share of.
        turns: how often the policy writes; from the second time on it reads what it wrote and sees what that gave. All
            turns of an episode are drawn from the same latents. Who answers "keep it" leaves the picture as it is.
        look_at: what it sees of these pictures and of the prompts' own; all but "own" are controls.
        branches: all later rewrites of a group go on from one of its first pictures, not each from its own.
    """
    if num_generations < 2:
        raise ValueError(f"num_generations: found {num_generations}, allowed: at least 2 (1 has nothing to compare)")
    if not prompts:
        raise ValueError("prompts: found none, allowed: at least one")
    _require_fitting(policy, generator, rewards, turns, look_at)
    prompts = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    G, pictures = num_generations, [prompt.pictures() for prompt in prompts]
    places = first_prompt + torch.arange(len(prompts)).repeat_interleave(G)
    seeds = latent_seeds(seed, places, G, images_per_prompt, share_seeds)
    request = _unwritten(prompts, pictures, places, seeds)
    draw = partial(draw_and_score, generator, partial(score, rewards), overlap=overlap)
    clock, done, goes_on = time.perf_counter(), [], list(range(len(places)))
    asked = _begun(generator, prompts, pictures, seed, first_prompt, use_image)
    for turn in range(turns):
        if turn:
            goes_on = origins(request, G, branches and turn == 1)
            asked = with_turn(asked, done[-1].written.texts, done[-1].drawn.images, goes_on, request, look_at)
        read = what_is_read(asked, look_at, len(prompts))
        encoded, first = policy.encode(read), first_prompt * len(read) // len(prompts)
        stream = derive_seed(seed, "sampling", *([turn + 1] if turn else []))
        written = policy.sample(encoded, len(places) // len(read), seed=stream, first_prompt=first)
        spent = time.perf_counter() - clock
        drawn = _drawn(draw, replace(request, rewrites=written.texts), done[-1:], goes_on)
        done.append(_TurnRows(read, encoded, written, drawn, spent))
        clock = time.perf_counter()
    return _as_samples(done, prompts, request, policy.tokenizer.pad_token_id, first_prompt, branches)


def _require_fitting(policy: Policy, generator: Generator, rewards: Rewards, turns: int, look_at: LookAt) -> None:
    """Say what cannot work together before anything is drawn."""
    rewards.require_medium(getattr(generator, "medium", "image"))
    if turns > 1:
        require_words(look_at, generator)
        if look_at not in ("nothing", "words"):
            policy.require_eyes()


def _begun(
    generator: Generator,
    prompts: Sequence[Prompt],
    pictures: Sequence[list[Image.Image]],
    seed: int,
    first_prompt: int,
    use_image: bool,
) -> list[Conversation]:
    """The prompts with their pictures, and with what the users' words give where the policy sees that."""
    texts = [prompt.user_prompt for prompt in prompts]
    drawn = picture_prompts(generator, texts, seed, first_prompt) if use_image else []
    seen = [[image] for image in drawn] or [[]] * len(prompts)
    return [Conversation(text, (*own, *more)) for text, own, more in zip(texts, pictures, seen, strict=True)]


def _unwritten(
    prompts: Sequence[Prompt], pictures: Sequence[list[Image.Image]], places: torch.Tensor, seeds: torch.Tensor
) -> DrawRequest:
    """What is to be drawn of each row, but for the rewrites."""
    rows = [row for row in range(len(prompts)) for _ in range(len(places) // len(prompts))]
    fields, references = [prompts[row].metadata for row in rows], [pictures[row] or None for row in rows]
    return DrawRequest([prompts[row].user_prompt for row in rows], [], places, seeds, fields, references)


@dataclass(frozen=True)
class _TurnRows:
    """What one turn of N = P·G rows came to; it had one context a group, or one a row."""

    read: list[Conversation]  # what the policy read
    encoded: EncodedPrompts
    written: Completions
    drawn: DrawResult
    sampling_seconds: float


def _drawn(
    draw: Callable[[DrawRequest], DrawResult], request: DrawRequest, before: Sequence[_TurnRows], goes_on: Sequence[int]
) -> DrawResult:
    """What the rewrites gave; one that keeps its picture, or repeats itself, is neither drawn nor scored again."""
    if not before:
        return draw(request)
    last = before[0]
    again = rows_to_draw(request.rewrites, [last.written.texts[row] for row in goes_on])
    images = [last.drawn.images[row] for row in goes_on]
    parts = {name: values[goes_on].clone() for name, values in last.drawn.parts.items()}
    if not again:
        return DrawResult(images, parts, dict.fromkeys(last.drawn.seconds, 0.0))
    new = draw(request.some(again))
    for row, pictures in zip(again, new.images, strict=True):
        images[row] = pictures
    for name, values in new.parts.items():
        parts[name][again] = values
    return DrawResult(images, parts, new.seconds)


def _as_samples(
    done: Sequence[_TurnRows],
    prompts: Sequence[Prompt],
    request: DrawRequest,
    pad_token_id: int,
    first_prompt: int,
    branched: bool,
) -> Samples:
    """The rows of all turns, by prompt, then by turn; their contexts in the same order."""
    T, P, N = len(done), len(prompts), len(request.group_ids)
    rows = torch.arange(T * N).view(T, P, -1).transpose(0, 1).flatten().tolist()  # of the turns one after the other
    read, written = by_prompt([turn.read for turn in done], P), [turn.written for turn in done]
    ends = list(accumulate(len(turn.read) for turn in done))
    order = by_prompt([range(end - len(turn.read), end) for turn, end in zip(done, ends, strict=True)], P)
    encoded, several = done[0].encoded, T > 1
    if several:
        encoded = joined_prompts([turn.encoded for turn in done], pad_token_id).take(order)

    def by_token(name: str, fill: float) -> torch.Tensor:
        return stacked([getattr(one, name) for one in written], fill)[rows].cpu()

    def in_order(values: Sequence) -> list:
        flat = list(chain(*values))
        return [flat[row] for row in rows]

    texts = in_order([one.texts for one in written])
    seconds = [{"sampling": turn.sampling_seconds, **turn.drawn.seconds} for turn in done]
    unmatched = None if written[0].unmatched is None else torch.cat([one.unmatched for one in written])[rows]
    return Samples(
        prompts=[prompt for prompt in prompts for _ in range(T)],
        group_ids=first_prompt * T + torch.arange(P * T).repeat_interleave(N // P),
        completion_ids=by_token("ids", pad_token_id),
        completion_mask=by_token("mask", 0),
        enhanced_prompts=texts,
        images=in_order([turn.drawn.images for turn in done]),
        image_seeds=request.seeds.repeat(T, 1)[rows],
        reward_parts={n: torch.cat([turn.drawn.parts[n] for turn in done])[rows] for n in done[0].drawn.parts},
        old_logprobs=by_token("logprobs", 0.0),
        truncated=torch.cat([one.truncated for one in written])[rows].cpu(),
        unmatched=unmatched,
        contexts=read if several or any(one.pictures for one in read) else None,
        **(turn_columns(texts, P, T, branched, first_prompt) if several else {}),
        encoded=encoded,
        seconds={name: sum(one[name] for one in seconds) for name in seconds[0]},
    )


def score(rewards: Rewards, request: DrawRequest, images: Pictures) -> dict[str, torch.Tensor]:
    """Each part's mean over a rewrite's images that could be scored: {name: (N,)}."""
    count = request.seeds.shape[1]
    flat = [image for row in images for image in row]
    columns = (request.prompts, request.rewrites, request.metadata, request.references)
    prompts, rewrites, metadata, references = ([value for value in column for _ in range(count)] for column in columns)
    context = {"group_ids": request.group_ids.repeat_interleave(count), "image_seeds": request.seeds.flatten()}
    scores = rewards.score(flat, prompts, rewrites, metadata=metadata, references=references, **context)
    means = {}
    for name, values in scores.items():
        abstained = (values == ABSTAINED).reshape(-1, count).any(dim=1)
        means[name] = values.masked_fill(values == ABSTAINED, torch.nan).reshape(-1, count).nanmean(dim=1)
        means[name] = means[name].masked_fill(abstained & means[name].isnan(), ABSTAINED)
    return means


def with_encoded(rollout: Rollout, policy: Policy) -> Rollout:
    """The rollout with its contexts as the policy reads them, encoded where it has none: one from a file."""
    asked = rollout.asked()
    if rollout.encoded is not None and rollout.encoded.conversations == asked:
        return rollout
    return replace(rollout, encoded=policy.encode(asked))


def score_rows(
    policy: Callable[..., Scores], rollout: Rollout, rows: torch.Tensor, *, reference: bool = False
) -> Scores:
    """Log-probabilities and entropy, (rows, T) each, of some rows; only the contexts that these need are run.

    Args:
        policy: a `Policy`, or the module that several processes made of it.
        rollout: one with its encoded contexts.
    """
    rows = rows.cpu()
    answered = rollout.group_ids if rollout.context_ids is None else rollout.context_ids
    contexts, local = answered[rows].unique(return_inverse=True)
    asked = rollout.encoded.take(contexts.tolist())
    return policy(asked, local, rollout.completion_ids[rows], rollout.completion_mask[rows], reference=reference)


def latent_seeds(
    seed: int, group_ids: torch.Tensor, num_generations: int, images_per_prompt: int, share_seeds: bool
) -> torch.Tensor:
    """(N, M) seeds from (seed, prompt, image), and from the sample too where a group does not share them."""
    rows = [(group, "shared" if share_seeds else row % num_generations) for row, group in enumerate(group_ids.tolist())]
    images = range(images_per_prompt)
    return torch.tensor([[derive_seed(seed, "latents", *row, image) for image in images] for row in rows])


def picture_prompts(generator: Generator, prompts: Sequence[str], seed: int, first: int = 0) -> list[Image.Image]:
    """What the users' own prompts give, as pictures for a policy that looks; `first` is the first one's place."""
    seeds = [derive_seed(seed, "seen", place) for place in range(first, first + len(prompts))]
    return list(map(thumbnail, map(generator.generate_image, prompts, seeds)))


def _mean_and_std(values: torch.Tensor) -> tuple[float, float]:
    """Mean and unbiased standard deviation of the finite values; NaN where there are too few."""
    kept = values[values.isfinite()]
    return float(kept.mean()), float(kept.std()) if len(kept) > 1 else float("nan")
