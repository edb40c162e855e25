"""How much of the variance within a group is the rewrites', how much the generator's noise, and how to spend a budget.

Draw N rewrites of each of P prompts from the same M latent seeds: within a prompt a score is

    score[n, m] = prompt's mean + rewrite[n] + seed[m] + rest[n, m],

a two-way table of random effects (Searle, Casella & McCulloch, "Variance Components", 1992, ch. 4). `seed` is noise
that all rewrites share; `rest` is noise of one rewrite with one seed, and what the score itself adds.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from scipy import integrate, stats

from grpo_kit.config import KitError
from grpo_kit.config.display import Shown
from grpo_kit.evaluation.intervals import Interval, percentile_interval

PARTS = ("rewrite", "seed", "rest")


@dataclass(frozen=True, repr=False)
class VarianceSplit(Shown):
    """The variance of rewards within a prompt, in its three parts; an estimate below 0 is set to 0."""

    rewrite: float
    seed: float
    rest: float
    intervals: dict[str, Interval]  # of each part's variance, and "… share" of its share; one prompt has no ends
    prompts: int
    rewrites: int
    seeds: int

    def shares(self) -> dict[str, float]:
        """Each part's share of the variance within a prompt; NaN where nothing varies."""
        return {part: self.intervals[f"{part} share"].mean for part in PARTS}

    def reliability(self, images: int = 1, *, common_seeds: bool = True) -> float:
        """Share of the variance of measured differences in a group that is the rewrites' own, in [0, 1].

        With the same seeds for all rewrites of a group, the seeds' part leaves the differences: common random numbers.

        Args:
            images: how many of each rewrite are averaged.
        """
        noise = (self.rest if common_seeds else self.rest + self.seed) / images
        return self.rewrite / (self.rewrite + noise) if self.rewrite + noise else float("nan")

    def table(self) -> pd.DataFrame:
        """A row a part: standard deviation, share of the variance, and the share's interval."""
        rows = {part: self.intervals[f"{part} share"].to_dict() for part in PARTS}
        table = pd.DataFrame(rows).T.rename(columns={"mean": "share"})
        table.insert(0, "std", [getattr(self, part) ** 0.5 for part in PARTS])
        return table


