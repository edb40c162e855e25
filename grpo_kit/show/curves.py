"""Figures of curves: what training logged, several settings over their seeds, and any curve with its name at its end.

Single measurements are faint, what sums them up is strong.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from grpo_kit.config import KitError
from grpo_kit.evaluation.table import metric_name
from grpo_kit.show import style

Curve = tuple[Sequence[float], Sequence[float]]  # x, y

# column of metrics.jsonl → (title, what to look for, key in a validation or None)
CURVES = {
    "reward": ("reward", "what GRPO trains; should rise", "reward"),
    "rewards/gold/mean": ("gold check", "never trained on; should rise with it", "gold"),
    "kl": ("KL from the initial policy", "starts at 0; grows as the policy moves", None),
    "rewards/keeps_objects/mean": ("keeps the user's objects", "checks the words; look when it falls", "keeps_objects"),
    "reward_std": ("standard deviation in a group", "what is left to choose from", None),
    "completions/mean_length": ("tokens in a rewrite", "a jump is a warning", None),
}
MOST_NAMED = 4  # curves in a panel, each named at its end
WINDOW = 9  # iterations of the moving average over seeds, at most
MARKS = 6  # markers along a curve


def draw_curve(axes: Axes, x: Sequence[float], y: Sequence[float], faint: object = None, **look: object) -> None:
    """Draw one strong curve, and behind it the faint ones that it sums up: a series or table over x."""
    if faint is not None:
        axes.plot(faint.index, faint, color=look["color"], lw=0.9, alpha=0.33)
    axes.plot(x, y, **{"lw": 2.2, "ms": 5.5, "mec": "white", "mew": 0.8} | look)


def _moving_average(values: pd.Series | pd.DataFrame, window: int) -> pd.Series | pd.DataFrame:
    return values.rolling(max(1, window), min_periods=1, center=True).mean()


@style.styled
def curve_figure(
    panels: Mapping[str, Mapping[str, Curve]],
    xlabel: str,
    ylabel: str = "",
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> style.Drawing:
    """Draw curves with their points marked and their names at their ends, a panel beside the other.

    `panels` is title → name → (x, y), 1 to 4 curves each, else a `KitError`; with `log_x` the points are the ticks.
    """
    counts = [len(curves) for curves in panels.values()]
    if not counts or min(counts) < 1 or max(counts) > MOST_NAMED:
        raise KitError(f"curve_figure: found {counts} curves, allowed: 1 to {MOST_NAMED} in each panel. Split them.")
    figure = style.new_figure(0.6 + 4.3 * len(panels), 3.1)
    for axes, (title, curves) in zip(style.panel_grid(figure, len(panels)), panels.items(), strict=True):
        lowest = min(curves, key=lambda name: curves[name][1][-1])
        for number, (name, (x, y)) in enumerate(curves.items()):
            look = style.series_look(number)
            draw_curve(axes, x, y, **look)
            shift = 0 if len(curves) == 1 else -6 if name == lowest else 6  # so that close ends do not collide
            words = dict(va="center", color=look["color"], annotation_clip=False)
            style.label(axes, style.plain_text(name, 40), (x[-1], y[-1]), (8, shift), **words)
        if log_x:
            ticks_at(axes, sorted({float(place) for x, _ in curves.values() for place in x}))
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set(title=style.plain_text(metric_name(title), 60), xlabel=style.plain_text(xlabel))
        axes.margins(x=0.06, y=0.12)
    figure.axes[0].set_ylabel(style.plain_text(ylabel))
    return figure


def ticks_at(axes: Axes, points: Sequence[float]) -> None:
    """Make x logarithmic, with these points as its ticks."""
    axes.set_xscale("log")
    axes.set_xticks(points, [f"{point:g}" for point in points])
    axes.minorticks_off()


@style.styled
def training_curves(
    metrics: pd.DataFrame,
    validations: Sequence[Mapping] = (),
    panels: Sequence[str] = tuple(CURVES),
    sentinel: Mapping | None = None,
) -> style.Drawing:
    """Draw what training logged: each iteration faint, a moving average strong, held-out validations as points.

    Metrics, validations and sentinel are what the files of a run hold; `panels` are columns of metrics.jsonl, of which
    those that were not logged are left out (none at all is a `KitError`). The score that shows reward hacking is drawn
    too, and a divergence is marked by a line in every panel.
    """
    judged = f"rewards/{(sentinel or {}).get('held_out')}/mean"
    wanted = dict.fromkeys((*panels[:1], judged, *panels[1:]) if judged not in panels else panels)
    drawn = [name for name in wanted if name in metrics and metrics[name].notna().any()]
    if not drawn:
        raise KitError(f"training curves: found no column of {', '.join(panels)}. Train at least one iteration first.")
    columns = min(3, len(drawn))
    figure = style.new_figure(3.7 * columns, 2.6 * -(-len(drawn) // columns))
    grid = style.panel_grid(figure, len(drawn), columns, sharex=True)
    for axes, name in zip(grid, drawn, strict=True):
        values = metrics.set_index("iteration")[name].dropna()  # KL, for one, is not measured in every iteration
        _draw_logged(axes, values, validations, name)
    for axes in grid[-columns:]:
        axes.set_xlabel("iteration")
        axes.tick_params(labelbottom=True)
    if divergence := (sentinel or {}).get("divergence"):
        for axes in grid:  # a thin line where the reward began to be gamed, a strong one where that was found
            axes.axvline(divergence["since"], color=style.INK, lw=0.8, ls=(0, (1, 2)), zorder=1.5)
            axes.axvline(divergence["iteration"], color=style.INK, lw=1.4, ls=(0, (5, 2)), zorder=1.5)
        point = (divergence["iteration"], grid[0].get_ylim()[0])
        left = point[0] > sum(grid[0].get_xlim()) / 2  # on the side where there is room
        words = dict(ha="right" if left else "left", weight="bold")
        style.label(grid[0], "divergence", point, (-4 if left else 4, 4), **words)
    return figure


def _draw_logged(axes: Axes, values: pd.Series, validations: Sequence[Mapping], name: str) -> None:
    """Draw one logged column and, where the validations have it too, what they found."""
    score = name.removeprefix("rewards/").removesuffix("/mean")
    title, reading, validated = CURVES.get(name, (metric_name(score), "", score))
    smooth = _moving_average(values, len(values) // 8)
    draw_curve(axes, smooth.index, smooth, values, color=style.BLUE, marker="o" if len(values) == 1 else "")
    style.explain(axes, title, reading)
    axes.margins(x=0.03, y=0.14)
    found = {v["iteration"]: v["reward"] if validated == "reward" else v["rewards"].get(validated) for v in validations}
    points = [(iteration, value) for iteration, value in found.items() if value is not None]
    if points:
        draw_curve(axes, *zip(*points, strict=True), color=style.VERMILION, marker="o", lw=0.8, ls=(0, (3, 2)))
        low, high = axes.get_ylim()
        above = points[-1][1] >= smooth.iloc[-1]  # their name stands on the side away from the curve, with room for it
        axes.set_ylim((low, high + 0.12 * (high - low)) if above else (low - 0.12 * (high - low), high))
        style.label(axes, "held out", points[-1], (0, 6 if above else -14), ha="right", color=style.VERMILION)


@style.styled
def seeds_figure(curves: pd.DataFrame) -> style.Drawing:
    """Draw training curves of several settings: moving averages of each seed faint, of a setting's mean strong.

    `curves` has a row for each (setting, seed, iteration), and any of the columns reward, gold and kl; a `KitError`
    where there is nothing to draw, or more settings than can be told apart.
    """
    drawn = [name for name in ("reward", "gold", "kl") if name in curves and curves[name].notna().any()]
    settings = curves["setting"].unique() if drawn else []
    if not drawn or len(settings) > style.MOST_SERIES:
        found = f"found {len(settings)} settings, allowed: 1 to {style.MOST_SERIES}"
        raise KitError(f"curves: {found}. Compare fewer runs at a time.")
    figure = style.new_figure(4.1 * len(drawn), 3.0 + 0.24 * -(-len(settings) // 3))
    looks = {setting: style.series_look(number) for number, setting in enumerate(settings)}
    for axes, name in zip(style.panel_grid(figure, len(drawn)), drawn, strict=True):
        for setting, rows in curves.dropna(subset=name).groupby("setting", sort=False):
            seeds = rows.pivot_table(index="iteration", columns="seed", values=name)
            smooth = _moving_average(seeds, min(WINDOW, len(seeds) // 4))
            mean = smooth.mean(axis=1, skipna=False).dropna()  # where every seed has that iteration
            every = max(1, len(mean) // MARKS)
            faint = smooth if len(seeds.columns) > 1 else None
            draw_curve(axes, mean.index, mean, faint, markevery=(every // 2, every), **looks[setting])
        axes.set(title=metric_name(name), xlabel="iteration")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.margins(x=0.03)
    style.legend_above(figure, looks, columns=3 if len(drawn) > 2 else 2)
    return figure
