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
from grpo_kit.config.display import Shown
from grpo_kit.config.media import digest
from grpo_kit.evaluation.intervals import Interval, bootstrap_interval, percentile_interval
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rewards.protocol import ABSTAINED, Reward

IDLE_WORDS = ("masterpiece", "beautiful")  # praise: says nothing of what a picture shows
_EDGE = 0.01  # of its range: so near to its extreme a score counts as being there


@dataclass(frozen=True, repr=False)
class Audit(Shown):
    """Some rewards, audited on the same samples; `show.audit_figure` draws it.

    Args:
        scores: reward → (N,), NaN where a sample could not be scored.
        rows: reward → what was found of it, each with ", low" and ", high" of its interval where it has one:
            rank within, pairs within: agreement with gold among samples of one prompt (`agreement`); "… over all" is
            between all samples, where a reward that knows easy prompts from hard ones does well, too. Missing without
            gold.
            seed share: see `seed_share`.
            at ceiling, at floor, top decile: see `saturation`.
            idle words, rewrite; idle words, user: mean absolute change when idle words are added to the rewrite, or to
            the user's prompt, in standard deviations of the scores within a prompt.
            ms per image: of a call with all images; what a reward keeps of known texts is not counted.
            scored: share of the samples.
    """

    scores: dict[str, np.ndarray] = field(repr=False)
    rows: dict[str, dict[str, float]]

    def table(self) -> pd.DataFrame:
        """A row a reward."""
        return pd.DataFrame(self.rows).T.rename_axis("reward")


def audit(
    reward: Reward | Mapping[str, Reward],
    images: Sequence[Image.Image | None],
    prompts: Sequence[str],
    *,
    enhanced_prompts: Sequence[str] | None = None,
    gold: Sequence[float] | Reward | None = None,
    group_ids: Sequence[int] | None = None,
    image_seeds: Sequence[int] | None = None,
    metadata: Sequence[Mapping] | None = None,
    references: Sequence[Sequence[Image.Image] | None] | None = None,
    idle_words: Sequence[str] = IDLE_WORDS,
) -> Audit:
    """Audit one reward, or several by name, on samples whose worth is known (`gold`) or not.

    Args:
        images, prompts, enhanced_prompts: N samples; without rewrites the pictures are of the users' prompts. None for
            a picture that came out unusable: it is not scored.
        gold: (N,) numbers, or a reward that gives them; None leaves out the agreement.
        group_ids: (N,) which prompt a sample belongs to; by default samples with the same prompt and the same
            references belong together. Intervals resample these groups.
        image_seeds: (N,) latent seeds, for the rewards that ask for them.
        metadata, references: the further fields of each prompt's row, and its own pictures, for those that ask.
        idle_words: each is added to a text in turn.

    Raises:
        KitError: no samples, or columns of another length.
        RewardError: a reward that fails.
    """
    rewrites = prompts if enhanced_prompts is None else enhanced_prompts
    columns = {"prompts": prompts, "enhanced_prompts": rewrites, "group_ids": group_ids, "image_seeds": image_seeds}
    columns |= {"metadata": metadata, "references": references}
    for name, values in columns.items():
        count = len(images) if values is None else len(values)
        if not images or count != len(images):
            raise KitError(f"{name}: found {count} for {len(images)} images, allowed: one each, at least 1")
    samples = pd.DataFrame({"image": pd.Series(list(images), dtype=object), "prompt": list(prompts)})
    samples["rewrite"] = list(rewrites)
    samples["metadata"] = [{}] * len(images) if metadata is None else list(metadata)
    samples["references"] = pd.Series([None] * len(images) if references is None else list(references), dtype=object)
    asked = map(_asked, prompts, samples["references"]) if group_ids is None else group_ids
    samples["group"] = pd.factorize(np.asarray(list(asked)))[0]
    if image_seeds is not None:
        samples["seed"] = np.asarray(image_seeds)
    gold = _scored("gold", gold, samples) if callable(gold) else gold
    if gold is not None and np.shape(gold) != (len(images),):
        raise KitError(f"gold: found shape {np.shape(gold)}, allowed: ({len(images)},), one number an image")
    named = reward if isinstance(reward, Mapping) else {getattr(reward, "__name__", type(reward).__name__): reward}
    gold = None if gold is None else np.asarray(gold, float)
    scores, rows = {}, {}
    for name, one in named.items():
        scores[name] = _scored(name, one, samples)
        if not np.isfinite(scores[name]).any():
            raise KitError(f"reward {name!r}: found no sample that it can score, allowed: at least one")
        rows[name] = _statistics(scores[name], gold, samples) | saturation(scores[name])
        rows[name] |= _reactions(name, one, scores[name], samples, idle_words)
    return Audit(scores, rows)


