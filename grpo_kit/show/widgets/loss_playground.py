"""The loss playground: one token's loss and gradient over the ratio, and a recorded step under other settings."""

from __future__ import annotations

from pathlib import Path

import ipywidgets

from grpo_kit.grpo import CLIPPED_LOSS_TYPES, LOSS_TYPES
from grpo_kit.runs.record import RunRecord
from grpo_kit.show.frame import signed
from grpo_kit.show.one_token import TokenSettings
from grpo_kit.show.style import Drawing
from grpo_kit.show.widgets.groups import open_run
from grpo_kit.show.widgets.layout import side_by_side, wide
from grpo_kit.show.widgets.live_figure import LiveFigure
from grpo_kit.show.widgets.loss_curves import HIGHEST_RATIO, LossCurves
from grpo_kit.show.widgets.markup import heading, message, sheet
from grpo_kit.show.widgets.twin import TwinBox
from grpo_kit.show.widgets.what_if import CISPO_CAP, WhatIf

NO_PUSH = 1e-9


class LossPlayground(TwinBox):
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
        self.what_if = None if run is None else WhatIf(open_run(run), iteration, group)
        self._curves = LossCurves()
        self._make_controls()
        self._curves.show(self.ratio.value, self.advantage.value, self.settings)
        self._live = LiveFigure(self._curves.figure, self._curves.moving)
        self._image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width="100%", max_width="1140px"))
        self._words = ipywidgets.HTML(layout=ipywidgets.Layout(min_height="46px"))
        bounds = side_by_side([self.epsilon, self.epsilon_high, self.bounded, self.delta])
        parts = [side_by_side([self.loss_type, self.ratio, self.advantage]), bounds, self._image, self._words]
        if self.what_if is not None:
            title = heading(
                "A recorded step, computed again", "What would Dr. GRPO, or any other settings, have done with it?"
            )
            parts += [ipywidgets.HTML(sheet(title)), self.what_if]
        super().__init__(parts)
        self._draw()

    def _make_controls(self) -> None:
        self.loss_type = ipywidgets.Dropdown(options=LOSS_TYPES, description="loss_type", layout=wide(220))
        self.ratio = _slider("ratio", 1.3, 0.01, HIGHEST_RATIO)
        self.advantage = _slider("advantage", 1.0, -2.0, 2.0)
        self.epsilon = _slider("epsilon", 0.2, 0.01, 0.9)
        self.epsilon_high = _slider("epsilon_high", 0.2, 0.01, CISPO_CAP)
        self.bounded = ipywidgets.Checkbox(description="delta", indent=False, layout=wide(70))
        self.delta = _slider("", 2.0, 1.05, HIGHEST_RATIO)
        self.loss_type.observe(lambda change: self._suit(change["new"]), names="value")
        for control in (self.ratio, self.advantage, self.epsilon, self.epsilon_high, self.bounded, self.delta):
            control.observe(lambda _: self._draw(), names="value")

    def _suit(self, loss_type: str) -> None:
        """Let only those bounds be moved that this loss type has; cispo's bounds the ratio itself."""
        clipped = loss_type in CLIPPED_LOSS_TYPES
        self.epsilon.disabled = self.bounded.disabled = not clipped
        self.epsilon_high.disabled = not clipped and loss_type != "cispo"
        if (loss_type == "cispo") != (self.epsilon_high.value >= 1):
            self.epsilon_high.value = CISPO_CAP if loss_type == "cispo" else self.epsilon.value
        self._draw()

    @property
    def settings(self) -> TokenSettings:
        """What the controls say about the loss."""
        delta = self.delta.value if self.bounded.value else None
        return TokenSettings(self.loss_type.value, self.epsilon.value, self.epsilon_high.value, delta)

    def _draw(self) -> None:
        self.delta.disabled = self.bounded.disabled or not self.bounded.value
        self.loss, self.push = self._curves.show(self.ratio.value, self.advantage.value, self.settings)
        self._image.value = self._live.png()
        self._words.value = message(self._reading())

    def _reading(self) -> str:
        """Say what happens at the point, from its numbers."""
        ratio, advantage = self.ratio.value, self.advantage.value
        plain = ratio * advantage
        where = f"{self.loss_type.value}, ratio {ratio:.2f}, advantage {signed(advantage)}: "
        if abs(plain) < NO_PUSH:
            return where + "nothing pushes, since the advantage is 0."
        if abs(self.push) < NO_PUSH:
            return where + "the push is 0. The bound holds: in this step the token is moved no further that way."
        if abs(self.push - plain) < NO_PUSH:
            return where + f"the push is {signed(self.push)}, ratio × advantage: nothing is held back."
        return (
            where + f"the push is {signed(self.push)}, {self.push / plain:.0%} of ratio × advantage ({signed(plain)})."
        )

    def figures(self) -> list[Drawing]:
        """Return the curves, and the recorded step below them."""
        return [self._curves.figure, *(self.what_if.figures() if self.what_if is not None else [])]

    def summary(self) -> str:
        """Return what happens at the point, and with the recorded step."""
        below = f" {self.what_if.summary()}" if self.what_if is not None else ""
        return f"Loss playground: {self._reading()}{below}"


def _slider(name: str, value: float, low: float, high: float) -> ipywidgets.FloatSlider:
    return ipywidgets.FloatSlider(
        value=value,
        min=low,
        max=high,
        step=0.01,
        description=name,
        style={"description_width": "initial"},
        layout=wide(300 if name else 220),
    )
