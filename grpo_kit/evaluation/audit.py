"""Can a reward be trusted? Agreement with gold, noise of the latent seed, saturation, idle words, and cost."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy import stats

from grpo_kit.config import KitError
from grpo_kit.evaluation.statistics import Interval, bootstrap_interval
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rewards.protocol import Reward

IDLE_WORDS = ("masterpiece", "beautiful")  # praise: says nothing of what a picture shows
_EDGE = 0.01  # of its range: so near to its extreme a score counts as being there
_AGREEMENT = ("rank within", "rank over all", "pairs within", "pairs over all")


class AuditError(KitError):
    """Samples on which nothing can be audited."""


@dataclass(frozen=True)
class RewardAudit:
    """What an audit found of one reward.

    Args:
        scores: (N,), NaN where a sample could not be scored.
        agreement: with gold, each as `{"mean", "low", "high"}`; empty without gold. "rank within" is the mean over
            prompts of Spearman's rank correlation, "pairs within" the share of pairs of one prompt that gold tells
            apart and that the reward puts in the same order (a tie counts half, so 0.5 is chance). "… over all" are the
            same between all samples, in which a reward that knows easy prompts from hard ones does well, too.
        seed_share: of the variance within a prompt, what another latent seed does to the same texts. NaN where no text
            was drawn twice.
        at_ceiling, at_floor: shares of samples within 1 % of the observed range from its ends.
        top_decile: which part of the range separates the best tenth of the samples from each other.
        idle_enhanced, idle_user: mean absolute change when idle words are added to the rewrite, or to the user's
            prompt, in standard deviations of the scores within a prompt.
        ms_per_image: of a call with all images; what a reward keeps of known texts is not counted.
    """

    scores: np.ndarray = field(repr=False, compare=False)
    agreement: dict[str, Interval]
    seed_share: Interval
    at_ceiling: float
    at_floor: float
    top_decile: float
    idle_enhanced: float
    idle_user: float
    ms_per_image: float

    def row(self) -> dict[str, float]:
        """All numbers, flat: an interval is three of them."""
        spread = {**self.agreement, "seed share": self.seed_share}
        ends = (("mean", ""), ("low", ", low"), ("high", ", high"))
        row = {name + suffix: found[end] for name, found in spread.items() for end, suffix in ends}
        return row | {
            "at ceiling": self.at_ceiling,
            "at floor": self.at_floor,
            "top decile": self.top_decile,
            "idle words, rewrite": self.idle_enhanced,
            "idle words, user": self.idle_user,
            "ms per image": self.ms_per_image,
            "scored": float(np.isfinite(self.scores).mean()),
        }


@dataclass(frozen=True)
class Audit:
    """Some rewards, audited on the same samples; `show.audit_figure` draws it."""

    rewards: dict[str, RewardAudit]

    def table(self) -> pd.DataFrame:
        """A row a reward."""
        return pd.DataFrame({name: found.row() for name, found in self.rewards.items()}).T.rename_axis("reward")


def audit(
    reward: Reward | Mapping[str, Reward],
    images: Sequence[Image.Image | None],
    prompts: Sequence[str],
    *,
    enhanced_prompts: Sequence[str] | None = None,
    gold: Sequence[float] | Reward | None = None,
    group_ids: Sequence[int] | None = None,
    image_seeds: Sequence[int] | None = None,
    idle_words: Sequence[str] = IDLE_WORDS,
    confidence: float = 0.95,
    n_resamples: int = 1000,
) -> Audit:
    """Audit one reward, or several by name, on samples whose worth is known (`gold`) or not.

    Args:
        images, prompts, enhanced_prompts: N samples; without rewrites the pictures are of the users' prompts. None for
            a picture that came out unusable: it is not scored.
        gold: (N,) numbers, or a reward that gives them; None leaves out the agreement.
        group_ids: (N,) which prompt a sample belongs to; by default samples with the same prompt belong together.
            Intervals resample these groups.
        image_seeds: (N,) latent seeds, for the rewards that ask for them.
        idle_words: each is added to a text in turn.

    Raises:
        AuditError: no samples, or columns of another length.
        RewardError: a reward that fails.
    """
    rewrites = prompts if enhanced_prompts is None else enhanced_prompts
    ids = pd.factorize(pd.Series(prompts if group_ids is None else np.asarray(group_ids)))[0]
    columns = {"prompts": prompts, "enhanced_prompts": rewrites, "group_ids": ids, "image_seeds": image_seeds}
    for name, values in columns.items():
        if not images or (values is not None and len(values) != len(images)):
            raise AuditError(
                f"{name}: found {len(values or ())} for {len(images)} images, allowed: one each, at least 1"
            )
    samples = _Samples(list(images), list(prompts), list(rewrites), ids, image_seeds)
    truth = samples.scored("gold", gold) if callable(gold) else gold
    if truth is not None and np.shape(truth) != (len(images),):
        raise AuditError(f"gold: found shape {np.shape(truth)}, allowed: ({len(images)},), one number an image")
    named = reward if isinstance(reward, Mapping) else {getattr(reward, "__name__", type(reward).__name__): reward}
    options = (None if truth is None else np.asarray(truth, float), idle_words, confidence, n_resamples)
    return Audit({name: _audited(name, one, samples, *options) for name, one in named.items()})


@dataclass(frozen=True)
class _Samples:
    """What rewards are called with."""

    images: list[Image.Image | None]
    prompts: list[str]
    rewrites: list[str]
    group_ids: np.ndarray
    image_seeds: Sequence[int] | None

    def scored(self, name: str, reward: Reward, prompt_end: str = "", rewrite_end: str = "") -> np.ndarray:
        """(N,) float64, after the ends were added to the texts."""
        texts = [text + prompt_end for text in self.prompts], [text + rewrite_end for text in self.rewrites]
        seeds = None if self.image_seeds is None else torch.as_tensor(self.image_seeds)
        rewards = Rewards({name: reward}, {name: 1.0})
        found = rewards.score(self.images, *texts, group_ids=torch.as_tensor(self.group_ids), image_seeds=seeds)
        return found[name].numpy()

    def shuffled(self) -> "_Samples":
        """In an order that no reward has met: what it keeps of the batches before is of no use to it."""
        order = np.random.default_rng().permutation(len(self.images))
        images, prompts, rewrites = (
            [column[row] for row in order] for column in (self.images, self.prompts, self.rewrites)
        )
        seeds = None if self.image_seeds is None else np.asarray(self.image_seeds)[order]
        return _Samples(images, prompts, rewrites, self.group_ids[order], seeds)


def _audited(
    name: str,
    reward: Reward,
    samples: _Samples,
    gold: np.ndarray | None,
    idle_words: Sequence[str],
    confidence: float,
    n_resamples: int,
) -> RewardAudit:
    scores = samples.scored(name, reward)  # before the clock starts: a first call loads and warms up
    if not np.isfinite(scores).any():
        raise AuditError(f"reward {name!r}: found no sample that it can score, allowed: at least one")
    shuffled, started = samples.shuffled(), time.perf_counter()
    shuffled.scored(name, reward)
    seconds = time.perf_counter() - started
    ends = [f", {word}" for word in idle_words]
    rewritten = [samples.scored(name, reward, rewrite_end=end) for end in ends]
    asked = [samples.scored(name, reward, prompt_end=end) for end in ends]
    texts = pd.factorize(pd.Series(list(zip(samples.prompts, samples.rewrites, strict=True))))[0]
    options = (confidence, n_resamples)
    return RewardAudit(
        scores=scores,
        agreement={} if gold is None else agreement(scores, gold, samples.group_ids, *options),
        seed_share=seed_share(scores, texts, samples.group_ids, *options),
        **saturation(scores),
        idle_enhanced=idle_change(scores, rewritten, samples.group_ids),
        idle_user=idle_change(scores, asked, samples.group_ids),
        ms_per_image=1000 * seconds / len(scores),
    )


# --- agreement --------------------------------------------------------------------------------------------------------


def agreement(
    scores: np.ndarray, gold: np.ndarray, group_ids: np.ndarray, confidence: float = 0.95, n_resamples: int = 1000
) -> dict[str, Interval]:
    """Rank correlation and pairwise accuracy, within prompts and over all, with intervals that resample prompts.

    Args:
        scores, gold: (N,); samples without both are left out.
        group_ids: (N,) which prompt a sample belongs to.

    A prompt whose gold is the same for all samples orders nothing and is left out of the ranks within prompts; one
    whose scores are all the same counts 0 there.
    """
    both = np.isfinite(scores) & np.isfinite(gold)
    scores, gold, groups = scores[both], gold[both], pd.factorize(group_ids[both])[0]
    if not both.any():
        nothing = dict.fromkeys(("mean", "low", "high"), float("nan"))
        return dict.fromkeys(_AGREEMENT, nothing)
    members = [np.flatnonzero(groups == group) for group in range(groups.max() + 1)]
    ranks = np.array([_rank_correlation(scores[rows], gold[rows]) for rows in members if np.ptp(gold[rows]) > 0])
    drawn = np.random.default_rng(0).integers(len(members), size=(n_resamples, len(members)))
    samples = [np.concatenate([members[group] for group in draw]) for draw in drawn]
    overall = [_rank_correlation(scores[rows], gold[rows]) for rows in samples]
    right, all_pairs = _ordered_pairs(scores, gold, groups)
    counts = np.stack([np.bincount(draw, minlength=len(members)) for draw in drawn]).astype(float)
    within = _ratio(counts @ np.diag(right), counts @ np.diag(all_pairs))
    between = _ratio(((counts @ right) * counts).sum(1), ((counts @ all_pairs) * counts).sum(1))
    return {
        "rank within": bootstrap_interval(ranks, confidence),
        "rank over all": _interval(_rank_correlation(scores, gold), overall, confidence),
        "pairs within": _interval(_ratio(np.trace(right), np.trace(all_pairs)), within, confidence),
        "pairs over all": _interval(_ratio(right.sum(), all_pairs.sum()), between, confidence),
    }


def _rank_correlation(scores: np.ndarray, gold: np.ndarray) -> float:
    """Spearman's; 0 where the scores are all the same, NaN where gold is."""
    if np.ptp(gold) == 0:
        return float("nan")
    if np.ptp(scores) == 0:
        return 0.0
    return float(np.corrcoef(stats.rankdata(scores), stats.rankdata(gold))[0, 1])


