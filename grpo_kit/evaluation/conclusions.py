"""What the rows of an evaluation show: means, paired differences, rates, strata, diversity, and what is detectable."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd

from grpo_kit.config import EvaluationSettings
from grpo_kit.evaluation.diversity import rewrite_diversity
from grpo_kit.evaluation.intervals import Interval, interval, success_rate, win_rate
from grpo_kit.evaluation.power import POWER, detectable
from grpo_kit.evaluation.table import compared_pairs, complete_cells, score_tables

Pairs = Sequence[tuple[str, str]]


def summarize(rows: pd.DataFrame, settings: EvaluationSettings, reworded: pd.DataFrame | None = None) -> dict:
    """What the rows of an evaluation show; every interval resamples prompts.

    Args:
        rows: tidy, a row (prompt, variant, seed).
        reworded: rows of the paraphrased prompts, where there are any.

    Returns:
        The content of `final_results.json`: means (`variants`) and paired `differences`, both again by category and
        difficulty (`strata`); `success` (share of prompts that rose; a tie is none) and `win_rate` (pairs of pictures;
        a tie counts half) of every pair and metric; the rewrites' `diversity`; the `paraphrases`; what was
        `detectable`. None stands for what could not be computed.
    """
    drawn, metrics = with_metrics(rows)
    rows, excluded = complete_cells(drawn)
    variants = list(dict.fromkeys(drawn["variant"]))
    pairs, confidence = compared_pairs(variants), settings.confidence
    of_pairs = partial(_of_pairs, score_tables(rows, metrics, variants), pairs)
    by_category = rows.groupby(["category", "variant"])[metrics].mean()
    compare = partial(_means_and_differences, metrics=metrics, variants=variants, settings=settings)
    from_raw = [(a, b) for a, b in pairs if b == "raw"]
    results = {
        "num_prompts": int(rows["prompt_id"].nunique()),
        "seeds_per_prompt": int(rows["seed"].nunique()),
        "excluded_cells": excluded,
        "confidence": confidence,
        **compare(rows, pairs=pairs),
        "by_category": {
            str(category): {v: by_category.loc[(category, v)].to_dict() for v in variants}
            for category in dict.fromkeys(rows["category"])
        },
        "strata": {
            name: {
                str(value): {"num_prompts": int(part["prompt_id"].nunique()), **compare(part, pairs=from_raw)}
                for value, part in rows.groupby(name, sort=False)
            }
            for name in ("category", "difficulty")
        },
        "success": of_pairs(lambda cells: success_rate(cells, confidence)),
        "win_rate": of_pairs(lambda cells: win_rate(cells, confidence, settings.n_resamples)),
        "diversity": {
            v: rewrite_diversity(list(texts["user_prompt"]), list(texts["text"]))
            for v, texts in drawn.drop_duplicates(["variant", "prompt_id"]).groupby("variant", sort=False)
            if v != "raw"
        },
        "detectable": {"power": POWER, "differences": of_pairs(lambda cells: detectable(cells, confidence))},
    }
    if reworded is not None and len(reworded):
        results["paraphrases"] = _summarize_reworded(rows, reworded, metrics, settings)
    if {"trained", "raw"} <= set(variants):
        results["success_rate"] = {m: results["success"]["trained-raw"][m].mean for m in metrics[:2]}
    if {"trained", "raw", "oracle"} <= set(variants):
        results["gap_closed"] = {}
        for m in metrics[:2]:
            raw, trained, oracle = (results["variants"][v][m].mean for v in ("raw", "trained", "oracle"))
            results["gap_closed"][m] = (trained - raw) / (oracle - raw) if oracle > raw else None
    return _as_in_file(results)


def _as_in_file(data: object) -> object:
    """The same as JSON holds it: intervals as dicts, None for what could not be computed."""
    if isinstance(data, Interval):
        data = data.to_dict()
    if isinstance(data, dict):
        return {key: _as_in_file(value) for key, value in data.items()}
    return None if isinstance(data, float) and np.isnan(data) else data


def with_metrics(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows with a plain column for each metric, and the metrics: reward, gold, then every other scored part.

    A part that is the whole reward is not listed a second time.
    """
    parts = {name: name.removeprefix("reward/") for name in rows if name.startswith("reward/")}
    parts = {name: plain for name, plain in parts.items() if not rows[name].equals(rows["reward"])}
    others = {name: plain for name, plain in parts.items() if plain not in rows}
    return rows.rename(columns=others), [name for name in ("reward", "gold") if name in rows] + list(others.values())


def _means_and_differences(
    rows: pd.DataFrame, metrics: Sequence[str], variants: Sequence[str], pairs: Pairs, settings: EvaluationSettings
) -> dict[str, dict]:
    """Each variant's means and each pair's differences: means over prompts of means over latents."""
    means = rows.groupby(["prompt_id", "variant"])[list(metrics)].mean().unstack("variant")
    means = means.reindex(columns=pd.MultiIndex.from_product([metrics, variants]))
    return {
        "variants": {v: {m: interval(means[m, v], settings) for m in metrics} for v in variants},
        "differences": {
            f"{a}-{b}": {m: interval(means[m, a] - means[m, b], settings) for m in metrics} for a, b in pairs
        },
    }


def _of_pairs(
    scores: Mapping[str, Mapping[str, pd.DataFrame]], pairs: Pairs, statistic: Callable[[np.ndarray], object]
) -> dict[str, dict]:
    """Pair → metric → a statistic of its (P, K) differences, where there is one."""
    found = {
        f"{a}-{b}": {m: statistic((tables[a] - tables[b]).to_numpy()) for m, tables in scores.items()} for a, b in pairs
    }
    return {pair: {m: value for m, value in values.items() if value is not None} for pair, values in found.items()}


def _summarize_reworded(
    rows: pd.DataFrame, reworded: pd.DataFrame, metrics: Sequence[str], settings: EvaluationSettings
) -> dict:
    """Means and differences on the paraphrases, and each variant's change from the same prompts as they were."""
    other = reworded.rename(columns={f"reward/{name}": name for name in metrics if name not in reworded})
    means = other.groupby(["variant", "prompt_id"])[list(metrics)].mean()
    variants = list(dict.fromkeys(other["variant"]))
    originals = rows[rows["seed"] == 0].set_index(["variant", "prompt_id"])[list(metrics)]
    changes = means - originals.reindex(means.index)
    return {
        "num_prompts": int(other["prompt_id"].nunique()),
        **_means_and_differences(other, metrics, variants, compared_pairs(variants), settings),
        "from_originals": {v: {m: interval(changes.loc[v][m], settings) for m in metrics} for v in variants},
    }
