"""Figures with a row for each thing that is measured: means with their intervals, differences, categories."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from grpo_kit.config import KitError
from grpo_kit.evaluation.table import SHARES, VARIANT_NAMES, VARIANTS, format_metric, metric_name, number_text
from grpo_kit.show import style

Interval = Mapping[str, float]  # mean, low, high
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

    Args:
        axes: the panel; row `i` is drawn at the height `i`.
        names: one a row.
        width, lines: the most characters in a line of a name, and the most lines.
        metric: what the values measure: a share has its scale in per cent.
    """
    axes.set_yticks(range(len(names)), [style.wrap(name, width, lines) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.8)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.1)
    if metric in SHARES:
        axes.xaxis.set_major_formatter(lambda value, _: number_text(100 * value, ".0f"))


@style.styled
def interval_figure(panels: Panels, zero_line: bool = False) -> style.Drawing:
    """Draw means with their intervals, a row a thing: panels stand side by side, several series share each row.

    Args:
        panels: title → series → row → {"mean", "low", "high"}. The rows are those of the first panel and stand in its
            order, from the top; a series named "" has no entry in the key.
        zero_line: mark 0, for differences.

    Raises:
        KitError: there is nothing to draw, or more series than can share a row.
    """
    first = next(iter(panels.values()), {})
    rows = list(dict.fromkeys(row for intervals in first.values() for row in intervals))
    if not rows or len(first) > MOST_IN_A_ROW:
        raise KitError(
            f"interval_figure: found {len(rows)} rows in {len(first)} series, allowed: at least 1 row, at most "
            f"{MOST_IN_A_ROW} series. Pass {{title: {{series: {{row: interval}}}}}}."
        )
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
def comparison_plot(results: Mapping, metrics: Sequence[str] = ("reward", "gold")) -> style.Drawing:
    """Draw each variant's mean with its interval, and below it the paired differences against zero.

    Args:
        results: what final_results.json holds.
        metrics: a column of panels each; one that was not measured is left out.

    Raises:
        KitError: the results hold none of the metrics.
    """
    found = results.get("variants", {})
    measured = [m for m in metrics if any(m in values for values in found.values())]
    if not measured:
        raise KitError(f"comparison_plot: found no results for {', '.join(metrics)}. Run the evaluation first.")
    variants = [v for v in VARIANTS if v in found]
    variants += [v for v in found if v not in VARIANTS]  # saved runs come last
    pairs = list(results.get("differences", {}))
    figure = style.new_figure(5.4 * len(measured), 1.9 + 0.42 * (len(variants) + len(pairs)))
    heights = [len(variants) + 0.5, len(pairs) + 0.5] if pairs else [1]
    grid = figure.subplots(len(heights), len(measured), squeeze=False, height_ratios=heights, sharey="row")
    for column, metric in enumerate(measured):
        grid[0][column].set_title(f"{metric_name(metric)}, mean over prompts")
        _draw_results(grid[0][column], {v: (v, found[v]) for v in variants}, metric)
        if pairs:
            grid[1][column].set_title("paired difference (0: no change)")
            grid[1][column].axvline(0, color=style.INK, lw=1)
            changes = {pair: (pair.split("-")[0], results["differences"][pair]) for pair in pairs}
            _draw_results(grid[1][column], changes, metric, signed=True)
    return figure


def _draw_results(
    axes: Axes, rows: Mapping[str, tuple[str, Mapping[str, Interval]]], metric: str, signed: bool = False
) -> None:
    """Draw a row for each variant or each pair: its name → the variant whose look it has, and its intervals."""
    for y, (variant, intervals) in enumerate(rows.values()):
        value = intervals.get(metric)
        text = format_metric(metric, value["mean"], signed) if value else ""
        draw_interval(
            axes, y, value, style.VARIANT_COLOURS.get(variant, style.INK), style.VARIANT_MARKERS.get(variant, "o"), text
        )
    names = [name.replace("-", " − ") if signed else VARIANT_NAMES.get(name, name) for name in rows]
    name_rows(axes, names, metric=metric)


@style.styled
def category_plot(results: Mapping, metrics: Sequence[str] = ("reward", "gold")) -> style.Drawing:
    """Draw the way from the raw prompt to the trained policy in each category, and where the oracle stands.

    Args:
        results: what final_results.json holds.
        metrics: a column of panels each; one that was not measured is left out.

    Raises:
        KitError: the results hold no categories with these metrics.
    """
    categories = dict(sorted(results.get("by_category", {}).items()))
    measured = [m for m in metrics if any(m in values.get("trained", {}) for values in categories.values())]
    if not measured:
        raise KitError(f"category_plot: found no categories with {', '.join(metrics)}. Run the evaluation first.")
    figure = style.new_figure(5.4 * len(measured), 1.3 + 0.4 * len(categories))
    for axes, metric in zip(style.panel_grid(figure, len(measured), sharey=True), measured, strict=True):
        for y, values in enumerate(categories.values()):
            _draw_category(axes, y, values, metric)
        axes.set_title(metric_name(metric))
        name_rows(axes, list(categories), metric=metric)
    present = [v for v in VARIANTS if any(v in values for values in categories.values())]
    looks = {
        v: {"marker": style.VARIANT_MARKERS[v], "color": style.VARIANT_COLOURS[v], "linestyle": ""} for v in present
    }
    style.legend_above(figure, {VARIANT_NAMES[v]: look for v, look in looks.items()}, 4)
    return figure


def _draw_category(axes: Axes, y: int, values: Mapping, metric: str) -> None:
    """Draw one category: a line from raw to trained, a mark for each variant that was measured."""
    points = {v: values[v][metric] for v in VARIANTS if values.get(v, {}).get(metric) is not None}
    if "raw" in points and "trained" in points:
        axes.plot([points["raw"], points["trained"]], [y, y], color=style.BLUE, lw=2.6, alpha=0.35, zorder=1)
    for variant, x in points.items():
        small = variant in ("initial", "oracle")
        look = dict(marker=style.VARIANT_MARKERS[variant], color=style.VARIANT_COLOURS[variant], ms=7.5 if small else 9)
        axes.plot(x, y, mec="white", mew=1, ls="", zorder=2 if small else 3, **look)
