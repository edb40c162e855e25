"""Figures of the lessons on prompts, policy and generator (notebooks 01 to 03), some of them used in others too.

Series differ in colour, marker and line, so that every
figure is readable in black and white.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, NullLocator

from grpo_kit.config import KitError
from grpo_kit.show.plots import HALO
from grpo_kit.show.style import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    PAPER,
    VERMILION,
    Drawing,
    bare,
    metric_name,
    new_figure,
    plain_text,
    styled,
)

Interval = Mapping[str, float]  # mean, low, high
Curve = tuple[Sequence[float], Sequence[float]]  # x, y
Panels = Mapping[str, Mapping[str, Mapping[str, Interval]]]  # panel → series → row → interval

# One look a series, in this order.
_LOOKS = (
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": VERMILION, "marker": "D", "linestyle": (0, (5, 2))},
    {"color": GREEN, "marker": "^", "linestyle": (0, (1.5, 1.5))},
    {"color": GREY, "marker": "s", "linestyle": (0, (6, 2, 1.5, 2))},
)
_TINT = LinearSegmentedColormap.from_list("tint", [PAPER, "#f6c08a"])  # white: certain; orange: a choice
_TOKEN_CHARACTERS = 96  # characters of tokens in a row of a token figure
_CHARACTER = 0.092  # inches of one character of the token font


@styled
def seed_figure(table: pd.DataFrame, value: str = "reward", prompt: str = "user_prompt") -> Drawing:
    """Draw what the latent seed does: a row a prompt, a faint dot a picture, the prompt's mean as a strong mark.

    Args:
        table: a row a picture.
        value: the column to draw.
        prompt: the column that names the prompt; the rows stand in the order of their means.

    Raises:
        KitError: the table has no such column or no finite value in it.
    """
    missing = [name for name in (value, prompt) if name not in table]
    if missing or table[value].notna().sum() == 0:
        raise KitError(f"seed_figure: found no values in {', '.join(missing) or value}. Pass one row a picture.")
    means = table.groupby(prompt)[value].mean().sort_values()
    figure = new_figure(8.6, 0.9 + 0.24 * len(means))
    axes = figure.subplots()
    for y, (text, mean) in enumerate(means.items()):
        values = table.loc[table[prompt] == text, value]
        axes.plot([values.min(), values.max()], [y, y], color=FAINT, lw=1.2, zorder=1)
        axes.plot(values, [y] * len(values), ls="", marker="o", ms=4.5, color=BLUE, alpha=0.35, mec="none", zorder=2)
        axes.plot(mean, y, marker="|", ms=11, mew=2.6, color=INK, zorder=3)
    axes.set_yticks(range(len(means)), [plain_text(text, 56) for text in means.index], fontsize=8.5)
    axes.set_title(f"{metric_name(value)}: a dot a picture, a bar the prompt's mean")
    _rows_only(axes, len(means))
    return figure


@styled
def interval_figure(panels: Panels, zero_line: bool = False) -> Drawing:
    """Draw means with their intervals, a row a thing: panels stand side by side, several series share each row.

    Args:
        panels: title → series → row → {"mean", "low", "high"}. The rows are those of the first panel and stand in its
            order, from the top; a series named "" has no entry in the key.
        zero_line: mark 0, for differences.

    Raises:
        KitError: there is nothing to draw, or more series than there are looks.
    """
    first = next(iter(panels.values()), {})
    rows = list(dict.fromkeys(row for intervals in first.values() for row in intervals))
    if not rows or len(first) > len(_LOOKS):
        raise KitError(
            f"interval_figure: found {len(rows)} rows in {len(first)} series, allowed: at least 1 row, at most "
            f"{len(_LOOKS)} series. Pass {{title: {{series: {{row: interval}}}}}}."
        )
    named = [(series, look) for series, look in zip(first, _LOOKS, strict=False) if series]
    figure = new_figure(1.4 + 4.1 * len(panels), 0.75 + 0.3 * len(rows) + 0.3 * bool(named))
    figure.get_layout_engine().set(w_pad=0.09)
    for axes, (title, series) in zip(_row_of(figure, len(panels)), panels.items(), strict=True):
        if zero_line:
            axes.axvline(0, color=INK, lw=1)
        _draw_series(axes, series, rows)
        axes.set_title(plain_text(metric_name(title), 60))
        axes.set_yticks(range(len(rows)), [plain_text(row, 40) for row in rows])
        _rows_only(axes, len(rows))
        axes.invert_yaxis()
    if named:
        key = [Line2D([], [], label=plain_text(name, 40), ms=7, **look | {"linestyle": ""}) for name, look in named]
        figure.legend(handles=key, loc="outside upper left", ncols=len(key), frameon=False)
    return figure


def _row_of(figure: Drawing, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False, sharey=True)[0])


def _draw_series(axes: Axes, series: Mapping[str, Mapping[str, Interval]], rows: Sequence[str]) -> None:
    """Draw each series a little above or below the middle of its row, so that none hides another."""
    shifts = np.linspace(-0.17, 0.17, len(series)) if len(series) > 1 else [0.0]
    for shift, look, intervals in zip(shifts, _LOOKS, series.values(), strict=False):
        for y, row in enumerate(rows):
            found = intervals.get(row)
            if found is not None and np.isfinite(found["mean"]):
                line = dict(color=look["color"], alpha=0.5, lw=3, solid_capstyle="butt")
                axes.plot([found["low"], found["high"]], [y + shift] * 2, **line)
                axes.plot(found["mean"], y + shift, ms=6.5, mec="white", mew=0.8, **look | {"linestyle": ""})


def _rows_only(axes: Axes, count: int) -> None:
    axes.set_ylim(-0.7, count - 0.3)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.06)


@styled
def curve_figure(
    panels: Mapping[str, Mapping[str, Curve]],
    xlabel: str,
    ylabel: str = "",
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> Drawing:
    """Draw curves with their points marked and their names at their ends, a panel beside the other.

    Args:
        panels: title → name → (x, y); a name stands at the curve's last point.
        xlabel: of every panel; with `log_x` its ticks are the points themselves.
        ylabel: of the first panel.
        log_x, log_y: logarithmic axes.

    Raises:
        KitError: a panel has no curve, or more than there are looks.
    """
    counts = [len(curves) for curves in panels.values()]
    if not counts or min(counts) < 1 or max(counts) > len(_LOOKS):
        raise KitError(f"curve_figure: found {counts} curves, allowed: 1 to {len(_LOOKS)} in each panel. Split them.")
    figure = new_figure(0.6 + 4.3 * len(panels), 3.1)
    figure.get_layout_engine().set(w_pad=0.09)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for look, (x, y) in zip(_LOOKS, curves.values(), strict=False):
            axes.plot(x, y, lw=2, ms=6, mec="white", mew=0.8, **look)
        _name_curves(axes, curves)
        _scale(axes, sorted({float(v) for x, _ in curves.values() for v in x}), log_x, log_y)
        axes.set(title=plain_text(metric_name(title), 60), xlabel=plain_text(xlabel))
        axes.margins(x=0.06, y=0.12)
    figure.axes[0].set_ylabel(plain_text(ylabel))
    return figure


def _name_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Write each name behind its curve's end; the lowest a little lower, so that close ends do not collide."""
    lowest = min(curves, key=lambda name: curves[name][1][-1])
    for look, (name, (x, y)) in zip(_LOOKS, curves.items(), strict=False):
        shift = 0 if len(curves) == 1 else -6 if name == lowest else 6
        placing = dict(xytext=(8, shift), textcoords="offset points", va="center", path_effects=HALO)
        axes.annotate(plain_text(name, 40), (x[-1], y[-1]), color=look["color"], annotation_clip=False, **placing)


