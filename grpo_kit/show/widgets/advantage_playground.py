"""The advantage playground: drag a group's rewards and see what each definition of the advantage makes of them."""

from collections.abc import Sequence
from functools import partial

import ipywidgets
import numpy as np
import torch
from matplotlib.axes import Axes

from grpo_kit.grpo import group_advantages
from grpo_kit.show.style import BLUE, FAINT, GREY, INK, VERMILION, Drawing, explain, signed, styled
from grpo_kit.show.widgets.picture_box import LiveFigure, PictureBox, button, on_change, row, slider

MOST = 8  # rewards of a group
SECOND_GROUP = (0.90, 0.70, 0.30, 0.10)
WIDTH, GAP, SECOND_STEP = 8, 1, 1.5  # columns of the first group, between the groups, of a bar of the second one
LAST = WIDTH + GAP + len(SECOND_GROUP) * SECOND_STEP
THIN = 0.02  # a bar that would be nothing but its edge
ROOMY = 1.7  # columns a bar, below which its label stands upright
HIGHEST = 2.8  # of the advantages' axes; nothing of at most 8 rewards in 0..1 is higher
DEFINITIONS = {  # of the advantage: title, what says the same in the config, settings
    "group": ("÷ the group's standard deviation", 'GRPO: scale_rewards "group"', dict(scale_rewards="group")),
    "batch": ("÷ the batch's standard deviation", 'scale_rewards "batch"', dict(scale_rewards="batch")),
    "none": ("not divided", 'Dr. GRPO: scale_rewards "none"', dict(scale_rewards="none")),
    "leave_one_out": (
        "minus the mean of the others",
        'RLOO: baseline "leave_one_out", "none"',
        dict(scale_rewards="none", baseline="leave_one_out"),
    ),
}
PRESETS = {
    "toy group": (0.80, 0.60, 0.40, 0.20),
    "two, far apart": (0.90, 0.10),
    "two, hardly apart": (0.51, 0.50),
    "tiny spread": (0.703, 0.702, 0.701, 0.700),
    "one stands out": (0.90, 0.30, 0.30, 0.30, 0.30, 0.30, 0.30, 0.30),
    "all equal": (0.60, 0.60, 0.60, 0.60),
}
SMALL = 0.02  # a range of rewards that may well be noise


class AdvantagePlayground(PictureBox):
    """Sliders for the rewards of a group of 2 to 8, and their advantages under four definitions.

    A second group stands beside it, whose rewards never change. Its advantages move with yours only where they are
    divided by the whole batch's standard deviation.
    """

    def __init__(self) -> None:
        self._live = LiveFigure(_empty_figure())
        size = dict(height="170px", width="70px")
        upright = dict(step=0.001, orientation="vertical", readout_format=".3f", layout=size)
        self.sliders = [slider(f"r{number}", 0.5, 0.0, 1.0, **upright) for number in range(1, MOST + 1)]
        size = dict(description="G, rewards", layout=dict(width="280px"))
        self.size = ipywidgets.IntSlider(min=2, max=MOST, **size)
        self.rewards = PRESETS["toy group"]
        self.presets = [button(name, partial(setattr, self, "rewards", values)) for name, values in PRESETS.items()]
        super().__init__([row([self.size, *self.presets]), ipywidgets.HBox(self.sliders)])
        on_change([self.size, *self.sliders], self.redraw)

    @property
    def rewards(self) -> list[float]:
        """The group's rewards, as the sliders stand."""
        return [control.value for control in self.sliders[: self.size.value]]

    @rewards.setter
    def rewards(self, values: Sequence[float]) -> None:
        """Move the sliders to these rewards; the group is as large as there are."""
        with self.drawn_once():
            self.size.value = len(values)
            for control, value in zip(self.sliders, values, strict=False):
                control.value = value

    def figures(self) -> list[LiveFigure]:
        """Return the bars as the sliders stand, and show only the sliders of this group's size."""
        for number, control in enumerate(self.sliders):
            control.layout.display = None if number < self.size.value else "none"
        rewards, count = self.rewards, self.size.value
        shown = [*rewards, *SECOND_GROUP], *advantages_of(rewards).values()
        with self._live.redrawn() as panels:
            panels[0].plot([0, WIDTH], [sum(rewards) / count] * 2, color=INK, lw=1.2, ls="--", zorder=4)
            for axes, values in zip(panels, shown, strict=True):
                _draw_bars(axes, values, count, is_reward=axes is panels[0])
        return [self._live]

    def reading(self) -> list[str]:
        """Say in words what happens to these rewards; every number is computed from them."""
        rewards, both = self.rewards, advantages_of(self.rewards)
        apart = max(rewards) - min(rewards)
        if apart == 0:
            return ["All rewards are equal: every advantage is exactly 0, and this group teaches nothing."]
        divided, plain = (_strongest(both[name][: len(rewards)]) for name in ("group", "none"))
        text = f"The rewards lie {apart:.3f} apart. Divided by their standard deviation, the strongest advantage is "
        text += f"{signed(divided)}; not divided, it is {signed(plain, 4)}."
        if len(rewards) == 2:
            wider = _strongest(advantages_of([1.0, 0.0])["group"][:2])
            text += f" With two rewards the gap cancels: rewards 1.000 apart would give ±{wider:.2f}."
        elif apart < SMALL:
            times = abs(divided / plain)
            text += f" A difference this small may be noise, and the division makes it {times:.0f} times as large."
        second = signed(_strongest(both["batch"][len(rewards) :]))
        text += f" Divided by the batch's standard deviation, the second group's strongest advantage is {second}, "
        return [text + "which moves with your rewards."]


