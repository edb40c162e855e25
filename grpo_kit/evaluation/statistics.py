"""How sure is a comparison? Intervals, rates, what could be detected, and several training seeds pooled.

Scores of one variant are a table with a row a prompt and a column a latent seed, (P, K), NaN where a cell could not be
scored. Two pictures of one prompt resemble each other, so prompts are what is resampled and counted, never pictures.
Every interval is `{"mean", "low", "high"}`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from grpo_kit.config import KitError

Interval = dict[str, float]
VARIANTS = ("raw", "initial", "trained", "oracle")
_PAIRS = (("trained", "raw"), ("trained", "initial"), ("initial", "raw"), ("oracle", "raw"), ("oracle", "trained"))
POWER = 0.8
_TIE = 1e-9  # scores that differ by no more are equal up to rounding


class StatisticsError(KitError):
    """Scores from which nothing can be concluded."""


# --- tables and pairs ------------------------------------------------------------------------------------------------


def complete_cells(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Leave out (and count) the (prompt, seed) cells in which a variant could not be scored: pairs must stay pairs."""
    failed = rows.loc[rows["reward"].isna(), ["prompt_id", "seed"]].drop_duplicates()
    if failed.empty:
        return rows, 0
    kept = rows.merge(failed, on=["prompt_id", "seed"], how="left", indicator=True)["_merge"] == "left_only"
    return rows[kept.to_numpy()], len(failed)


def score_tables(
    rows: pd.DataFrame, metrics: Sequence[str], variants: Sequence[str]
) -> dict[str, dict[str, pd.DataFrame]]:
    """Metric → variant → its (P, K) table, from tidy rows (prompt_id, variant, seed, metrics …)."""
    if rows.empty:
        return {m: {v: pd.DataFrame(dtype=float) for v in variants} for m in metrics}
    wide = rows.pivot(index="prompt_id", columns=["variant", "seed"], values=list(metrics))
    return {m: {v: wide[m][v] for v in variants} for m in metrics}