def _scale(axes: Axes, points: Sequence[float], log_x: bool, log_y: bool) -> None:
    if log_x:
        axes.set_xscale("log")
        axes.set_xticks(points, [f"{point:g}" for point in points])
        axes.minorticks_off()
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


@styled
def flow_figure(paths: Mapping[str, Curve], targets: Sequence[float]) -> Drawing:
    """Draw paths from noise to data in one dimension, a panel for each number of steps.

    Args:
        paths: title → (noise levels (S + 1,) from 1 to 0, positions (S + 1, K) of K points).
        targets: where the data lie.

    Raises:
        KitError: a panel whose positions do not have a row for each noise level.
    """
    figure = new_figure(2.9 * max(1, len(paths)), 2.6)
    grid = figure.subplots(1, max(1, len(paths)), squeeze=False, sharey=True)[0]
    for axes, (title, (levels, positions)) in zip(grid, paths.items(), strict=False):
        positions = np.asarray(positions, dtype=float)
        if positions.ndim != 2 or len(positions) != len(levels):
            found = f"{positions.shape} for {len(levels)} noise levels"
            raise KitError(f"flow_figure: positions of shape {found}, allowed: (levels, points). Stack the steps.")
        axes.plot(levels, positions, color=BLUE, lw=1, marker=".", ms=4)
        axes.plot([0] * len(targets), targets, ls="", marker="*", ms=13, color=VERMILION, mec="white", zorder=4)
        axes.invert_xaxis()
        axes.set(title=plain_text(title, 60), xlabel="noise level")
    grid[0].set_ylabel("x")
    if len(targets):
        place = dict(xytext=(-9, 7), textcoords="offset points", ha="right", path_effects=HALO)
        grid[0].annotate("data", (0, max(targets)), color=VERMILION, **place)
    return figure