def split_variance(values: np.ndarray, confidence: float = 0.95, n_resamples: int = 2000) -> VarianceSplit:
    """Split the variance within prompts into the rewrites', the latent seeds', and the rest, by mean squares.

    Prompts are what intervals resample (percentile bootstrap): under ten of them these are somewhat too narrow.

    Args:
        values: (P, N, M), scores of N rewrites drawn from the same M seeds for each of P prompts. The seeds of two
            prompts may differ. A prompt with a NaN is left out.

    Raises:
        KitError: another shape, fewer than two rewrites or seeds, or no prompt without NaN.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 3 or min(values.shape[1:]) < 2:
        raise KitError(f"values: found shape {values.shape}, allowed: (prompts, rewrites >= 2, seeds >= 2)")
    values = values[np.isfinite(values).all(axis=(1, 2))]
    if not len(values):
        raise KitError("values: found no prompt whose scores are all finite, allowed: at least one")
    P, N, M = values.shape
    squares = _mean_squares(values)
    draws = np.random.default_rng(0).integers(P, size=(n_resamples if P > 1 else 0, P))
    # (3, 1 + R) variances: as they are estimated, then of each resample
    parts = _components(np.concatenate([squares.mean(axis=0, keepdims=True), squares[draws].mean(axis=1)]), N, M)
    total = parts.sum(axis=0)
    shares = np.divide(parts, total, out=np.full_like(parts, np.nan), where=total > 0)
    found = dict(zip((*PARTS, *(f"{part} share" for part in PARTS)), (*parts, *shares), strict=True))
    intervals = {name: percentile_interval(row[0], row[1:], confidence) for name, row in found.items()}
    return VarianceSplit(*map(float, parts[:, 0]), intervals=intervals, prompts=P, rewrites=N, seeds=M)


def _mean_squares(values: np.ndarray) -> np.ndarray:
    """(P, 3) mean squares of rewrites, seeds and rest."""
    _, N, M = values.shape
    centred = values - values.mean(axis=(1, 2), keepdims=True)
    rewrites, seeds = centred.mean(axis=2), centred.mean(axis=1)
    rest = centred - rewrites[:, :, None] - seeds[:, None, :]
    of_rewrites, of_seeds = M * (rewrites**2).sum(axis=1) / (N - 1), N * (seeds**2).sum(axis=1) / (M - 1)
    return np.stack([of_rewrites, of_seeds, (rest**2).sum(axis=(1, 2)) / ((N - 1) * (M - 1))], axis=1)


def _components(squares: np.ndarray, N: int, M: int) -> np.ndarray:
    """(3, R) variances from (R, 3) mean squares, whose expectations are rest + M·rewrite, rest + N·seed and rest."""
    rewrites, seeds, rest = squares.T
    return np.stack([np.maximum(rewrites - rest, 0) / M, np.maximum(seeds - rest, 0) / N, rest])


@dataclass(frozen=True, repr=False)
class Advice(Shown):
    """What to do with a number of images an iteration, and what the other choices are worth (see `advise`)."""

    prompts: int
    group_size: int
    images_per_rewrite: int
    common_seeds: bool
    table: pd.DataFrame

    def __str__(self) -> str:
        kind = "the same seeds for a group" if self.common_seeds else "seeds of their own"
        images = f"{self.images_per_rewrite} image{'' if self.images_per_rewrite == 1 else 's'}"
        return (
            f"{self.prompts} prompts × {self.group_size} rewrites × {images}, {kind}: an advantage correlates "
            f"{self.table['correlation'].iloc[0]:.2f} with the true one"
        )


def advise(
    split: VarianceSplit, images: int, *, min_prompts: int = 4, rewrite_cost: float = 0.0, common_seeds: bool = True
) -> Advice:
    """How many prompts, rewrites of each and images of each rewrite a budget is best spent on.

    What is maximised is the signal, P·(N − 1)·reliability(M): the squared signal-to-noise ratio of the policy gradient
    up to a factor that no choice changes. A group's gradient is a sample covariance of N advantages and N score
    functions ∇log π; its variance goes with that of measured scores, rewrite / reliability(M), over N − 1 degrees of
    freedom, and P groups are averaged. It assumes that effects are additive and normal, that score functions of
    different rewrites are independent, that advantages are not divided by the group's standard deviation, and that
    prompts teach the same thing. They do not: `min_prompts` is yours to choose, without it one large group would win.

    Args:
        images: the budget of one iteration.
        min_prompts: fewest prompts an iteration.
        rewrite_cost: what sampling a rewrite and stepping on it cost, in images. With 0 a new rewrite always beats
            another image of an old one. Otherwise the best number of images a rewrite is about √(cost · noise /
            rewrite) (Cochran, "Sampling Techniques", 1977, §10.6).
        common_seeds: whether the rewrites of a group share their seeds.

    Returns:
        The best choice, and a table of all, best first: `correlation` of a measured advantage with the true one (the
        root of the reliability), `comparisons` P·(N − 1), `signal` as a share of the best one's, and `best of group`:
        how far above the prompt's mean the truly expected rewrite with the highest score lies, in scores.

    Raises:
        KitError: a split without any difference between rewrites, or a budget for fewer than two rewrites a prompt.
    """
    if not split.rewrite > 0:
        raise KitError("split: found no variance of rewrites, allowed: more than 0. Draw more prompts or seeds")
    if min_prompts < 1 or rewrite_cost < 0:
        raise KitError(f"found min_prompts {min_prompts}, rewrite_cost {rewrite_cost}, allowed: at least 1, at least 0")
    sizes = [size for size in range(1, images + 1) if images % size == 0]
    table = pd.DataFrame(product(sizes, sizes), columns=["prompts", "images_per_rewrite"])
    group = (images / (table["prompts"] * (table["images_per_rewrite"] + rewrite_cost)) + 1e-9).astype(int)
    table.insert(1, "group_size", group)
    table = table[(table["prompts"] >= min_prompts) & (table["group_size"] >= 2)]
    if table.empty:
        raise KitError(f"images: found {images}, allowed: at least 2 rewrites of each of {min_prompts} prompts")
    reliability = table["images_per_rewrite"].map(lambda each: split.reliability(each, common_seeds=common_seeds))
    comparisons = table["prompts"] * (table["group_size"] - 1)
    table = table.assign(correlation=reliability**0.5, comparisons=comparisons, signal=comparisons * reliability)
    table["best of group"] = table["group_size"].map(expected_maximum) * (reliability * split.rewrite) ** 0.5
    table = table.sort_values(["signal", "group_size"], ascending=False, ignore_index=True)
    best = table.iloc[0]
    chosen = (int(best[name]) for name in ("prompts", "group_size", "images_per_rewrite"))
    return Advice(*chosen, common_seeds, table.assign(signal=table["signal"] / best["signal"]))


def expected_maximum(count: int) -> float:
    """Of `count` standard normal values."""

    def survives(x: float) -> float:  # E max = ∫ (1 − Φ(x)^n) dx over x > 0, less ∫ Φ(x)^n dx over x < 0
        return 1 - stats.norm.cdf(x) ** count - stats.norm.cdf(-x) ** count

    return float(integrate.quad(survives, 0, 12)[0])