def _asked(prompt: str, references: Sequence[Image.Image] | None) -> str:
    """What tells one prompt from another: its words and its pictures."""
    return "\0".join((prompt, *map(digest, references or ())))


def _scored(name: str, reward: Reward, samples: pd.DataFrame) -> np.ndarray:
    """(N,) float64: a reward's scores of samples, a row each; the column seed may be missing."""
    found = Rewards({name: reward}, {name: 1.0}).score(
        *(samples[column].tolist() for column in ("image", "prompt", "rewrite")),
        group_ids=torch.tensor(samples["group"].to_numpy()),
        image_seeds=torch.tensor(samples["seed"].to_numpy()) if "seed" in samples else None,
        metadata=samples["metadata"].tolist(),
        references=samples["references"].tolist(),
    )
    return found[name].masked_fill(found[name] == ABSTAINED, torch.nan).numpy()


def _statistics(scores: np.ndarray, gold: np.ndarray | None, samples: pd.DataFrame) -> dict[str, float]:
    """Agreement and seed share, flat: an interval is three numbers."""
    groups = samples["group"].to_numpy()
    texts = samples.groupby(["group", "rewrite"], sort=False).ngroup().to_numpy()
    found = {} if gold is None else agreement(scores, gold, groups)
    row = {}
    for name, interval in (found | {"seed share": seed_share(scores, texts, groups)}).items():
        row |= {name: interval.mean, f"{name}, low": interval.low, f"{name}, high": interval.high}
    return row


def _reactions(
    name: str, reward: Reward, scores: np.ndarray, samples: pd.DataFrame, idle_words: Sequence[str]
) -> dict[str, float]:
    """What more calls tell: the seconds of one, and the change that idle words make."""
    shuffled, started = samples.sample(frac=1), time.perf_counter()  # in this order no result of a batch was kept
    _scored(name, reward, shuffled)
    seconds = time.perf_counter() - started
    row = {}
    for label, column in (("idle words, rewrite", "rewrite"), ("idle words, user", "prompt")):
        longer = [samples.assign(**{column: samples[column] + f", {word}"}) for word in idle_words]
        changed = [_scored(name, reward, one) for one in longer]
        row[label] = idle_change(scores, changed, samples["group"].to_numpy())
    return row | {"ms per image": 1000 * seconds / len(scores), "scored": float(np.isfinite(scores).mean())}


def agreement(
    scores: np.ndarray, gold: np.ndarray, group_ids: np.ndarray, n_resamples: int = 1000
) -> dict[str, Interval]:
    """Rank correlation and pairwise accuracy, within prompts and over all, with intervals that resample prompts.

    "rank" is Spearman's correlation (within: its mean over prompts); "pairs" the share of the pairs that gold tells
    apart and the reward puts in the same order (a tie counts half, so 0.5 is chance). A prompt whose gold is the same
    for all samples orders nothing and is left out of the ranks; one whose scores are all the same counts 0 there.

    Args:
        scores, gold: (N,); samples without both are left out.
        group_ids: (N,) which prompt a sample belongs to.
    """
    both = np.isfinite(scores) & np.isfinite(gold)
    scores, gold, groups = scores[both], gold[both], pd.factorize(group_ids[both])[0]
    if not both.any():
        return dict.fromkeys(("rank within", "rank over all", "pairs within", "pairs over all"), Interval(float("nan")))
    members = [np.flatnonzero(groups == group) for group in range(groups.max() + 1)]
    ranks = np.array([rank_correlation(scores[rows], gold[rows]) for rows in members])
    drawn = np.random.default_rng(0).integers(len(members), size=(n_resamples, len(members)))
    samples = [np.concatenate([members[group] for group in draw]) for draw in drawn]
    overall = np.array([rank_correlation(scores[rows], gold[rows]) for rows in samples])
    member = np.eye(len(members))[groups]  # (N, G)
    better = gold[:, None] > gold[None, :]
    right = member.T @ (better * (0.5 + 0.5 * np.sign(scores[:, None] - scores[None, :]))) @ member
    all_pairs = member.T @ better @ member  # (G, G), of two groups: the pairs that gold tells apart
    counts = np.stack([np.bincount(draw, minlength=len(members)) for draw in drawn]).astype(float)
    within = _ratio(counts @ np.diag(right), counts @ np.diag(all_pairs))
    between = _ratio(((counts @ right) * counts).sum(1), ((counts @ all_pairs) * counts).sum(1))
    return {
        "rank within": bootstrap_interval(ranks),
        "rank over all": percentile_interval(rank_correlation(scores, gold), overall),
        "pairs within": percentile_interval(_ratio(np.trace(right), np.trace(all_pairs)), within),
        "pairs over all": percentile_interval(_ratio(right.sum(), all_pairs.sum()), between),
    }