def _ordered_pairs(scores: np.ndarray, gold: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(G, G) for each two groups: pairs in the right order, a tie counting half, and pairs that gold tells apart."""
    better = gold[:, None] > gold[None, :]
    right = better * (0.5 + 0.5 * np.sign(scores[:, None] - scores[None, :]))
    member = np.eye(groups.max() + 1)[groups]  # (N, G)
    return member.T @ right @ member, member.T @ better @ member


def _ratio(top: np.ndarray | float, bottom: np.ndarray | float) -> np.ndarray | float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(top, bottom)


def _interval(found: float, drawn: Sequence[float], confidence: float) -> Interval:
    """Percentile interval of what resampling gave; NaN where too little is left to resample."""
    drawn = np.asarray(drawn, float)
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2]) if len(drawn) > 1 else (np.nan, np.nan)
    return {"mean": float(found), "low": float(low), "high": float(high)}


# --- noise, saturation, idle words ------------------------------------------------------------------------------------


def seed_share(
    scores: np.ndarray, texts: np.ndarray, group_ids: np.ndarray, confidence: float = 0.95, n_resamples: int = 1000
) -> Interval:
    """Share of the variance within a prompt that another seed does to the same texts, in [0, 1].

    One-way analysis of variance of the texts within each prompt, with unequal numbers of pictures (Searle et al.,
    "Variance Components", 1992, §3.6). NaN where no text was drawn twice or no prompt has two texts.

    Args:
        scores, texts, group_ids: (N,); equal numbers in `texts` are the same user's prompt and rewrite.
    """
    kept = np.isfinite(scores)
    frame = pd.DataFrame({"score": scores, "text": texts, "group": group_ids})[kept]
    squares = np.array([_text_squares(group) for _, group in frame.groupby("group")])  # (G, 5)
    drawn = np.random.default_rng(0).integers(len(squares), size=(n_resamples, len(squares)))
    return _interval(_share_of(squares.sum(axis=0)), _share_of(squares[drawn].sum(axis=1)), confidence)


def _text_squares(group: pd.DataFrame) -> tuple[float, ...]:
    """Of one prompt: squares within and between texts, their degrees of freedom, and Σn − Σn²/Σn."""
    texts = group.groupby("text")["score"]
    sizes, means, count = texts.size(), texts.mean(), len(group)
    inner = float(((group["score"] - texts.transform("mean")) ** 2).sum())
    between = float((sizes * (means - group["score"].mean()) ** 2).sum())
    return inner, between, count - len(sizes), len(sizes) - 1, count - float((sizes**2).sum()) / count


def _share_of(squares: np.ndarray) -> np.ndarray | float:
    """The seeds' share from (…, 5) sums of squares; a text's variance below 0 is set to 0."""
    inner, between, inner_freedom, freedom, size = np.moveaxis(squares, -1, 0)
    seed = _ratio(inner, inner_freedom)
    words = np.maximum(_ratio(between - seed * freedom, size), 0)
    return _ratio(seed, seed + words)


def saturation(scores: np.ndarray) -> dict[str, float]:
    """Shares of samples at the ceiling and the floor, and the part of the range that the best tenth takes up."""
    found = scores[np.isfinite(scores)]
    low, high = found.min(), found.max()
    edge = _EDGE * (high - low)
    top = float(_ratio(high - np.quantile(found, 0.9), high - low)) if high > low else 0.0
    ceiling, floor = (found >= high - edge).mean(), (found <= low + edge).mean()
    return {"at_ceiling": float(ceiling), "at_floor": float(floor), "top_decile": top}


def idle_change(scores: np.ndarray, changed: Sequence[np.ndarray], group_ids: np.ndarray) -> float:
    """Mean absolute change, in standard deviations within a prompt; 0 where nothing changes, whatever the deviation."""
    change = float(np.nanmean(np.abs(np.stack(changed) - scores))) if len(changed) else float("nan")
    deviation = float(pd.Series(scores).groupby(group_ids).var().mean() ** 0.5)
    return change / deviation if deviation > 0 else (0.0 if change == 0 else float("inf") if change > 0 else change)
