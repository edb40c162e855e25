"""Write a run as one page that a person can open, project or send: offline, self-contained, nothing in it runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from grpo_kit.config import KitError
from grpo_kit.runs.record import RunRecord, read_run
from grpo_kit.show.loop import loop_figure
from grpo_kit.show.pages import NotebookPage, data_uri, image_uri, render, write_notebook_pages
from grpo_kit.show.plots import CURVES, category_plot, comparison_plot, training_curves
from grpo_kit.show.style import VARIANT_NAMES, VARIANTS, Drawing, format_metric, score_text
from grpo_kit.show.summary import (
    FALLS,
    RISES,
    Case,
    branch_text,
    category_rows,
    comparison_rows,
    comparison_table,
    direction,
    headline,
    interval_text,
    paragraph,
    representative_cases,
    training_minutes,
    worst_cases,
)

__all__ = ["comparison_table", "write_report"]

CASES, LOSSES, GROUP_ITERATIONS = 8, 3, 2
SMOOTH_FROM = 128  # pixels across
BAR_WIDTH = 160  # pixels of the longest bar in the table of minutes


def write_report(run_dir: Path) -> Path:
    """Write `index.html` into a run folder, and each of its executed notebooks as a page beside the notebook.

    What the run does not hold yet is left out of the page.

    Args:
        run_dir: the folder of a run.

    Returns:
        The path of the page.

    Raises:
        RecordError: there is no such run, or one of its files is damaged.
    """
    record = read_run(run_dir)
    notebooks = write_notebook_pages(record.path / "notebooks")
    page = render("report.html.j2", **_context(record, notebooks))
    path = record.path / "index.html"
    partial = path.with_suffix(".html.part")
    partial.write_text(page, encoding="utf-8", errors="replace")
    os.replace(partial, path)
    return path


def _context(record: RunRecord, notebooks: Sequence[NotebookPage]) -> dict[str, object]:
    metrics, rows = comparison_rows(record.results)
    header, categories = category_rows(record)
    return {
        "name": record.path.resolve().name,
        "profile": record.config.get("profile"),
        "origin": _origin(record.branch),
        "headline": headline(record.results),
        "paragraph": paragraph(record),
        "warning": _warning(record),
        "tiles": _tiles(record.results),
        "charts": _charts(record),
        "curve_names": ", ".join(CURVES[name][0] for name in CURVES if name in record.metrics),
        "confidence": f"{100 * record.results.get('confidence', 0.95):.0f} %",
        "comparison": {"metrics": metrics, "rows": rows},
        "pixelated": _are_small(record),
        "cases": [_case(record, case) for case in representative_cases(record.evaluation, CASES)],
        "losses": [_case(record, case) for case in worst_cases(record.evaluation, LOSSES)],
        "groups": _groups(record),
        "categories": {"header": header, "rows": categories},
        "minutes": _minutes(record, notebooks),
        "notebooks": notebooks,
        "config": json.dumps(record.config, indent=2, ensure_ascii=False) if record.config else "",
    }


def _origin(branch: Mapping) -> str:
    """Return where a branch comes from; an empty text of a run that is none."""
    return f"branch of {branch.get('parent')}, {branch_text(branch)}" if branch else ""


def _warning(record: RunRecord) -> str:
    """Return a caution where the sentinel or the evaluation asks for one."""
    results, divergence = record.results, record.sentinel.get("divergence")
    if divergence:
        return f"The sentinel, {divergence['text']}. Look at the gallery before you believe the reward."
    change = results.get("differences", {}).get("trained-raw", {})
    if direction(change.get("reward")) == RISES and direction(change.get("gold")) == FALLS:
        return "The reward and the truth part ways: look at the gallery before you believe the reward."
    kept = results.get("differences", {}).get("trained-initial", {}).get("keeps_objects")
    if direction(kept) == FALLS:
        return "The trained policy keeps the user's objects less often than the initial one did: read its rewrites."
    return ""


def _tiles(results: Mapping) -> list[dict[str, str]]:
    change = results.get("differences", {}).get("trained-raw", {})
    labels = {"reward": "reward over the raw prompt", "gold": "points in the gold check over the raw prompt"}
    tiles = []
    for metric in [m for m in labels if m in change]:
        value = format_metric(metric, change[metric]["mean"], signed=True)
        interval = interval_text(metric, change[metric], signed=True).split(" ", 1)[1]
        tiles.append({"value": value, "label": f"{labels[metric]} {interval}"})
    for key, label in (
        ("gap_closed", "of the way from the raw prompt to the oracle (gold check)"),
        ("success_rate", "of the prompts have a better gold check than before"),
    ):
        value = results.get(key, {}).get("gold")
        if value is not None and value == value:
            tiles.append({"value": f"{100 * value:.0f} %".replace("-", "−"), "label": label})
    return tiles


def _charts(record: RunRecord) -> dict[str, str]:
    """Return each figure as a data URI; an empty text where the run has nothing to draw yet."""
    return {
        "loop": data_uri(loop_figure().to_svg(), "svg+xml"),
        "comparison": _chart(lambda: comparison_plot(record.results)),
        "categories": _chart(lambda: category_plot(record.results)),
        "curves": _chart(lambda: training_curves(record.metrics, record.validations, sentinel=record.sentinel)),
    }


def _chart(draw: Callable[[], Drawing]) -> str:
    try:
        return data_uri(draw().to_svg(), "svg+xml")
    except KitError:  # the plots say so where a run holds nothing for them
        return ""


def _case(record: RunRecord, case: Case) -> dict[str, object]:
    """Return one row of the gallery: a prompt and a seed, a picture a variant."""
    prompt_id, seed = case
    rows = record.evaluation
    rows = rows[(rows["prompt_id"] == prompt_id) & (rows["seed"] == seed)].set_index("variant")
    pictures = [_picture(record, v, rows.loc[v]) for v in VARIANTS if v in rows.index]
    first = rows.iloc[0]
    return {"prompt": first["user_prompt"], "category": first["category"], "seed": seed, "pictures": pictures}


def _picture(record: RunRecord, variant: str, row: pd.Series) -> dict[str, str | None]:
    address = _thumbnail(record, row.get("thumbnail"))
    return {
        "variant": variant,
        "name": VARIANT_NAMES[variant],
        "text": row["text"],
        "scores": score_text(row),
        "address": address,
    }


def _thumbnail(record: RunRecord, name: object) -> str | None:
    return image_uri(record.file(name)) if isinstance(name, str) and name else None


def _are_small(record: RunRecord) -> bool:
    """Say whether the run's pictures have so few pixels that enlarging must not smooth them."""
    first = next(iter(sorted(record.path.glob("thumbnails/*"))), None)
    return first is not None and record.image(f"thumbnails/{first.name}").width < SMOOTH_FROM


