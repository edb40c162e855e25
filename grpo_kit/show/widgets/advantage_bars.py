"""The picture of the advantage playground: two groups' rewards, and their advantages under four definitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from grpo_kit.grpo import group_advantages
from grpo_kit.show.frame import signed
from grpo_kit.show.style import BLUE, FAINT, GREY, INK, VERMILION, Drawing, styled

MOST = 8  # rewards of the group that is played with
SECOND_GROUP = (0.90, 0.70, 0.30, 0.10)
GAP, SECOND_STEP = 1, 1.3  # columns between the two groups; columns a bar of the second one
THIN = 0.02  # a bar that would be nothing but its edge
ROOMY = 1.6  # columns a bar, below which its label stands upright
HIGHEST = 2.8  # of the advantages' axes; nothing of at most 8 rewards in 0..1 is higher


@dataclass(frozen=True)
class Definition:
    """A definition of the advantage: its title, what says the same in the config, and the settings."""

    title: str
    config: str
    scale_rewards: str
    baseline: str


DEFINITIONS = {
    "group": Definition("÷ the group's spread", 'GRPO: scale_rewards "group"', "group", "mean"),
    "batch": Definition("÷ the whole batch's spread", 'scale_rewards "batch"', "batch", "mean"),
    "none": Definition("not divided", 'Dr. GRPO: scale_rewards "none"', "none", "mean"),
    "leave_one_out": Definition(
        "minus the mean of the others", 'RLOO: baseline "leave_one_out", "none"', "none", "leave_one_out"
    ),
}


def advantages_of(rewards: Sequence[float], second: Sequence[float] = SECOND_GROUP) -> dict[str, list[float]]:
    """Return both groups' advantages, the first group's before the second's, under each definition."""
    together = torch.tensor([*rewards, *second], dtype=torch.float64)
    groups = torch.tensor([0] * len(rewards) + [1] * len(second))
    return {
        name: group_advantages(together, groups, scale_rewards=d.scale_rewards, baseline=d.baseline).tolist()
        for name, d in DEFINITIONS.items()
    }


class Bars:
    """Bars with a value each in one panel: the group's, spread over its width, then the second group's in grey."""

    def __init__(self, axes: Axes, digits: int, with_sign: bool) -> None:
        self._digits, self._with_sign = digits, with_sign
        count = MOST + len(SECOND_GROUP)
        self.bars = axes.bar(range(count), [0.0] * count, zorder=2).patches
        self.texts = [axes.text(0, 0, "", ha="center", fontsize=8) for _ in range(count)]

    def show(self, first: Sequence[float], second: Sequence[float], plain: bool = False) -> None:
        """Set the heights; `plain` bars carry no sign's colour."""
        for artist in (*self.bars, *self.texts):
            artist.set_visible(False)
        step = MOST / len(first)
        for place, value in enumerate(first):
            self._show_one(place, (place + 0.5) * step, min(0.8 * step, 1.2), value, self._digits)
            self.bars[place].set_facecolor(GREY if plain else BLUE if value >= 0 else VERMILION)
            self.texts[place].set_rotation(90 if step < ROOMY else 0)
        for place, value in enumerate(second):
            self._show_one(MOST + place, MOST + GAP + (place + 0.5) * SECOND_STEP, 0.9, value, 1)
            self.bars[MOST + place].set(facecolor=FAINT, edgecolor=GREY)

    def _show_one(self, number: int, centre: float, width: float, value: float, digits: int) -> None:
        below = self._with_sign and value < 0
        bar, text = self.bars[number], self.texts[number]
        bar.set(x=centre - width / 2, width=width, height=value, visible=True, lw=0.6)
        bar.set(edgecolor="white" if abs(value) > THIN else "none", hatch="////" if below else None)
        text.set(x=centre, visible=True)
        if self._with_sign:  # across the zero line from its bar, where it hides nothing
            text.set(y=0.1 if below else -0.12, va="bottom" if below else "top", text=signed(value, digits))
        else:
            text.set(y=value + 0.012, va="bottom", text=f"{value:.{digits}f}")


class AdvantageFigure:
    """Rewards on the left, four definitions of the advantage beside them."""

    @styled
    def __init__(self, low: float, high: float) -> None:
        self.figure = _empty(low, high)
        rewards, *panels = self.figure.axes
        self._mean = rewards.plot([0, MOST], [0, 0], color=INK, lw=1.2, ls="--", zorder=4)[0]
        self._rewards = Bars(rewards, 3, with_sign=False)
        self._panels = {name: Bars(axes, 2, with_sign=True) for name, axes in zip(DEFINITIONS, panels, strict=True)}
        every = (self._rewards, *self._panels.values())
        bars = [bar for panel in every for bar in panel.bars]
        texts = [text for panel in every for text in panel.texts]
        self.moving: list[Artist] = [*bars, self._mean, *texts]

    def show(self, rewards: Sequence[float], advantages: Mapping[str, Sequence[float]]) -> None:
        """Draw these rewards and their advantages, the second group's behind the first's."""
        count = len(rewards)
        self._mean.set_ydata([sum(rewards) / count] * 2)
        self._rewards.show(rewards, SECOND_GROUP, plain=True)
        for name, values in advantages.items():
            self._panels[name].show(values[:count], values[count:])


@styled
def _empty(low: float, high: float) -> Drawing:
    figure = Drawing(figsize=(11.4, 4.9))
    grid = figure.add_gridspec(2, 3, width_ratios=(1.15, 1, 1), left=0.04, right=0.995, top=0.88, bottom=0.07)
    grid.update(wspace=0.13, hspace=0.42)
    _panel(figure.add_subplot(grid[:, 0]), "rewards", "dashed: the group's mean, its baseline", low, high * 1.06)
    for place, definition in enumerate(DEFINITIONS.values()):
        axes = figure.add_subplot(grid[place // 2, 1 + place % 2])
        _panel(axes, definition.title, definition.config, -HIGHEST, HIGHEST)
        axes.axhline(0, color=INK, lw=0.8)
    return figure


def _panel(axes: Axes, title: str, note: str, low: float, high: float) -> None:
    width = len(SECOND_GROUP) * SECOND_STEP
    last = MOST + GAP + width
    axes.set(xlim=(-0.2, last + 0.2), ylim=(low, high))
    axes.set_xticks([MOST / 2, last - width / 2], ["your group", "second group"])
    axes.tick_params(axis="x", length=0)
    axes.axvline(MOST + GAP / 2, color=FAINT, lw=0.8)
    axes.set_title(title, pad=18)
    axes.text(0, 1.025 if low >= 0 else 1.05, note, transform=axes.transAxes, color=GREY, fontsize=8)