def advantages_of(rewards: Sequence[float]) -> dict[str, list[float]]:
    """Return both groups' advantages, the given group's before the second's, under each definition."""
    both = torch.tensor([*rewards, *SECOND_GROUP], dtype=torch.float64)
    groups = torch.tensor([0] * len(rewards) + [1] * len(SECOND_GROUP))
    return {name: group_advantages(both, groups, **how).tolist() for name, (_, _, how) in DEFINITIONS.items()}


def _strongest(values: Sequence[float]) -> float:
    """Return the value furthest from 0, of two equally far ones the positive."""
    return max(values, key=lambda value: (round(abs(value), 9), value))


@styled
def _empty_figure() -> Drawing:
    """Return the axes: rewards on the left, four definitions of the advantage beside them."""
    figure = Drawing(figsize=(11.4, 4.9))
    grid = figure.add_gridspec(2, 3, width_ratios=(1.1, 1, 1), left=0.04, right=0.995, top=0.87, bottom=0.07)
    grid.update(wspace=0.11, hspace=0.45)
    cells = [grid[:, 0], grid[0, 1], grid[0, 2], grid[1, 1], grid[1, 2]]
    texts = [("rewards", "dashed: the group's mean, its baseline"), *(texts[:2] for texts in DEFINITIONS.values())]
    for cell, (title, note) in zip(cells, texts, strict=True):
        axes = figure.add_subplot(cell)
        explain(axes, title, note)
        axes.set(xlim=(-0.2, LAST + 0.2), ylim=(0, 1.06) if cell is cells[0] else (-HIGHEST, HIGHEST))
        axes.set_xticks([WIDTH / 2, (WIDTH + GAP + LAST) / 2], ["your group", "second group"])
        axes.tick_params(axis="x", length=0)
        axes.axvline(WIDTH + GAP / 2, color=FAINT, lw=0.8)
        if cell is not cells[0]:
            axes.axhline(0, color=INK, lw=0.8)
    return figure


def _draw_bars(axes: Axes, values: Sequence[float], count: int, is_reward: bool) -> None:
    """Draw both groups' values as bars with numbers: the first `count` share a fixed width, the rest is grey."""
    values, places, step = np.array(values), np.arange(len(values)), WIDTH / count
    own, below = places < count, (values < 0) & (not is_reward)
    centres = np.where(own, (places + 0.5) * step, WIDTH + GAP + (places - count + 0.5) * SECOND_STEP)
    colours = np.where(own, np.where(below, VERMILION, GREY if is_reward else BLUE), FAINT)
    edges = np.where(own, np.where(np.abs(values) > THIN, "white", "none"), GREY)
    look = dict(color=colours, edgecolor=edges, hatch=np.where(below, "////", ""), linewidth=0.6, zorder=2)
    axes.bar(centres, values, np.where(own, min(0.8 * step, 1.2), 1.0), **look)
    for x, value, mine in zip(centres, values, own, strict=True):
        digits = 1 if not mine else 3 if is_reward else 2
        height, side = (0.1, "bottom") if value < 0 else (-0.12, "top")  # across the zero line, hiding nothing
        if is_reward:
            height, side = value + 0.012, "bottom"
        text = f"{value:.{digits}f}" if is_reward else signed(value, digits)
        words = dict(rotation=90 if mine and step < ROOMY else 0, fontsize=9 if mine else 8.5)
        axes.text(x, height, text, ha="center", va=side, **words)
