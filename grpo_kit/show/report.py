"""Write a run as one page that a person can open, project or send: offline, self-contained, nothing in it runs."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from grpo_kit.config import KitError
from grpo_kit.evaluation.table import VARIANT_NAMES, VARIANTS, format_metric, number_text, percent
from grpo_kit.runs.record import RunRecord, read_run
from grpo_kit.show import summary
from grpo_kit.show.curves import CURVES, training_curves
from grpo_kit.show.images import SMOOTH_FROM
from grpo_kit.show.intervals import category_plot, comparison_plot
from grpo_kit.show.loop import loop_figure
from grpo_kit.show.pages import NotebookPage, figure_uri, image_uri, write_notebook_pages, write_page
from grpo_kit.show.style import Drawing, score_text

CASES, LOSSES = 8, 3


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
    return write_page(record.path / "index.html", "report.html.j2", **_context(record, notebooks))


def _context(record: RunRecord, notebooks: Sequence[NotebookPage]) -> dict[str, object]:
    results, branch, kept = record.results, record.branch, record.rollout_iterations
    metrics, rows = summary.comparison_rows(results)
    header, categories = summary.category_rows(record)
    first = next(iter(sorted(record.path.glob("thumbnails/*"))), None)
    return {
        "name": record.path.resolve().name,
        "profile": record.config.get("profile"),
        "origin": f"branch of {branch.get('parent')}, {record.branch_text()}" if branch else "",
        "headline": summary.headline(results),
        "paragraph": summary.paragraph(record),
        "warning": _warning(record),
        "tiles": _tiles(results),
        "charts": {
            "loop": figure_uri(loop_figure()),
            "comparison": _chart(lambda: comparison_plot(results)),
            "categories": _chart(lambda: category_plot(results)),
            "curves": _chart(lambda: training_curves(record.metrics, record.validations, sentinel=record.sentinel)),
        },
        "curve_names": ", ".join(CURVES[name][0] for name in CURVES if name in record.metrics),
        "confidence": percent(results.get("confidence", 0.95)),
        "comparison": {"metrics": metrics, "rows": rows},
        "pixelated": first is not None and record.image(f"thumbnails/{first.name}").width < SMOOTH_FROM,
        "cases": [_case(record, case) for case in summary.representative_cases(record.evaluation, CASES)],
        "losses": [_case(record, case) for case in summary.worst_cases(record.evaluation, LOSSES)],
        "groups": {iteration: _group(record, iteration) for iteration in kept[:1] + kept[-1:]},
        "categories": {"header": header, "rows": categories},
        "minutes": _minutes(record, notebooks),
        "notebooks": notebooks,
        "config": json.dumps(record.config, indent=2, ensure_ascii=False) if record.config else "",
    }


def _warning(record: RunRecord) -> str:
    """Return a caution where training or the evaluation gives reason to doubt the reward; else an empty text."""
    differences, divergence = record.results.get("differences", {}), record.sentinel.get("divergence")
    if divergence:
        return f"The sentinel, {divergence['text']}. Look at the gallery before you believe the reward."
    change = differences.get("trained-raw", {})
    if [summary.direction(change.get(m)) for m in ("reward", "gold")] == [summary.RISES, summary.FALLS]:
        return "The reward and the truth part ways: look at the gallery before you believe the reward."
    if summary.direction(differences.get("trained-initial", {}).get("keeps_objects")) == summary.FALLS:
        return "The trained policy keeps the user's objects less often than the initial one did: read its rewrites."
    return ""


def _tiles(results: Mapping) -> list[dict[str, str]]:
    change = results.get("differences", {}).get("trained-raw", {})
    changes = {"reward": "reward over the raw prompt", "gold": "points in the gold check over the raw prompt"}
    shares = {
        "gap_closed": "of the way from the raw prompt to the oracle (gold check)",
        "success_rate": "of the prompts have a better gold check than before",
    }
    texts = [
        (*summary.interval_text(m, change[m], signed=True).split(" ", 1), changes[m]) for m in changes if m in change
    ]
    found = [(percent(results.get(key, {}).get("gold")), words) for key, words in shares.items()]
    return [
        *({"value": value, "label": f"{words} {interval}"} for value, interval, words in texts),
        *({"value": value, "label": words} for value, words in found if value != "–"),
    ]


def _chart(draw: Callable[[], Drawing]) -> str:
    """Return a figure as a data URI; an empty text where the run holds nothing for it yet."""
    try:
        return figure_uri(draw())
    except KitError:
        return ""


def _case(record: RunRecord, case: summary.Case) -> list[dict[str, object]]:
    """Return one row of the gallery: what a prompt and a seed gave, a picture a variant."""
    rows = record.evaluation
    rows = rows[(rows["prompt_id"] == case[0]) & (rows["seed"] == case[1])].set_index("variant", drop=False)
    shown = [rows.loc[variant] for variant in VARIANTS if variant in rows.index]
    return [
        {**row, "name": VARIANT_NAMES[row["variant"]], "scores": score_text(row), "address": _thumbnail(record, row)}
        for row in shown
    ]


def _group(record: RunRecord, iteration: int) -> list[dict[str, object]]:
    """Return the group of an iteration whose rewards differ most, best sample first."""
    return [
        {
            **row,
            "scores": f"{format_metric('reward', row['reward'])} · {number_text(row['advantage'], '+.2f')}",
            "address": _thumbnail(record, row),
        }
        for _, row in record.widest_group(iteration).iterrows()
    ]


def _thumbnail(record: RunRecord, row: pd.Series) -> str | None:
    name = row.get("thumbnail")
    return image_uri(record.file(name)) if isinstance(name, str) and name else None


def _minutes(record: RunRecord, notebooks: Sequence[NotebookPage]) -> dict[str, dict[str, float]]:
    """Return tables of minutes: by notebook, by stage of the run, by part of a training iteration."""
    parts = [name for name in record.metrics if name.startswith("time/")]
    tables = {
        "by notebook": {page.title: page.minutes for page in notebooks if page.minutes is not None},
        "by stage": record.results.get("minutes", {}),
        "training, by part of an iteration": {
            name.removeprefix("time/"): float(record.metrics[name].sum()) / 60 for name in parts
        },
    }
    return {heading: values for heading, values in tables.items() if values}
