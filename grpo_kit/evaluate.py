"""Does the trained policy help? A paired comparison on held-out prompts, on the same latents for every variant."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import stats

from grpo_kit.config import EvaluationSettings, KitError
from grpo_kit.experiment import Experiment
from grpo_kit.hardware import derive_seed
from grpo_kit.prompts import Prompt
from grpo_kit.rollout import picture_prompts
from grpo_kit.runs.folder import RunFolder

VARIANTS = ("raw", "initial", "trained", "oracle")
_PAIRS = (("trained", "raw"), ("trained", "initial"), ("initial", "raw"), ("oracle", "raw"), ("oracle", "trained"))
ImageKey = tuple[int, str, int]  # (prompt_id, variant, seed's number)


@dataclass(frozen=True)
class EvalResult:
    """A tidy row for every (prompt, variant, seed), what was concluded from them, and the pictures."""

    rows: pd.DataFrame
    results: dict
    images: Mapping[ImageKey, Image.Image]


def evaluate(
    kit: Experiment,
    prompts: Sequence[Prompt] | None = None,
    compare: Sequence[str] = ("raw", "initial", "trained"),
    *,
    run_dir: Path | str | None = None,
    seeds_per_prompt: int | None = None,
) -> EvalResult:
    """Draw every prompt in every variant from the same latents, score it, and compare with bootstrap intervals.

    Args:
        prompts: held-out prompts; by default those of the config that validation during training did not look at.
        compare: of "raw" (the user's prompt as it is), "initial" and "trained" (the policy before and after), "oracle"
            (the best prompt there is, in worlds that know it).
        run_dir: where to write `final_results.json` and `evaluation/`; None writes nothing.
        seeds_per_prompt: latents per prompt; by default as in the config.

    Raises:
        KitError: an unknown variant, fewer than two prompts, or an oracle where there is none.
    """
    settings = kit.config.evaluation_settings
    prompts = test_prompts(kit) if prompts is None else list(prompts)
    if len(prompts) < 2:
        raise KitError(f"prompts: found {len(prompts)}, allowed: at least 2, since intervals are taken over prompts")
    count = seeds_per_prompt or settings.seeds_per_prompt
    rows, images = [], {}
    for variant in compare:
        texts = rewrites(kit, prompts, variant)
        scored, drawn = _draw_and_score(kit, prompts, texts, variant, count)
        rows += scored
        images |= drawn
    frame = pd.DataFrame(rows)
    results = summarize(frame, settings)
    if run_dir is not None:
        _write(RunFolder(Path(run_dir)), frame, images, results)
    return EvalResult(frame, results, images)


def rewrites(kit: Experiment, prompts: Sequence[Prompt], variant: str) -> list[str]:
    """What the generator gets for each prompt in a variant."""
    texts = [prompt.user_prompt for prompt in prompts]
    if variant == "raw":
        return texts
    if variant == "oracle":
        return _oracle(kit, texts)
    if variant not in VARIANTS:
        raise KitError(f"compare: found {variant!r}, allowed: {', '.join(VARIANTS)}")
    seed = derive_seed(kit.config.training_settings.seed, "evaluation")
    seen = picture_prompts(kit.generator, texts, seed) if kit.config.model_settings.use_image else None
    return list(kit.policy.enhance_prompts(texts, seen, reference=variant == "initial"))


def _oracle(kit: Experiment, texts: list[str]) -> list[str]:
    if kit.config.evaluation_settings.gold is None:
        raise KitError("compare: found 'oracle', which only the embedded world has; leave it out")
    from grpo_kit.rewards.shapeworld import best_prompt

    best = [best_prompt(text) for text in texts]
    if None in best:
        raise KitError(f"prompt {texts[best.index(None)]!r}: outside the embedded world's grammar, so it has no oracle")
    return best


def test_prompts(kit: Experiment) -> list[Prompt]:
    """The held-out prompts for the final comparison: those that the periodic validation leaves."""
    settings = kit.config.evaluation_settings
    rest = kit.val_prompts[settings.validation_prompts :] or kit.val_prompts
    return rest[: settings.num_prompts]


def validate(kit: Experiment, iteration: int, folder: RunFolder) -> dict:
    """The quick look during training: greedy rewrites of the first held-out prompts, one picture each."""
    prompts = kit.val_prompts[: kit.config.evaluation_settings.validation_prompts]
    scored, images = _draw_and_score(kit, prompts, rewrites(kit, prompts, "trained"), "trained", 1)
    frame = pd.DataFrame(scored)
    names = [column.removeprefix("reward/") for column in frame if column.startswith("reward/")]
    samples = [
        {
            "user_prompt": row["user_prompt"],
            "category": row["category"],
            "difficulty": row["difficulty"],
            "enhanced_prompt": row["text"],
            "reward": row["reward"],
            "rewards": {name: row[f"reward/{name}"] for name in names},
            "thumbnail": folder.save_thumbnail(image, f"validation_{iteration:06d}_{number:03d}"),
        }
        for number, (row, image) in enumerate(zip(scored, images.values(), strict=True))
    ]
    result = {
        "iteration": iteration,
        "num_prompts": len(prompts),
        "reward": float(frame["reward"].mean()),
        "rewards": {name: float(frame[f"reward/{name}"].mean()) for name in names},
        "samples": samples,
    }
    folder.write_json(f"validation_iter_{iteration:06d}.json", result)
    return result


def _draw_and_score(
    kit: Experiment, prompts: Sequence[Prompt], texts: Sequence[str], variant: str, count: int
) -> tuple[list[dict], dict[ImageKey, Image.Image]]:
    """Rows and pictures of one variant; a prompt's latents depend on its text and place alone, not on the variant."""
    cells = [(i, seed) for i in range(len(prompts)) for seed in range(count)]
    run_seed = kit.config.training_settings.seed
    latents = [derive_seed(run_seed, "evaluation", prompts[i].user_prompt, i, seed) for i, seed in cells]
    drawn = kit.generator.generate_images([texts[i] for i, _ in cells], latents)
    asked, written = [prompts[i].user_prompt for i, _ in cells], [texts[i] for i, _ in cells]
    parts = kit.rewards.score(drawn, asked, written)
    totals = kit.rewards.total(parts)
    rows = [
        {
            "prompt_id": i,
            "user_prompt": prompts[i].user_prompt,
            "category": prompts[i].category,
            "difficulty": prompts[i].difficulty,
            "variant": variant,
            "seed": seed,
            "text": str(texts[i]),
            "reward": float(totals[cell]),
            **{f"reward/{name}": float(values[cell]) for name, values in parts.items()},
            **({"gold": float(parts["gold"][cell])} if "gold" in parts else {}),
        }
        for cell, (i, seed) in enumerate(cells)
    ]
    return rows, {(i, variant, seed): image for (i, seed), image in zip(cells, drawn, strict=True)}


# --- statistics ------------------------------------------------------------------------------------------------------


def summarize(rows: pd.DataFrame, settings: EvaluationSettings) -> dict:
    """Means, paired differences and success rates with intervals; the bootstrap resamples prompts."""
    metrics = [name for name in ("reward", "gold") if name in rows]
    monitors = [name for name in ("keeps_objects", "grammatical") if f"reward/{name}" in rows]
    rows, excluded = _complete_cells(rows.rename(columns={f"reward/{name}": name for name in monitors}))
    metrics += monitors
    variants = list(dict.fromkeys(rows["variant"]))
    by_prompt = rows.groupby(["variant", "prompt_id"])[metrics].mean()

    def values(variant: str, metric: str) -> np.ndarray:
        return by_prompt.loc[variant, metric].to_numpy()

    pairs = [(a, b) for a, b in _PAIRS if a in variants and b in variants]
    by_category = rows.groupby(["category", "variant"])[metrics].mean()
    results = {
        "num_prompts": int(rows["prompt_id"].nunique()),
        "seeds_per_prompt": int(rows["seed"].nunique()),
        "excluded_cells": excluded,
        "confidence": settings.confidence,
        "variants": {v: {m: interval(values(v, m), settings) for m in metrics} for v in variants},
        "differences": {
            f"{a}-{b}": {m: interval(values(a, m) - values(b, m), settings) for m in metrics} for a, b in pairs
        },
        "by_category": {
            str(category): {v: by_category.loc[(category, v)].to_dict() for v in variants}
            for category in dict.fromkeys(rows["category"])
        },
    }
    if {"trained", "raw"} <= set(variants):
        results["success_rate"] = {m: float((values("trained", m) > values("raw", m)).mean()) for m in metrics[:2]}
    if {"trained", "raw", "oracle"} <= set(variants):
        results["gap_closed"] = {m: _gap_closed(results["variants"], m) for m in metrics[:2]}
    return results


def _complete_cells(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Leave out (and count) the (prompt, seed) cells in which a variant could not be scored: pairs must stay pairs."""
    failed = rows.loc[rows["reward"].isna(), ["prompt_id", "seed"]].drop_duplicates()
    if failed.empty:
        return rows, 0
    kept = rows.merge(failed, on=["prompt_id", "seed"], how="left", indicator=True)["_merge"] == "left_only"
    return rows[kept.to_numpy()], len(failed)


def interval(values: np.ndarray, settings: EvaluationSettings) -> dict[str, float]:
    """Mean of per-prompt values (NaN left out) and its percentile bootstrap interval over prompts."""
    values = values[np.isfinite(values)]
    mean = float(values.mean()) if len(values) else float("nan")
    if len(values) < 2 or np.ptp(values) == 0:
        return {"mean": mean, "low": mean, "high": mean}
    found = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=settings.confidence,
        n_resamples=settings.n_resamples,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {"mean": mean, "low": float(found.low), "high": float(found.high)}


def _gap_closed(variants: dict, metric: str) -> float | None:
    """How far the trained policy came on the way from raw to oracle; None where there is no way to go."""
    raw, trained, oracle = (variants[v][metric]["mean"] for v in ("raw", "trained", "oracle"))
    return (trained - raw) / (oracle - raw) if oracle > raw else None


def _write(folder: RunFolder, rows: pd.DataFrame, images: Mapping[ImageKey, Image.Image], results: dict) -> None:
    keys = zip(rows["prompt_id"], rows["variant"], rows["seed"], strict=True)
    names = [folder.save_thumbnail(images[key], "evaluation_{}_{}_{}".format(*key)) for key in keys]
    (folder.path / "evaluation").mkdir(parents=True, exist_ok=True)
    rows.assign(thumbnail=names).to_parquet(folder.path / "evaluation" / "rows.parquet", index=False)
    folder.write_json("final_results.json", results)
