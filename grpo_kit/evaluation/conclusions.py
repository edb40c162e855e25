"""What the rows of an evaluation show: means, paired differences, rates, strata, diversity, and what could be seen."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from grpo_kit.config import EvaluationSettings
from grpo_kit.evaluation.diversity import rewrite_diversity
from grpo_kit.evaluation.statistics import (
    POWER,
    Interval,
    bootstrap_interval,
    compared_pairs,
    complete_cells,
    detectable_difference,
    score_tables,
    success_rate,
    variance_parts,
    win_rate,
)

Scores = Mapping[str, Mapping[str, pd.DataFrame]]  # metric → variant → (P, K)


def summarize(rows: pd.DataFrame, settings: EvaluationSettings, reworded: pd.DataFrame | None = None) -> dict:
    """What the rows of an evaluation show; every interval resamples prompts.

    Args:
        rows: tidy, a row (prompt, variant, seed).
        reworded: rows of the paraphrased prompts, where they were asked.

    Returns:
        The content of `final_results.json`: means (`variants`) and paired `differences`, both again by category and
        difficulty (`strata`); `success` (share of prompts that rose; a tie is none) and `win_rate` (pairs of pictures;
        a tie counts half) of every pair and metric; the rewrites' `diversity`; the `paraphrases`; what was
        `detectable`. None stands for what could not be computed.
    """
    drawn, metrics = with_metrics(rows)
    rows, excluded = complete_cells(drawn)
    variants = list(dict.fromkeys(drawn["variant"]))
    scores, pairs = score_tables(rows, metrics, variants), compared_pairs(variants)
    by_category = rows.groupby(["category", "variant"])[metrics].mean()
    results = {
        "num_prompts": int(rows["prompt_id"].nunique()),
        "seeds_per_prompt": int(rows["seed"].nunique()),
        "excluded_cells": excluded,
        "confidence": settings.confidence,
        **_means_and_differences(scores, variants, pairs, settings),
        "by_category": {
            str(category): {v: by_category.loc[(category, v)].to_dict() for v in variants}
            for category in dict.fromkeys(rows["category"])
        },
        "strata": {name: _strata(rows, scores, name, variants, settings) for name in ("category", "difficulty")},
        **_rates(scores, pairs, settings),
        "diversity": {v: _diversity(drawn[drawn["variant"] == v]) for v in variants if v != "raw"},
        "detectable": {"power": POWER, "differences": _detectable(scores, pairs, settings)},
    }
    if reworded is not None and len(reworded):
        results["paraphrases"] = _summarize_reworded(rows, reworded, metrics, settings)
    if {"trained", "raw"} <= set(variants):
        success = results["success"]["trained-raw"]
        results["success_rate"] = {m: success[m]["mean"] for m in metrics[:2]}
    if {"trained", "raw", "oracle"} <= set(variants):
        results["gap_closed"] = {m: _gap_closed(results["variants"], m) for m in metrics[:2]}
    return _none_for_nan(results)


def _none_for_nan(data: object) -> object:
    """The same with None for what could not be computed, as it stands in the file."""
    if isinstance(data, dict):
        return {key: _none_for_nan(value) for key, value in data.items()}
    return None if isinstance(data, float) and np.isnan(data) else data


def with_metrics(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows with a plain column for each metric, and the metrics: reward, gold, then every other scored part.

    A part that is the whole reward is not listed a second time.
    """
    parts = {name: name.removeprefix("reward/") for name in rows if name.startswith("reward/")}
    others = {
        name: plain for name, plain in parts.items() if plain not in rows and not rows[name].equals(rows["reward"])
    }
    return rows.rename(columns=others), [name for name in ("reward", "gold") if name in rows] + list(others.values())


def interval(values: np.ndarray, settings: EvaluationSettings) -> Interval:
    """Mean of per-prompt values (NaN left out) and its bootstrap interval over prompts."""
    return bootstrap_interval(np.asarray(values, dtype=float), settings.confidence, settings.n_resamples)


def _means_and_differences(
    scores: Scores, variants: Sequence[str], pairs: Sequence[tuple[str, str]], settings: EvaluationSettings
) -> dict:
    """Each variant's means and each pair's differences: means over prompts of means over latents."""
    means = {m: {v: table.mean(axis=1).to_numpy() for v, table in tables.items()} for m, tables in scores.items()}
    return {
        "variants": {v: {m: interval(means[m][v], settings) for m in scores} for v in variants},
        "differences": {
            f"{a}-{b}": {m: interval(means[m][a] - means[m][b], settings) for m in scores} for a, b in pairs
        },
    }


