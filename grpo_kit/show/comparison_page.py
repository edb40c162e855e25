"""The comparison of several runs as figures, and as one page: offline, self-contained, nothing in it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from grpo_kit.config import KitError
from grpo_kit.runs.record import RunRecord
from grpo_kit.show.comparison import (
    METRICS,
    Pool,
    against_first,
    cautions,
    curves_table,
    final_rows,
    settings_rows,
)
from grpo_kit.show.lessons.models import interval_figure
from grpo_kit.show.pages import data_uri, render
from grpo_kit.show.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    VERMILION,
    Drawing,
    metric_name,
    new_figure,
    plain_text,
    styled,
)
from grpo_kit.show.summary import interval_text

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, INK)
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "D", "^", "s", "v", "P")
TITLES = {"reward": "reward", "gold": "gold check", "kl": "KL from the initial policy"}
WINDOW = 9  # iterations of the moving average, at most
MARKS = 6  # markers along a curve


@styled
def seeds_figure(curves: pd.DataFrame) -> Drawing:
    """Draw training curves of several settings: each seed faint, a setting's mean over its seeds strong.

    Args:
        curves: a row (setting, seed, iteration) with any of the columns reward, gold and kl.

    Raises:
        KitError: there is nothing to draw, or more settings than can be told apart.
    """
    drawn = [name for name in TITLES if name in curves and curves[name].notna().any()]
    settings = list(dict.fromkeys(curves["setting"])) if drawn else []
    if not drawn or len(settings) > len(COLOURS) * len(DASHES):
        most = len(COLOURS) * len(DASHES)
        raise KitError(f"curves: found {len(settings)} settings, allowed: 1 to {most}. Compare fewer runs at a time.")
    rows = -(-len(settings) // 3)
    figure = new_figure(4.1 * len(drawn), 3.0 + 0.24 * rows)
    figure.get_layout_engine().set(w_pad=0.08)
    looks = {setting: _look(number) for number, setting in enumerate(settings)}
    for axes, name in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for setting in settings:
            _draw_setting(axes, curves[curves["setting"] == setting], name, looks[setting])
        axes.set(title=TITLES[name], xlabel="iteration")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.margins(x=0.03)
    marks = [Line2D([], [], label=plain_text(setting, 60), lw=2, ms=6, **looks[setting]) for setting in settings]
    figure.legend(handles=marks, loc="outside upper left", ncols=3 if len(drawn) > 2 else 2, frameon=False)
    return figure


def _look(number: int) -> dict[str, object]:
    dash = DASHES[(number + number // len(COLOURS)) % len(DASHES)]
    place = number % len(COLOURS)
    return {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": dash}


def _draw_setting(axes: Axes, rows: pd.DataFrame, name: str, look: Mapping[str, object]) -> None:
    """One setting: moving averages of its seeds, and their mean where every seed has that iteration."""
    wide = rows.pivot_table(index="iteration", columns="seed", values=name)
    if wide.empty:
        return
    window = max(1, min(WINDOW, len(wide) // 4))
    smooth = wide.rolling(window, min_periods=1, center=True).mean()
    if len(wide.columns) > 1:
        axes.plot(smooth.index, smooth, color=look["color"], lw=0.8, alpha=0.35)
    mean = smooth.mean(axis=1, skipna=False).dropna()
    every = max(1, len(mean) // MARKS)
    axes.plot(mean.index, mean, lw=2, ms=5, mec="white", mew=0.6, markevery=(every // 2, every), **look)


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
    header, settings = settings_rows(pools)
    context = {
        "title": f"{sum(len(pool.runs) for pool in pools)} runs of {len(pools)} settings",
        "cautions": cautions(pools),
        "settings": {"header": header, "rows": settings},
        "final": {"metrics": metrics, "pools": final},
        "against": {"first": pools[0].label, "metrics": [metric_name(m) for m in METRICS], "rows": _against(pools)},
        "charts": _charts(pools),
        "runs": [{"label": pool.label, "runs": [_run(run, path.parent) for run in pool.runs]} for pool in pools],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".writing-{path.name}")
    partial.write_text(render("comparison.html.j2", **context), encoding="utf-8", errors="replace")
    os.replace(partial, path)
    return path


def _against(pools: Sequence[Pool]) -> list[tuple[str, list[str]]]:
    found = {metric: against_first(pools, metric) for metric in METRICS}
    labels = dict.fromkeys(label for values in found.values() for label in values)
    return [
        (label, [interval_text(metric, values.get(label), signed=True) for metric, values in found.items()])
        for label in labels
    ]


def _charts(pools: Sequence[Pool]) -> dict[str, str]:
    """The figures as data URIs; an empty text where the runs have nothing to draw."""
    evaluated = any(run.results.get("variants") for pool in pools for run in pool.runs)
    curves = curves_table(pools)
    return {
        "finals": data_uri(finals_figure(pools).to_svg(), "svg+xml") if evaluated else "",
        "curves": data_uri(seeds_figure(curves).to_svg(), "svg+xml") if len(curves) else "",
    }


def _run(run: RunRecord, beside: Path) -> dict[str, str | None]:
    page = run.path.resolve() / "index.html"
    address = Path(os.path.relpath(page, beside.resolve())).as_posix()
    link = f"./{quote(address)}"  # with ./, so that no name can be read as javascript: or a host
    return {"name": plain_text(run.path.resolve().name, 100), "link": link if page.is_file() else None}
