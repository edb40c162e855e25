"""The loss playground: one token's loss and gradient over the ratio, and a recorded step under other settings."""

from __future__ import annotations

from pathlib import Path

import ipywidgets

from grpo_kit.grpo import CLIPPED_LOSS_TYPES, LOSS_TYPES
from grpo_kit.runs.record import RunRecord
from grpo_kit.show.frame import signed
from grpo_kit.show.one_token import TokenSettings
from grpo_kit.show.widgets.controls import dropdown, on_change, row, slider
from grpo_kit.show.widgets.live_figure import LiveFigure
from grpo_kit.show.widgets.loss_curves import HIGHEST_RATIO, draw_curves, empty_figure
from grpo_kit.show.widgets.picture_box import PictureBox
from grpo_kit.show.widgets.what_if import CISPO_CAP, WhatIf

NO_PUSH = 1e-9


class LossPlayground(PictureBox):
    """Sliders for a token's ratio and advantage, the bounds and the loss type; loss and push over the ratio.

    Args:
        run: a run folder or its record; None shows the curves alone. With a run, one of its recorded steps is computed
            again under other settings, each sample's push beside the recorded one (`what_if`).
        iteration: which kept rollout to open; the last by default.
        group: which of its prompts; by default the one whose rewards differ most.

    Raises:
        KitError: the run kept no such rollout, it has no such group, or it lacks its tokens' log-probabilities.
    """

    def __init__(
        self, run: RunRecord | Path | str | None = None, iteration: int | None = None, group: int | None = None
    ) -> None:
        self.what_if = None if run is None else WhatIf(run, iteration, group)
        self.loss_type = dropdown("loss_type", LOSS_TYPES, LOSS_TYPES[0], 220)
        self.ratio = slider("ratio", 1.3, 0.01, HIGHEST_RATIO)
        self.advantage = slider("advantage", 1.0, -2.0, 2.0)
        self.epsilon = slider("epsilon", 0.2, 0.01, 0.9)
        self.epsilon_high = slider("epsilon_high", 0.2, 0.01, CISPO_CAP)
        self.bounded = ipywidgets.Checkbox(description="delta", indent=False, layout=dict(width="70px"))
        self.delta = slider("", 2.0, 1.05, HIGHEST_RATIO, disabled=True, layout=dict(width="220px"))
        self._live = LiveFigure(empty_figure())
        bounds = row([self.epsilon, self.epsilon_high, self.bounded, self.delta])
        super().__init__([row([self.loss_type, self.ratio, self.advantage]), bounds])
        if self.what_if is not None:
            self.children = [*self.children, self.what_if]
        on_change([self.loss_type], self._suit_bounds)
        on_change([self.ratio, self.advantage, self.epsilon, self.epsilon_high, self.bounded, self.delta], self.redraw)

    def _suit_bounds(self) -> None:
        """Let only those bounds be moved that this loss type has; cispo's bounds the ratio itself."""
        cispo, clipped = self.loss_type.value == "cispo", self.loss_type.value in CLIPPED_LOSS_TYPES
        self.epsilon.disabled = self.bounded.disabled = not clipped
        self.epsilon_high.disabled = not clipped and not cispo
        with self.drawn_once():
            if cispo != (self.epsilon_high.value >= 1):
                self.epsilon_high.value = CISPO_CAP if cispo else self.epsilon.value

    @property
    def settings(self) -> TokenSettings:
        """What the controls say about the loss."""
        delta = self.delta.value if self.bounded.value else None
        return TokenSettings(self.loss_type.value, self.epsilon.value, self.epsilon_high.value, delta)

    def figures(self) -> list[LiveFigure]:
        """Return the curves with the point where the sliders stand, whose `loss` and `push` are kept."""
        self.delta.disabled = self.bounded.disabled or not self.bounded.value
        with self._live.redrawn() as panels:
            drawn = draw_curves(panels, self.ratio.value, self.advantage.value, self.settings)
        self.loss, self.push = drawn
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