def rank_correlation(scores: np.ndarray, gold: np.ndarray) -> float:
    """Spearman's; 0 where the scores are all the same, NaN where gold is."""
    if not gold.size or np.ptp(gold) == 0 or np.ptp(scores) == 0:
        return float("nan") if not gold.size or np.ptp(gold) == 0 else 0.0
    return float(np.corrcoef(stats.rankdata(scores), stats.rankdata(gold))[0, 1])


def _ratio(top: np.ndarray | float, bottom: np.ndarray | float) -> np.ndarray | float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(top, bottom)


def seed_share(scores: np.ndarray, texts: np.ndarray, group_ids: np.ndarray) -> Interval:
    """Share of the variance within a prompt that another seed does to the same texts, in [0, 1].

    One-way analysis of variance of the texts within each prompt, with unequal numbers of pictures (Searle et al.,
    "Variance Components", 1992, §3.6). NaN where no text was drawn twice or no prompt has two texts.

    Args:
        scores, texts, group_ids: (N,); equal numbers in `texts` are the same user's prompt and rewrite.
    """
    frame = pd.DataFrame({"score": scores, "text": texts, "group": group_ids})[np.isfinite(scores)]
    rows, means = [], frame.groupby(["group", "text"])["score"].transform("mean").to_numpy()
    for place in frame.groupby("group").indices.values():  # of each prompt
        scored, mean, count = frame["score"].to_numpy()[place], means[place], len(place)
        sizes = np.unique(frame["text"].to_numpy()[place], return_counts=True)[1]
        squares = ((scored - mean) ** 2).sum(), ((mean - scored.mean()) ** 2).sum()  # within texts and between them
        rows.append((*squares, count - len(sizes), len(sizes) - 1, count - (sizes**2).sum() / count))
    drawn = np.random.default_rng(0).integers(len(rows), size=(1000, len(rows)))

    def share(sums: np.ndarray) -> np.ndarray | float:
        inner, between, inner_freedom, freedom, size = np.moveaxis(sums, -1, 0)
        seed = _ratio(inner, inner_freedom)
        return _ratio(seed, seed + np.maximum(_ratio(between - seed * freedom, size), 0))

    table = np.array(rows, dtype=float)  # (G, 5)
    return percentile_interval(share(table.sum(axis=0)), share(table[drawn].sum(axis=1)))


def saturation(scores: np.ndarray) -> dict[str, float]:
    """Shares of samples within 1 % of the range from its ends, and the part of it that the best tenth takes up."""
    found = scores[np.isfinite(scores)]
    low, high = found.min(), found.max()
    edge = _EDGE * (high - low)
    top = float((high - np.quantile(found, 0.9)) / (high - low)) if high > low else 0.0
    ceiling, floor = (found >= high - edge).mean(), (found <= low + edge).mean()
    return {"at ceiling": float(ceiling), "at floor": float(floor), "top decile": top}


def idle_change(scores: np.ndarray, changed: Sequence[np.ndarray], group_ids: np.ndarray) -> float:
    """Mean absolute change, in standard deviations within a prompt; 0 where nothing changes, whatever the deviation."""
    change = float(np.nanmean(np.abs(np.stack(changed) - scores))) if len(changed) else float("nan")
    deviation = float(pd.Series(scores).groupby(group_ids).var().mean() ** 0.5)
    return change / deviation if deviation > 0 else (0.0 if change == 0 else float("inf") if change > 0 else change)
