"""The loss playground: one token's loss and gradient over the ratio, and a recorded step under other settings."""

from pathlib import Path

import ipywidgets
import numpy as np
import torch

from grpo_kit.grpo import CLIPPED_LOSS_TYPES, LOSS_TYPES
from grpo_kit.runs.record import RunRecord
from grpo_kit.show.pushes import loss_and_push
from grpo_kit.show.style import BLUE, FAINT, GREY, INK, VERMILION, Drawing, explain, signed, styled
from grpo_kit.show.widgets.picture_box import LiveFigure, PictureBox, dropdown, on_change, row, slider
from grpo_kit.show.widgets.what_if import CISPO_CAP, WhatIf

NO_PUSH = 1e-9
HIGHEST_RATIO, HIGHEST = 3.0, 3.2  # of the axes
STEPS = 241
PANELS = {
    "loss of one token": "dashed: −ratio × advantage, with nothing held back; grey: between the bounds",
    "push on its log-probability": "minus the gradient: above 0 more likely, below 0 less likely, at 0 nothing",
}


class LossPlayground(PictureBox):
    """Sliders for a token's ratio and advantage, the bounds and the loss type; loss and push over the ratio.

    With a run (a folder or its record), the step of one of its kept iterations, the last by default, is computed again
    under other settings, each sample's push beside the recorded one (`what_if`). A `KitError` where it kept no such
    rollout, or no log-probabilities.
    """

    def __init__(self, run: RunRecord | Path | str | None = None, iteration: int | None = None) -> None:
        self.what_if = None if run is None else WhatIf(run, iteration)
        self.loss_type = dropdown("loss_type", LOSS_TYPES, LOSS_TYPES[0], 220)
        self.ratio = slider("ratio", 1.3, 0.01, HIGHEST_RATIO)
        self.advantage = slider("advantage", 1.0, -2.0, 2.0)
        self.epsilon = slider("epsilon", 0.2, 0.01, 0.9)
        self.epsilon_high = slider("epsilon_high", 0.2, 0.01, CISPO_CAP)
        self.bounded = ipywidgets.Checkbox(description="delta", indent=False, layout=dict(width="70px"))
        self.delta = slider("", 2.0, 1.05, HIGHEST_RATIO, disabled=True, layout=dict(width="220px"))
        self._live = LiveFigure(_empty_figure())
        bounds = [self.epsilon, self.epsilon_high, self.bounded, self.delta]
        super().__init__([row([self.loss_type, self.ratio, self.advantage]), row(bounds)])
        if self.what_if is not None:
            self.children = [*self.children, self.what_if]
        on_change([self.loss_type], self._suit_bounds)
        on_change([self.ratio, self.advantage, *bounds], self.redraw)

    def _suit_bounds(self) -> None:
        """Let only those bounds be moved that this loss type has; cispo's bounds the ratio itself."""
        cispo, clipped = self.loss_type.value == "cispo", self.loss_type.value in CLIPPED_LOSS_TYPES
        self.epsilon.disabled = self.bounded.disabled = not clipped
        self.epsilon_high.disabled = not clipped and not cispo
        with self.drawn_once():
            if cispo != (self.epsilon_high.value >= 1):
                self.epsilon_high.value = CISPO_CAP if cispo else self.epsilon.value

    def figures(self) -> list[LiveFigure]:
        """Return the curves with the point where the sliders stand, whose `loss` and `push` are kept.

        A point beyond the axes is drawn at their edge; the value beside it stays true.
        """
        self.delta.disabled = self.bounded.disabled or not self.bounded.value
        loss_type, ratio, advantage = self.loss_type.value, self.ratio.value, self.advantage.value
        epsilon, high, delta = self.epsilon.value, self.epsilon_high.value, self.delta.value
        bounds = dict(epsilon=epsilon, epsilon_high=high, delta=delta if self.bounded.value else None)
        free = (1 - epsilon, 1 + high) if loss_type in CLIPPED_LOSS_TYPES else (0.0, high)  # between the bounds
        ratios = torch.tensor([*np.linspace(0.01, HIGHEST_RATIO, STEPS), ratio], dtype=torch.float64)
        curves = [values.tolist() for values in loss_and_push(ratios, advantage, loss_type=loss_type, **bounds)]
        self.loss, self.push = (curve.pop() for curve in curves)
        right = ratio < 0.8 * HIGHEST_RATIO
        with self._live.redrawn() as panels:
            for axes, curve, value, sign in zip(panels, curves, (self.loss, self.push), (-1, 1), strict=True):
                height = max(-HIGHEST, min(HIGHEST, value))
                if not self.epsilon_high.disabled:
                    axes.axvspan(free[0], min(free[1], HIGHEST_RATIO), facecolor=FAINT, alpha=0.45, lw=0)
                axes.plot(ratios[:-1], sign * advantage * ratios[:-1], color=GREY, lw=1.2, ls=(0, (4, 3)))
                axes.plot(ratios[:-1], curve, color=BLUE, lw=2.6)
                axes.plot([ratio, ratio], [0, height], color=VERMILION, lw=1, ls=":")
                axes.plot(ratio, height, marker="o", ms=9, color=VERMILION, mec="white", mew=1.2)
                box = dict(facecolor="white", edgecolor="none", pad=1.5, alpha=0.85)
                words = dict(color=VERMILION, weight="bold", fontsize=12, bbox=box, ha="left" if right else "right")
                place = ratio + (0.08 if right else -0.08), height + (0.3 if height < 2.6 else -0.5)
                axes.text(*place, signed(value), **words)
        return [self._live]

    def reading(self) -> list[str]:
        """Say what happens at the point, from its numbers."""
        ratio, advantage = self.ratio.value, self.advantage.value
        plain = ratio * advantage
        if abs(plain) < NO_PUSH:
            effect = "nothing pushes, since the advantage is 0."
        elif abs(self.push) < NO_PUSH:
            effect = "the push is 0. The bound holds: in this step the token is moved no further that way."
        elif abs(self.push - plain) < NO_PUSH:
            effect = f"the push is {signed(self.push)}, ratio × advantage: nothing is held back."
        else:
            effect = f"the push is {signed(self.push)}, {self.push / plain:.0%} of ratio × advantage ({signed(plain)})."
        return [f"{self.loss_type.value}, ratio {ratio:.2f}, advantage {signed(advantage)}: {effect}"]


@styled
def _empty_figure() -> Drawing:
    """Return the axes: loss and push over the ratio."""
    figure = Drawing(figsize=(11.4, 3.7))
    places = dict(left=0.045, right=0.985, top=0.83, bottom=0.15, wspace=0.12)
    panels = figure.subplots(1, 2, gridspec_kw=places)
    for axes, (title, note) in zip(panels, PANELS.items(), strict=True):
        explain(axes, title, note)
        axes.set(xlim=(0, HIGHEST_RATIO), ylim=(-HIGHEST, HIGHEST), xlabel="ratio, new / old probability of the token")
        axes.axhline(0, color=INK, lw=0.8)
        axes.axvline(1, color=GREY, lw=0.8)
    return figure