def _strata(
    rows: pd.DataFrame, scores: Scores, column: str, variants: Sequence[str], settings: EvaluationSettings
) -> dict:
    """Means, and differences from the raw prompt, in each category (or difficulty), with its number of prompts."""
    member = rows.drop_duplicates("prompt_id").set_index("prompt_id")[column]
    pairs = [(a, b) for a, b in compared_pairs(variants) if b == "raw"]
    found = {}
    for value, ids in member.groupby(member, sort=False).groups.items():
        part = {m: {v: table.loc[ids] for v, table in tables.items()} for m, tables in scores.items()}
        found[str(value)] = {"num_prompts": len(ids), **_means_and_differences(part, variants, pairs, settings)}
    return found


def _rates(scores: Scores, pairs: Sequence[tuple[str, str]], settings: EvaluationSettings) -> dict:
    found: dict[str, dict] = {"success": {}, "win_rate": {}}
    for a, b in pairs:
        cells = {m: (tables[a] - tables[b]).to_numpy() for m, tables in scores.items()}
        found["success"][f"{a}-{b}"] = {m: success_rate(c, settings.confidence) for m, c in cells.items()}
        wins = {m: win_rate(c, settings.confidence, settings.n_resamples) for m, c in cells.items()}
        found["win_rate"][f"{a}-{b}"] = wins
    return found


def _diversity(rows: pd.DataFrame) -> dict[str, float | str]:
    texts = rows.drop_duplicates("prompt_id")
    return rewrite_diversity(list(texts["user_prompt"]), list(texts["text"]))


def _detectable(scores: Scores, pairs: Sequence[tuple[str, str]], settings: EvaluationSettings) -> dict:
    cells = {f"{a}-{b}": {m: (tables[a] - tables[b]).to_numpy() for m, tables in scores.items()} for a, b in pairs}
    return {
        pair: {m: _detectable_with(c, settings) for m, c in by_metric.items() if _scored_prompts(c) > 1}
        for pair, by_metric in cells.items()
    }


def _scored_prompts(cells: np.ndarray) -> int:
    return int(np.isfinite(cells).any(axis=1).sum())


def _detectable_with(cells: np.ndarray, settings: EvaluationSettings) -> dict[str, float | None]:
    """The smallest difference that this pair's evaluation could detect, and with other numbers of prompts or latents.

    Where a prompt has one latent, what more of them would bring is not known: None.
    """
    parts = variance_parts(cells)
    seeds, known = parts.seeds_per_prompt, parts.seed is not None

    def with_seeds(count: float) -> float | None:
        return detectable_difference(parts, None, count, confidence=settings.confidence) if known else None

    twice = detectable_difference(parts, 2 * parts.num_prompts, confidence=settings.confidence)
    return {
        "difference": detectable_difference(parts, confidence=settings.confidence),
        "standard_error": parts.standard_error(),
        "prompt_variance": parts.prompt,
        "seed_variance": parts.seed,
        "with_one_seed": with_seeds(1),
        "with_twice_the_seeds": with_seeds(2 * seeds),
        "with_endless_seeds": with_seeds(float("inf")),
        "with_twice_the_prompts": twice,
    }


def _summarize_reworded(
    rows: pd.DataFrame, reworded: pd.DataFrame, metrics: Sequence[str], settings: EvaluationSettings
) -> dict:
    """Means and differences on the paraphrases, and each variant's change from the same prompts as they were."""
    other = reworded.rename(columns={f"reward/{name}": name for name in metrics if name not in reworded})
    means = other.groupby(["variant", "prompt_id"])[list(metrics)].mean()
    variants = list(dict.fromkeys(other["variant"]))
    scores = {m: {v: means.loc[v, [m]] for v in variants} for m in metrics}
    originals = rows[rows["seed"] == 0].set_index(["variant", "prompt_id"])
    changes = {v: means.loc[v] - originals[list(metrics)].reindex(means.index).loc[v] for v in variants}
    return {
        "num_prompts": int(other["prompt_id"].nunique()),
        **_means_and_differences(scores, variants, compared_pairs(variants), settings),
        "from_originals": {
            v: {m: interval(change[m].to_numpy(), settings) for m in metrics} for v, change in changes.items()
        },
    }


def _gap_closed(variants: dict, metric: str) -> float | None:
    """How far the trained policy came on the way from raw to oracle; None where there is no way to go."""
    raw, trained, oracle = (variants[v][metric]["mean"] for v in ("raw", "trained", "oracle"))
    return (trained - raw) / (oracle - raw) if oracle > raw else None