def compared_pairs(variants: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs to compare: those of the kit's own variants; each saved policy against raw and against the first one.

    The first policy is `trained` where it takes part, else the first saved one.
    """
    saved = [variant for variant in variants if variant not in VARIANTS]
    first = ["trained"] if "trained" in variants else saved[:1]
    pairs = [(a, b) for a, b in _PAIRS if a in variants and b in variants]
    return pairs + [(name, other) for name in saved for other in ["raw", *first] if other in variants and other != name]


# --- intervals --------------------------------------------------------------------------------------------------------


def bootstrap_interval(values: np.ndarray, confidence: float = 0.95, n_resamples: int = 2000) -> Interval:
    """Mean of independent values, one a prompt (NaN left out), and its expanded percentile bootstrap interval.

    The plain percentile interval is too narrow with few values: by √(1 − 1/n), and by z in place of t. The expanded one
    (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, §5.3) asks for quantiles further out: about as
    wide as the t-interval, yet it never leaves the range of the values, so a share stays one. On 1,000 samples of 16
    prompts (`benchmarks/studies/evaluation_check.py`) it holds a policy's difference from itself in 93 to 96 %, the
    plain percentile in 90 to 92 %, BCa in 85 to 92 %, t in 96 %. One value has no interval: its ends are NaN.
    Values that are all equal give a point.
    """
    values = values[np.isfinite(values)]
    mean = float(values.mean()) if len(values) else float("nan")
    if len(values) < 2:
        return {"mean": mean, "low": float("nan"), "high": float("nan")}
    if np.ptp(values) == 0:
        return {"mean": mean, "low": mean, "high": mean}
    found = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=_expanded(confidence, len(values)),
        n_resamples=n_resamples,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {"mean": mean, "low": float(found.low), "high": float(found.high)}


def _expanded(confidence: float, count: int) -> float:
    """The level at which a percentile interval of `count` values is as wide as a t-interval at `confidence`."""
    quantile = stats.t.ppf((1 + confidence) / 2, count - 1) * (count / (count - 1)) ** 0.5
    return float(min(1 - 2 * stats.norm.sf(quantile), 1 - 1e-12))


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of independent values, such as one a seed, with its t-interval: mean ± t · s / √n, s with n − 1.

    One value has no interval: its ends are NaN.

    Raises:
        StatisticsError: there is no value.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise StatisticsError("t_interval: found no value, allowed: at least one. Pass a number a seed")
    mean = float(values.mean())
    if len(values) == 1:
        return {"mean": mean, "low": float("nan"), "high": float("nan")}
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def share_interval(count: int, total: int, confidence: float = 0.95) -> Interval:
    """`count` out of `total` as a share, with Wilson's interval (1927), which is sensible near 0 and 1 too."""
    if total == 0:
        return dict.fromkeys(("mean", "low", "high"), float("nan"))
    found = stats.binomtest(count, total).proportion_ci(confidence, method="wilson")
    return {"mean": count / total, "low": float(found.low), "high": float(found.high)}


# --- rates ------------------------------------------------------------------------------------------------------------


def success_rate(differences: np.ndarray, confidence: float = 0.95) -> Interval:
    """Share of prompts whose mean over latents rose, with its interval and the share of ties.

    Args:
        differences: (P, K), first variant minus second; prompts without any score are left out.

    A prompt on which both are equal up to rounding is a tie, and a tie is no success.
    """
    values = _prompt_means(differences)
    values = values[np.isfinite(values)]
    ties = float(np.mean(np.abs(values) <= _TIE)) if len(values) else float("nan")
    return share_interval(int((values > _TIE).sum()), len(values), confidence) | {"ties": ties}


def win_rate(differences: np.ndarray, confidence: float = 0.95, n_resamples: int = 2000) -> Interval:
    """How often the first variant's picture beats the second's from the same latents; a tie counts half.

    Args:
        differences: (P, K), first minus second, a cell a pair of pictures. The interval resamples prompts.
    """
    won = np.where(np.abs(differences) <= _TIE, 0.5, differences > 0)
    return bootstrap_interval(_prompt_means(np.where(np.isfinite(differences), won, np.nan)), confidence, n_resamples)


def _prompt_means(cells: np.ndarray) -> np.ndarray:
    """(P,) means over the latents that could be scored, NaN where none could."""
    counts = np.isfinite(cells).sum(axis=1)
    return np.where(counts > 0, np.nansum(cells, axis=1) / np.maximum(counts, 1), np.nan)


# --- what could be detected -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VarianceParts:
    """Where the scatter of paired differences comes from.

    `prompt` is the variance of prompts' true differences, `seed` that of latents within a prompt; with one latent a
    prompt the two cannot be told apart: `seed` is None and `prompt` holds both.
    """

    prompt: float
    seed: float | None
    num_prompts: int
    seeds_per_prompt: float  # the harmonic mean where prompts have different numbers

    def standard_error(self, num_prompts: int | None = None, seeds_per_prompt: float | None = None) -> float:
        """Of the mean difference, with these numbers of prompts and latents or with others (`inf` is fine).

        Raises:
            StatisticsError: another number of latents where there was one, so that their part is not known.
        """
        if self.seed is None and seeds_per_prompt not in (None, 1):
            raise StatisticsError(
                f"seeds_per_prompt: found {seeds_per_prompt}, allowed: 1, since one image a prompt does not tell how "
                "much latents matter. Evaluate with seeds_per_prompt 2 or more"
            )
        seeds = self.seeds_per_prompt if seeds_per_prompt is None else seeds_per_prompt
        return float(((self.prompt + (self.seed or 0.0) / seeds) / (num_prompts or self.num_prompts)) ** 0.5)


def variance_parts(differences: np.ndarray) -> VarianceParts:
    """Split the variance of paired differences into prompts' and latents' parts, as one-way analysis of variance does.

    Args:
        differences: (P, K), NaN where a cell could not be scored.

    Raises:
        StatisticsError: fewer than two prompts have a score.
    """
    cells = differences[np.isfinite(differences).any(axis=1)]
    if len(cells) < 2:
        raise StatisticsError(f"prompts: found {len(cells)} with scores, allowed: at least 2, to see how they vary")
    means, counts = _prompt_means(cells), np.isfinite(cells).sum(axis=1)
    between, rest = float(means.var(ddof=1)), int((counts - 1).sum())
    seeds = float(1 / np.mean(1 / counts))
    if rest == 0:
        return VarianceParts(between, None, len(cells), seeds)
    within = float(np.nansum((cells - means[:, None]) ** 2) / rest)
    return VarianceParts(max(0.0, between - within / seeds), within, len(cells), seeds)


def detectable_difference(
    parts: VarianceParts,
    num_prompts: int | None = None,
    seeds_per_prompt: float | None = None,
    *,
    confidence: float = 0.95,
    power: float = POWER,
) -> float:
    """The smallest true mean difference that a two-sided paired test finds with this power.

    That is (t for the confidence + t for the power) · standard error, both of P − 1 degrees of freedom. For other
    numbers of prompts or latents the standard error follows from the parts. (Cohen, Statistical Power Analysis, 1988,
    ch. 2; Card et al., "With Little Power Comes Great Responsibility", EMNLP 2020.)
    """
    freedom = (num_prompts or parts.num_prompts) - 1
    factor = stats.t.ppf((1 + confidence) / 2, freedom) + stats.t.ppf(power, freedom)
    return float(factor * parts.standard_error(num_prompts, seeds_per_prompt))


# --- several training seeds -------------------------------------------------------------------------------------------


def pooled_interval(values: np.ndarray, confidence: float = 0.95) -> Interval:
    """Mean over training seeds and prompts, with an interval that holds the luck of both.

    Args:
        values: (S, P), a row a training seed, a column a prompt, the same prompts for all; without NaN.

    Seeds and prompts are crossed: each seed's policy meets each prompt. The variance of the mean is that of a two-way
    random-effects table, (MS_seeds + MS_prompts − MS_rest) / (S · P), and its t has Satterthwaite's degrees of freedom
    (Biometrics Bulletin 1946). Bouthillier et al. (MLSys 2021) and Agarwal et al. (NeurIPS 2021) say why both sources
    must be in it. Their bootstraps, which resample seeds, are too narrow for three to five seeds: a test measures it.

    Raises:
        StatisticsError: fewer than two seeds or prompts.
    """
    S, P = values.shape
    if S < 2 or P < 2:
        raise StatisticsError(f"pooling: found {S} training seeds and {P} prompts, allowed: at least 2 of each")
    mean, seeds, prompts = values.mean(), values.mean(axis=1), values.mean(axis=0)
    rest = values - seeds[:, None] - prompts + mean
    squares = [P * seeds.var(ddof=1), S * prompts.var(ddof=1), (rest**2).sum() / ((S - 1) * (P - 1))]
    total = max(squares[0] + squares[1] - squares[2], squares[0], squares[1])  # no narrower than either alone
    if total == 0:
        return {"mean": float(mean), "low": float(mean), "high": float(mean)}
    parts = zip(squares, (S - 1, P - 1, (S - 1) * (P - 1)), strict=True)
    freedom = max(total**2 / sum(square**2 / degrees for square, degrees in parts), S - 1)
    half = float(stats.t.ppf((1 + confidence) / 2, freedom) * (total / (S * P)) ** 0.5)
    return {"mean": float(mean), "low": float(mean) - half, "high": float(mean) + half}


def pool(tables: Sequence[pd.DataFrame], metrics: Sequence[str] = ("reward", "gold"), confidence: float = 0.95) -> dict:
    """Pool the evaluations of several training seeds of one setting: means and paired differences, with intervals.

    Args:
        tables: each run's `evaluation/rows.parquet`: prompt_id, user_prompt, variant, seed and metrics as columns.
        metrics: those to pool; one that a table lacks is left out.

    Returns:
        `{"training_seeds", "num_prompts", "variants": {variant: {metric: interval}}, "differences": {pair: …}}`. A
        prompt that could not be scored in some run is left out of all.

    Raises:
        StatisticsError: fewer than two tables, or tables of different prompts.
    """
    _same_prompts(tables)
    metrics = [metric for metric in metrics if all(metric in table for table in tables)]
    variants = [v for v in dict.fromkeys(tables[0]["variant"]) if all(v in set(t["variant"]) for t in tables)]
    means = [complete_cells(table)[0].groupby(["variant", "prompt_id"])[metrics].mean() for table in tables]

    def values(variant: str, metric: str) -> pd.DataFrame:
        return pd.DataFrame([one.loc[variant, metric] for one in means])  # (S, P)

    def interval(table: pd.DataFrame) -> Interval:
        return pooled_interval(table.dropna(axis="columns").to_numpy(), confidence)

    pairs = compared_pairs(variants)
    return {
        "training_seeds": len(tables),
        "num_prompts": int(tables[0]["prompt_id"].nunique()),
        "variants": {v: {m: interval(values(v, m)) for m in metrics} for v in variants},
        "differences": {f"{a}-{b}": {m: interval(values(a, m) - values(b, m)) for m in metrics} for a, b in pairs},
    }


def _same_prompts(tables: Sequence[pd.DataFrame]) -> None:
    if len(tables) < 2:
        raise StatisticsError(f"pooling: found {len(tables)} evaluation, allowed: at least 2, one a training seed")
    texts = [table.drop_duplicates("prompt_id").set_index("prompt_id")["user_prompt"] for table in tables]
    for number, text in enumerate(texts[1:], start=2):
        if text.to_dict() != texts[0].to_dict():
            raise StatisticsError(
                f"pooling: evaluation {number} has other prompts than the first ({len(text)}, {len(texts[0])}). "
                "Evaluate all with the same prompts"
            )