def _groups(record: RunRecord) -> list[dict[str, object]]:
    """Return the group with the widest spread of the first and of the last kept iteration."""
    kept = record.rollout_iterations
    return [_group(record, iteration) for iteration in dict.fromkeys(kept[:1] + kept[1:][-1:])][:GROUP_ITERATIONS]


def _group(record: RunRecord, iteration: int) -> dict[str, object]:
    group = record.widest_group(iteration)
    samples = [_sample(record, row) for _, row in group.iterrows()]
    return {"iteration": iteration, "prompt": group["user_prompt"].iloc[0], "samples": samples}


def _sample(record: RunRecord, row: pd.Series) -> dict[str, str | None]:
    advantage = f"{row['advantage']:+.2f}".replace("-", "−")
    return {
        "side": "above" if row["advantage"] > 0 else "below" if row["advantage"] < 0 else "",
        "address": _thumbnail(record, row.get("thumbnail")),
        "text": row["enhanced_prompt"],
        "scores": f"{format_metric('reward', row['reward'])} · {advantage}",
    }


def _minutes(record: RunRecord, notebooks: Sequence[NotebookPage]) -> dict[str, list[dict[str, object]]]:
    """Return tables of minutes: by notebook, by stage of the run, by part of a training iteration."""
    tables = {
        "by notebook": {page.title: page.minutes for page in notebooks if page.minutes is not None},
        "by stage": record.results.get("minutes", {}),
        "training, by part of an iteration": training_minutes(record.metrics),
    }
    return {heading: _bars(values) for heading, values in tables.items() if values}


def _bars(values: Mapping[str, float]) -> list[dict[str, object]]:
    longest = max(values.values()) or 1.0
    return [{"name": n, "minutes": m, "width": max(1, round(BAR_WIDTH * m / longest))} for n, m in values.items()]
