"""Figures with a row for each thing that is measured: means with their intervals, differences, categories."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from grpo_kit.config import KitError
from grpo_kit.evaluation import table
from grpo_kit.evaluation.table import Interval, format_metric, metric_name, number_text
from grpo_kit.show import style

Panels = Mapping[str, Mapping[str, Mapping[str, Interval]]]  # panel → series → row → interval
MOST_IN_A_ROW = 4  # series


def draw_interval(axes: Axes, y: float, interval: Interval | None, color: str, marker: str, text: str = "") -> None:
    """Draw a mean with its interval at the height `y`, `text` above it; nothing where there is no mean."""
    if interval is None or interval["mean"] is None or np.isnan(interval["mean"]):
        return
    axes.plot([interval["low"], interval["high"]], [y, y], color=color, lw=3.2, alpha=0.5, solid_capstyle="butt")
    axes.plot(interval["mean"], y, ls="", marker=marker, color=color, ms=8 if text else 6.5, mec="white", mew=0.9)
    style.label(axes, text, (interval["mean"], y), (0, 7), ha="center", fontsize=9.5)


def name_rows(axes: Axes, names: Sequence[str], width: int = 40, lines: int = 1, metric: str = "") -> None:
    """Write the names of a panel's rows, the first one on top, and keep only the grid for the values.

    Row `i` is drawn at the height `i`; its name is broken to `lines` lines of at most `width` characters. Where the
    values measure a `metric` that is a share, their scale is in per cent.
    """
    axes.set_yticks(range(len(names)), [style.wrap(name, width, lines) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.8)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.1)
    if metric in table.SHARES:
        axes.xaxis.set_major_formatter(lambda value, _: number_text(100 * value, ".0f"))


@style.styled
def interval_figure(panels: Panels, zero_line: bool = False) -> style.Drawing:
    """Draw means with their intervals, a row a thing: panels stand side by side, several series share each row.

    `panels` is title → series → row → {"mean", "low", "high"}; none, or more than 4 series, is a `KitError`. The rows
    are those of the first panel and stand in its order, from the top; a series named "" has no entry in the key.
    `zero_line` marks 0, for differences.
    """
    first = next(iter(panels.values()), {})
    rows = list(dict.fromkeys(row for intervals in first.values() for row in intervals))
    if not rows or len(first) > MOST_IN_A_ROW:
        found, allowed = f"{len(rows)} rows in {len(first)} series", f"at least 1 row, at most {MOST_IN_A_ROW} series"
        raise KitError(f"interval_figure: found {found}, allowed: {allowed}. Pass {{title: {{series: {{row: …}}}}}}.")
    looks = [style.series_look(number) | {"linestyle": ""} for number in range(len(first))]
    named = {series: look for series, look in zip(first, looks, strict=True) if series}
    figure = style.new_figure(1.4 + 4.1 * len(panels), 0.75 + 0.3 * len(rows) + 0.3 * bool(named))
    for axes, (title, series) in zip(style.panel_grid(figure, len(panels), sharey=True), panels.items(), strict=True):
        if zero_line:
            axes.axvline(0, color=style.INK, lw=1)
        shifts = np.linspace(-0.17, 0.17, len(series)) if len(series) > 1 else [0.0]  # so that none hides another
        for shift, look, intervals in zip(shifts, looks, series.values(), strict=False):
            for y, row in enumerate(rows):
                draw_interval(axes, y + shift, intervals.get(row), look["color"], look["marker"])
        axes.set_title(style.plain_text(metric_name(title), 60))
        name_rows(axes, rows)
    if named:
        style.legend_above(figure, named, len(named))
    return figure


@style.styled
def comparison_plot(results: Mapping) -> style.Drawing:
    """Draw each variant's mean with its interval, and below it the paired differences against zero.

    A `KitError` where final_results.json holds neither reward nor gold check.
    """
    found, changes = results.get("variants", {}), results.get("differences", {})
    measured = [m for m in table.MAIN if any(m in values for values in found.values())]
    if not measured:
        raise KitError(f"comparison_plot: found no results for {' or '.join(table.MAIN)}. Run the evaluation first.")
    blocks = [{v: found[v] for v in dict.fromkeys((*table.VARIANTS, *found)) if v in found}]  # saved runs come last
    blocks += [changes] if changes else []
    figure = style.new_figure(5.4 * len(measured), 1.9 + 0.42 * sum(map(len, blocks)))
    heights = [len(block) + 0.5 for block in blocks]
    grid = figure.subplots(len(blocks), len(measured), squeeze=False, height_ratios=heights, sharey="row")
    for block, panels in zip(blocks, grid, strict=True):
        paired = block is changes
        title = "paired difference (0: no change)" if paired else "{}, mean over prompts"
        names = [name.replace("-", " − ") if paired else table.VARIANT_NAMES.get(name, name) for name in block]
        for axes, metric in zip(panels, measured, strict=True):
            axes.set_title(title.format(metric_name(metric)))
            if paired:
                axes.axvline(0, color=style.INK, lw=1)
            for y, (name, intervals) in enumerate(block.items()):
                value, look = intervals.get(metric), style.variant_look(name.split("-")[0] if paired else name)
                text = format_metric(metric, value["mean"], signed=paired) if value else ""
                draw_interval(axes, y, value, **look, text=text)
            name_rows(axes, names, metric=metric)
    return figure


@style.styled
def looks_plot(results: Mapping) -> style.Drawing:
    """Draw what a second turn brings after each way of looking, between the best blind prompt and the best there is.

    A `KitError` where final_results.json holds no looks: the policy writes once.
    """
    looks = results.get("looks", {})
    measured = [m for m in ("gold", "right", "reward") if any(m in values for values in looks.values())]
    if not measured:
        raise KitError("looks_plot: found no looks. Evaluate a policy with generation_settings.turns of 2 or more.")
    arms = [arm for arm in table.ARM_NAMES if arm in looks]
    figure = style.new_figure(4.4 * len(measured), 1.2 + 0.42 * len(arms))
    for axes, metric in zip(style.panel_grid(figure, len(measured), sharey=True), measured, strict=True):
        for y, arm in enumerate(arms):
            variant = "oracle" if arm in table.LIMITS else "trained" if arm == "own" else "initial"
            value = looks[arm].get(metric)
            text = format_metric(metric, value["mean"]) if value else ""
            draw_interval(axes, y, value, **style.variant_look(variant), text=text)
        axes.set_title(metric_name(metric))
        name_rows(axes, [table.ARM_NAMES[arm] for arm in arms], metric=metric)
    return figure


@style.styled
def category_plot(results: Mapping) -> style.Drawing:
    """Draw the way from the raw prompt to the trained policy in each category, and where the oracle stands.

    A `KitError` where final_results.json holds no categories with reward or gold check.
    """
    categories = dict(sorted(results.get("by_category", {}).items()))
    measured = [m for m in table.MAIN if any(m in values.get("trained", {}) for values in categories.values())]
    if not measured:
        raise KitError(f"category_plot: found no categories with {' or '.join(table.MAIN)}. Run the evaluation first.")
    figure = style.new_figure(5.4 * len(measured), 1.3 + 0.4 * len(categories))
    for axes, metric in zip(style.panel_grid(figure, len(measured), sharey=True), measured, strict=True):
        for y, values in enumerate(categories.values()):
            points = {v: values[v][metric] for v in table.VARIANTS if values.get(v, {}).get(metric) is not None}
            if {"raw", "trained"} <= points.keys():
                axes.plot([points["raw"], points["trained"]], [y, y], color=style.BLUE, lw=2.6, alpha=0.35, zorder=1)
            for variant, x in points.items():
                size = dict(ms=7.5, zorder=2) if variant in ("initial", "oracle") else dict(ms=9, zorder=3)
                axes.plot(x, y, mec="white", mew=1, ls="", **style.variant_look(variant), **size)
        axes.set_title(metric_name(metric))
        name_rows(axes, list(categories), metric=metric)
    present = [v for v in table.VARIANTS if any(v in values for values in categories.values())]
    looks = {table.VARIANT_NAMES[v]: style.variant_look(v) | {"linestyle": ""} for v in present}
    style.legend_above(figure, looks, 4)
    return figure