@styled
def distribution_figure(words: Sequence[str], distributions: Mapping[str, Sequence[float]]) -> Drawing:
    """Draw probabilities over the same words, a panel a distribution, each bar with its value.

    Args:
        words: what the bars stand for.
        distributions: title → one probability a word.

    Raises:
        KitError: a distribution with another number of words.
    """
    lengths = {len(values) for values in distributions.values()}
    if lengths != {len(words)}:
        raise KitError(f"distribution_figure: found {sorted(lengths)} values, allowed: {len(words)}, one a word.")
    figure = new_figure(0.5 + max(2.9, 0.76 * len(words)) * len(distributions), 2.6)
    for axes, (title, values) in zip(_row_of(figure, len(distributions)), distributions.items(), strict=True):
        bars = axes.bar(range(len(words)), [float(v) for v in values], color=BLUE, width=0.66)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
        axes.set_xticks(range(len(words)), [plain_text(word, 14) for word in words])
        axes.set_title(plain_text(title, 80))
        axes.tick_params(axis="x", length=0)
        axes.margins(y=0.14)
    figure.axes[0].set_ylabel("probability")
    return figure


@styled
def token_figure(rows: Sequence[Sequence[str]], probabilities: Sequence[Sequence[float]]) -> Drawing:
    """Draw texts token by token: below each its probability, and the darker, the less certain it was.

    Args:
        rows: the tokens of each text.
        probabilities: one a token.

    Raises:
        KitError: no text, or a text with another number of tokens than probabilities.
    """
    found = [(len(row), len(chances)) for row, chances in zip(rows, probabilities, strict=False)]
    if not rows or len(rows) != len(probabilities) or any(a != b for a, b in found):
        raise KitError(f"token_figure: found {found} tokens and probabilities, allowed: one each. Pass equal lengths.")
    placed = [list(_placed(row, chances)) for row, chances in zip(rows, probabilities, strict=True)]
    heights = [1 + max(line for *_, line in row) for row in placed]
    width, height = _TOKEN_CHARACTERS * _CHARACTER + 0.3, 0.62 * sum(heights) + 0.16 * len(rows)
    figure = Drawing(figsize=(width, height))
    axes = bare(figure.add_axes((0, 0, 1, 1)))
    axes.set(xlim=(-0.15, width - 0.15), ylim=(-height, 0))
    top = 0.0
    for row, lines in zip(placed, heights, strict=True):
        for text, chance, column, line in row:
            _draw_token(axes, text, chance, column * _CHARACTER, -(top + 0.62 * line))
        top += 0.62 * lines + 0.16
    return figure


def _placed(row: Sequence[str], chances: Sequence[float]) -> Iterator[tuple[str, float, float, int]]:
    """Each token's text, probability, column and line; a token that does not fit begins the next line."""
    column, line = 0.0, 0
    for token, chance in zip(row, chances, strict=True):
        text = plain_text(token.replace("\n", "↵"), 24).strip() or "␣"
        size = max(len(text), 3) + 1.6
        if column and column + size > _TOKEN_CHARACTERS:
            column, line = 2.0, line + 1  # indented: it goes on
        yield text, float(chance), column, line
        column += size


def _draw_token(axes: Axes, text: str, chance: float, x: float, y: float) -> None:
    width = (max(len(text), 3) + 1.0) * _CHARACTER
    style = "round,pad=0,rounding_size=0.05"
    face = _TINT(1.0 - min(max(chance, 0.0), 1.0))
    axes.add_patch(FancyBboxPatch((x, y - 0.33), width, 0.27, boxstyle=style, facecolor=face, edgecolor=GREY, lw=0.7))
    middle = dict(ha="center", va="center", family="DejaVu Sans Mono")
    axes.text(x + width / 2, y - 0.2, text, fontsize=10, **middle)
    axes.text(x + width / 2, y - 0.45, _chance_text(chance), fontsize=8, color=GREY, **middle)


def _chance_text(chance: float) -> str:
    """A probability with two digits; a small one is not a zero."""
    return f"{chance:.2f}" if chance >= 0.005 or chance == 0 else "<.01"
