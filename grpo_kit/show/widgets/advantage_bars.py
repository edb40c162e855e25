"""The picture of the advantage playground: two groups' rewards, and their advantages under four definitions."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from grpo_kit.show.frame import signed
from grpo_kit.show.style import BLUE, FAINT, GREY, INK, VERMILION, Drawing, styled

SECOND_GROUP = (0.90, 0.70, 0.30, 0.10)
WIDTH, GAP, SECOND_STEP = 8, 1, 1.5  # columns of the first group, between the groups, of a bar of the second one
LAST = WIDTH + GAP + len(SECOND_GROUP) * SECOND_STEP
THIN = 0.02  # a bar that would be nothing but its edge
ROOMY = 1.7  # columns a bar, below which its label stands upright
HIGHEST = 2.8  # of the advantages' axes; nothing of at most 8 rewards in 0..1 is higher
PANELS = {  # each definition of the advantage, and what says the same in the config
    "÷ the group's standard deviation": 'GRPO: scale_rewards "group"',
    "÷ the batch's standard deviation": 'scale_rewards "batch"',
    "not divided": 'Dr. GRPO: scale_rewards "none"',
    "minus the mean of the others": 'RLOO: baseline "leave_one_out", "none"',
}


@styled
def empty_figure(low: float, high: float) -> Drawing:
    """Return the axes: rewards from `low` to `high` on the left, four definitions of the advantage beside them."""
    figure = Drawing(figsize=(11.4, 4.9))
    grid = figure.add_gridspec(2, 3, width_ratios=(1.1, 1, 1), left=0.04, right=0.995, top=0.87, bottom=0.07)
    grid.update(wspace=0.11, hspace=0.45)
    rewards = figure.add_subplot(grid[:, 0])
    _frame(rewards, "rewards", "dashed: the group's mean, its baseline", low, high * 1.06)
    for place, (title, note) in enumerate(PANELS.items()):
        axes = figure.add_subplot(grid[place // 2, 1 + place % 2])
        _frame(axes, title, note, -HIGHEST, HIGHEST)
        axes.axhline(0, color=INK, lw=0.8)
    return figure


def _frame(axes: Axes, title: str, note: str, low: float, high: float) -> None:
    axes.set(xlim=(-0.2, LAST + 0.2), ylim=(low, high))
    axes.set_xticks([WIDTH / 2, (WIDTH + GAP + LAST) / 2], ["your group", "second group"])
    axes.tick_params(axis="x", length=0)
    axes.axvline(WIDTH + GAP / 2, color=FAINT, lw=0.8)
    axes.set_title(title, pad=19)
    axes.text(0, 1.025 if low >= 0 else 1.05, note, transform=axes.transAxes, color=GREY, fontsize=9)


def draw_bars(panels: Sequence[Axes], rewards: Sequence[float], advantages: Sequence[Sequence[float]]) -> None:
    """Draw into the axes of `empty_figure`.

    Args:
        panels: those axes.
        rewards: the first group's.
        advantages: for each definition the first group's, followed by the second group's.
    """
    count = len(rewards)
    panels[0].plot([0, WIDTH], [sum(rewards) / count] * 2, color=INK, lw=1.2, ls="--", zorder=4)
    for axes, values in zip(panels, ([*rewards, *SECOND_GROUP], *advantages), strict=True):
        with_sign = axes is not panels[0]
        for place, value in enumerate(values):
            _draw_bar(axes, place, count, value, with_sign)


def _draw_bar(axes: Axes, place: int, count: int, value: float, with_sign: bool) -> None:
    """Draw a bar with its value: the first `count` share the first group's width, the others are grey."""
    first, below, step = place < count, with_sign and value < 0, WIDTH / count
    if first:
        centre, width, digits = (place + 0.5) * step, min(0.8 * step, 1.2), 2 if with_sign else 3
        colour = GREY if not with_sign else VERMILION if below else BLUE
    else:
        centre, width, digits, colour = WIDTH + GAP + (place - count + 0.5) * SECOND_STEP, 1.0, 1, FAINT
    edge = ("white" if abs(value) > THIN else "none") if first else GREY
    look = dict(facecolor=colour, edgecolor=edge, hatch="////" if below else None, linewidth=0.6, zorder=2)
    axes.add_patch(Rectangle((centre - width / 2, 0), width, value, **look))
    text = signed(value, digits) if with_sign else f"{value:.{digits}f}"
    height, side = (0.1, "bottom") if below else (-0.12, "top")  # across the zero line from its bar, hiding nothing
    if not with_sign:
        height, side = value + 0.012, "bottom"
    turned = 90 if first and step < ROOMY else 0
    axes.text(centre, height, text, ha="center", va=side, rotation=turned, fontsize=9 if first else 8.5)
