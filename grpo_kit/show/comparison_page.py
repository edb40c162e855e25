"""The comparison of several runs as figures, and as one page: offline, self-contained, nothing in it runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from grpo_kit.evaluation.pools import METRICS, Pool, against_first, curves_table
from grpo_kit.runs.record import RunRecord
from grpo_kit.show.comparison import cautions, final_rows, settings_rows
from grpo_kit.show.curves import seeds_figure
from grpo_kit.show.intervals import interval_figure
from grpo_kit.show.pages import figure_uri, write_page
from grpo_kit.show.style import Drawing, metric_name, plain_text
from grpo_kit.show.summary import interval_text


def finals_figure(pools: Sequence[Pool]) -> Drawing:
    """Draw each pool's trained policy on the held-out prompts with its interval, a panel a metric.

    Raises:
        KitError: no pool was evaluated.
    """
    found = {m: {pool.label: pool.final("variants", "trained", m) for pool in pools} for m in METRICS}
    panels = {
        f"{metric_name(m)}, trained policy": {"": {label: value for label, value in values.items() if value}}
        for m, values in found.items()
        if any(values.values())
    }
    return interval_figure(panels)


def write_comparison(pools: Sequence[Pool], path: Path) -> Path:
    """Write the comparison as a page, each run with a link to its own page where it has one.

    Args:
        pools: from `pool_runs`.
        path: the page's file.

    Returns:
        The path of the page.
    """
    metrics, final = final_rows(pools)
    evaluated = any(run.results.get("variants") for pool in pools for run in pool.runs)
    curves = curves_table(pools)
    header, settings = settings_rows(pools)
    context = {
        "title": f"{sum(len(pool.runs) for pool in pools)} runs of {len(pools)} settings",
        "cautions": cautions(pools),
        "settings": {"header": header, "rows": settings},
        "final": {"metrics": metrics, "pools": final},
        "against": {"first": pools[0].label, "metrics": [metric_name(m) for m in METRICS], "rows": _against(pools)},
        "charts": {
            "finals": figure_uri(finals_figure(pools)) if evaluated else "",
            "curves": figure_uri(seeds_figure(curves)) if len(curves) else "",
        },
        "runs": [{"label": pool.label, "runs": [_run(run, path.parent) for run in pool.runs]} for pool in pools],
    }
    return write_page(path, "comparison.html.j2", **context)


def _against(pools: Sequence[Pool]) -> list[tuple[str, list[str]]]:
    found = {metric: against_first(pools, metric) for metric in METRICS}
    labels = dict.fromkeys(label for values in found.values() for label in values)
    return [
        (label, [interval_text(metric, values.get(label), signed=True) for metric, values in found.items()])
        for label in labels
    ]


def _run(run: RunRecord, beside: Path) -> dict[str, str | None]:
    page = run.path.resolve() / "index.html"
    address = Path(os.path.relpath(page, beside.resolve())).as_posix()
    link = f"./{quote(address)}"  # with ./, so that no name can be read as javascript: or a host
    return {"name": plain_text(run.path.resolve().name, 100), "link": link if page.is_file() else None}
