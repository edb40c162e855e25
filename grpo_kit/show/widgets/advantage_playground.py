"""The advantage playground: drag a group's rewards and see what each definition of the advantage makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ipywidgets

from grpo_kit.config import KitError
from grpo_kit.show.frame import signed
from grpo_kit.show.style import Drawing
from grpo_kit.show.widgets.advantage_bars import MOST, AdvantageFigure, advantages_of
from grpo_kit.show.widgets.layout import side_by_side
from grpo_kit.show.widgets.live_figure import LiveFigure
from grpo_kit.show.widgets.markup import message
from grpo_kit.show.widgets.twin import TwinBox

PRESETS = {
    "toy group": (0.80, 0.60, 0.40, 0.20),
    "two, far apart": (0.90, 0.10),
    "two, hardly apart": (0.51, 0.50),
    "tiny spread": (0.703, 0.702, 0.701, 0.700),
    "one stands out": (0.90, 0.30, 0.30, 0.30, 0.30, 0.30, 0.30, 0.30),
    "all equal": (0.60, 0.60, 0.60, 0.60),
}
SMALL = 0.02  # a spread of rewards that may well be noise


class AdvantagePlayground(TwinBox):
    """Sliders for the rewards of a group of 2 to 8, and their advantages under four definitions.

    A second group stands beside it and never changes its rewards. Only where the whole batch's spread divides do its
    advantages move when you move yours.

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
        self._low, self._high = min(0.0, math.floor(min(rewards))), max(1.0, math.ceil(max(rewards)))
        self._quiet = False
        self._bars = AdvantageFigure(self._low, self._high)
        self._bars.show(rewards, advantages_of(rewards))
        self._live = LiveFigure(self._bars.figure, self._bars.moving)
        self._make_controls(len(rewards))
        self._image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width="100%", max_width="1140px"))
        self._words = ipywidgets.HTML(layout=ipywidgets.Layout(min_height="64px"))
        super().__init__(
            [side_by_side([self.size, *self.presets]), ipywidgets.HBox(self.sliders), self._image, self._words]
        )
        self.rewards = rewards

    def _make_controls(self, size: int) -> None:
        self.size = ipywidgets.IntSlider(
            value=size, min=2, max=MOST, description="G, rewards", layout=ipywidgets.Layout(width="280px")
        )
        self.size.observe(lambda _: self._draw(), names="value")
        self.sliders = [self._slider(number) for number in range(1, MOST + 1)]
        self.presets = [self._preset(name) for name in PRESETS]

    def _slider(self, number: int) -> ipywidgets.FloatSlider:
        slider = ipywidgets.FloatSlider(
            value=0.5,
            min=self._low,
            max=self._high,
            step=0.001,
            description=f"r{number}",
            orientation="vertical",
            readout_format=".3f",
            layout=ipywidgets.Layout(height="170px", width="70px"),
        )
        slider.observe(lambda _: self._draw(), names="value")
        return slider

    def _preset(self, name: str) -> ipywidgets.Button:
        def choose(_: ipywidgets.Button) -> None:
            self.rewards = PRESETS[name]

        button = ipywidgets.Button(description=name, layout=ipywidgets.Layout(width="auto"))
        button.on_click(choose)
        return button

    @property
    def rewards(self) -> list[float]:
        """The group's rewards, as the sliders stand."""
        return [slider.value for slider in self.sliders[: self.size.value]]

    @rewards.setter
    def rewards(self, values: Sequence[float]) -> None:
        """Move the sliders to these rewards; the group is as large as there are."""
        with self._drawn_once():
            self.size.value = len(values)
            for slider, value in zip(self.sliders, values, strict=False):
                slider.value = value

    @property
    def advantages(self) -> dict[str, list[float]]:
        """The group's advantages by definition: "group", "batch", "none", "leave_one_out"."""
        return {name: values[: self.size.value] for name, values in advantages_of(self.rewards).items()}

    @contextmanager
    def _drawn_once(self) -> Iterator[None]:
        """Change several sliders and draw once, at the end."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False
        self._draw()

    def _draw(self) -> None:
        if self._quiet:
            return
        for number, slider in enumerate(self.sliders):
            slider.layout.display = None if number < self.size.value else "none"
        self._bars.show(self.rewards, advantages_of(self.rewards))
        self._image.value = self._live.png()
        self._words.value = message(reading(self.rewards))

    def figures(self) -> list[Drawing]:
        """Return the bars as they stand."""
        return [self._bars.figure]

    def summary(self) -> str:
        """Return the rewards and what they make."""
        return f"Advantage playground: rewards {', '.join(f'{r:.3f}' for r in self.rewards)}. {reading(self.rewards)}"


def reading(rewards: Sequence[float]) -> str:
    """Say in words what happens to these rewards; every number is computed from them."""
    spread = max(rewards) - min(rewards)
    if spread == 0:
        return "All rewards are equal: every advantage is exactly 0, and this group teaches nothing."
    loudest = {name: _loudest(values[: len(rewards)]) for name, values in advantages_of(rewards).items()}
    text = f"The rewards lie {spread:.3f} apart. Divided by their own spread, the strongest advantage is "
    text += f"{signed(loudest['group'])}; not divided, it is {signed(loudest['none'], 4)}."
    if len(rewards) == 2:
        wider = _loudest(advantages_of([1.0, 0.0])["group"][:2])
        text += f" With two rewards the gap cancels: rewards 1.000 apart would give ±{abs(wider):.2f}."
    elif spread < SMALL:
        louder = abs(loudest["group"] / loudest["none"])
        text += f" A spread this small may be noise, and the division makes it {louder:.0f} times as loud."
    return text + _second_group(rewards)


def _second_group(rewards: Sequence[float]) -> str:
    strongest = _loudest(advantages_of(rewards)["batch"][len(rewards) :])
    moved = f"the second group's strongest advantage is {signed(strongest)}, which moves with your rewards"
    return f" Divided by the whole batch's spread, {moved}."


def _loudest(values: Sequence[float]) -> float:
    """Return the value furthest from 0, of two equally far ones the positive."""
    return max(values, key=lambda value: (round(abs(value), 9), value))
