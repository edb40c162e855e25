"""The advantage playground: drag a group's rewards and see what each definition of the advantage makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import ipywidgets
import torch

from grpo_kit.config import KitError
from grpo_kit.grpo import group_advantages
from grpo_kit.show.frame import signed
from grpo_kit.show.widgets.advantage_bars import SECOND_GROUP, draw_bars, empty_figure
from grpo_kit.show.widgets.controls import button, on_change, row, slider
from grpo_kit.show.widgets.live_figure import LiveFigure
from grpo_kit.show.widgets.picture_box import PictureBox

MOST = 8  # rewards of a group
DEFINITIONS = {
    "group": dict(scale_rewards="group"),
    "batch": dict(scale_rewards="batch"),
    "none": dict(scale_rewards="none"),
    "leave_one_out": dict(scale_rewards="none", baseline="leave_one_out"),
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

    Args:
        rewards: the rewards to begin with, 2 to 8 of them.

    Raises:
        KitError: another number of rewards, or one that is not finite.
    """

    def __init__(self, rewards: Sequence[float] = PRESETS["toy group"]) -> None:
        rewards = [float(reward) for reward in rewards]
        if not 2 <= len(rewards) <= MOST or not all(math.isfinite(reward) for reward in rewards):
            raise KitError(
                f"rewards: found {rewards!r:.80}, allowed: 2 to {MOST} finite numbers. Pass one group's rewards."
            )
        low, high = min(0.0, math.floor(min(rewards))), max(1.0, math.ceil(max(rewards)))
        self._live = LiveFigure(empty_figure(low, high))
        look = dict(step=0.001, orientation="vertical", readout_format=".3f", layout=dict(height="170px", width="70px"))
        starts = enumerate([*rewards, *[0.5] * (MOST - len(rewards))], start=1)
        self.sliders = [slider(f"r{number}", value, low, high, **look) for number, value in starts]
        size = dict(value=len(rewards), min=2, max=MOST, description="G, rewards", layout=dict(width="280px"))
        self.size = ipywidgets.IntSlider(**size)
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

    @property
    def advantages(self) -> dict[str, list[float]]:
        """The group's advantages by definition: "group", "batch", "none", "leave_one_out"."""
        return {name: values[: self.size.value] for name, values in advantages_of(self.rewards).items()}

    def figures(self) -> list[LiveFigure]:
        """Return the bars as the sliders stand, and show only the sliders of this group's size."""
        for number, control in enumerate(self.sliders):
            control.layout.display = None if number < self.size.value else "none"
        with self._live.redrawn() as panels:
            draw_bars(panels, self.rewards, list(advantages_of(self.rewards).values()))
        return [self._live]

    def reading(self) -> list[str]:
        """Say what happens to these rewards."""
        return [reading(self.rewards)]


def advantages_of(rewards: Sequence[float]) -> dict[str, list[float]]:
    """Return both groups' advantages, the given group's before the second's, under each definition."""
    both = torch.tensor([*rewards, *SECOND_GROUP], dtype=torch.float64)
    groups = torch.tensor([0] * len(rewards) + [1] * len(SECOND_GROUP))
    return {name: group_advantages(both, groups, **settings).tolist() for name, settings in DEFINITIONS.items()}


def reading(rewards: Sequence[float]) -> str:
    """Say in words what happens to these rewards; every number is computed from them."""
    apart, both = max(rewards) - min(rewards), advantages_of(rewards)
    if apart == 0:
        return "All rewards are equal: every advantage is exactly 0, and this group teaches nothing."
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
    text += f" Divided by the batch's standard deviation, the second group's strongest advantage is {second}, which "
    return text + "moves with your rewards."


def _strongest(values: Sequence[float]) -> float:
    """Return the value furthest from 0, of two equally far ones the positive."""
    return max(values, key=lambda value: (round(abs(value), 9), value))
