"""A recorded step under other settings, as a widget: "what would Dr. GRPO have done with this step?"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import ipywidgets

from grpo_kit.grpo import LOSS_TYPES
from grpo_kit.runs.record import RunRecord
from grpo_kit.show.style import Drawing, plain_text
from grpo_kit.show.widgets.groups import chosen_group, chosen_iteration, prompt_of, spreads
from grpo_kit.show.widgets.layout import side_by_side, wide
from grpo_kit.show.widgets.markup import message
from grpo_kit.show.widgets.recompute import Pushes, StepSettings, recompute, recorded_settings
from grpo_kit.show.widgets.twin import TwinBox
from grpo_kit.show.widgets.what_if_figure import prompt_shares, what_if_figure

DPI = 130
CISPO_CAP = 5.0  # its authors' bound of the ratio; the other types' epsilon_high means 1 + that
PRESETS = {
    "as recorded": {},
    "Dr. GRPO": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "RLOO": {"baseline": "leave_one_out", "scale_rewards": "none"},
    "GSPO": {"importance_sampling_level": "sequence"},
    "DAPO": {"loss_type": "dapo"},
}
OPENING = PRESETS["Dr. GRPO"]  # what it opens with, so that its picture in a report compares something
CHOICES = {
    "loss_type": LOSS_TYPES,
    "scale_rewards": ("group", "batch", "none"),
    "baseline": ("mean", "leave_one_out"),
    "importance_sampling_level": ("token", "sequence"),
}
SCALES = {"epsilon": (0.05, 0.1, 0.2, 0.3, 0.5), "beta": (0.0, 0.01, 0.04, 0.1, 0.5, 1.0)}


class WhatIf(TwinBox):
    """One group of a kept rollout: what the step did to each sample, and what it would have done.

    It opens with Dr. GRPO's settings beside the recorded ones.

    Args:
        record: a run whose rollouts hold their tokens' log-probabilities.
        iteration: a kept rollout; the last by default.
        group: one of its prompts; by default the one whose rewards differ most.

    Raises:
        KitError: there is no such rollout or group, or it was kept without log-probabilities.
    """

    def __init__(self, record: RunRecord, iteration: int | None = None, group: int | None = None) -> None:
        self._record, self._quiet = record, False
        self._recorded = recorded_settings(record.config)
        first = chosen_iteration(record, iteration)
        self._rollout = record.rollout(first).reset_index(drop=True)
        self._make_controls(first, chosen_group(self._rollout, group))
        self._image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width="100%", max_width="1140px"))
        self._words = ipywidgets.HTML(layout=ipywidgets.Layout(min_height="64px"))
        super().__init__(
            [
                side_by_side([self.iteration, self.prompt, self.moment]),
                side_by_side(self.presets),
                side_by_side(self.choices.values()),
                self._image,
                self._words,
            ]
        )
        self._draw()

    def _make_controls(self, iteration: int, group: int) -> None:
        kept = self._record.rollout_iterations
        self.iteration = ipywidgets.Dropdown(options=kept, value=iteration, description="iteration", layout=wide(170))
        self.prompt = ipywidgets.Dropdown(options=self._prompts(), value=group, description="prompt", layout=wide(470))
        moments = [("before the step: all ratios are 1", False), ("after the recorded step", True)]
        self.moment = ipywidgets.Dropdown(options=moments, description="policy", layout=wide(340))
        self.choices = {name: self._choice(name) for name in CHOICES} | {name: self._scale(name) for name in SCALES}
        self.presets = [self._preset(name) for name in PRESETS]
        self.iteration.observe(lambda change: self._open(change["new"]), names="value")
        for control in (self.prompt, self.moment, *self.choices.values()):
            control.observe(lambda _: self._draw(), names="value")

    def _choice(self, name: str) -> ipywidgets.Dropdown:
        label = "level" if name == "importance_sampling_level" else name
        return ipywidgets.Dropdown(
            options=CHOICES[name],
            value=OPENING.get(name, getattr(self._recorded, name)),
            description=label,
            style={"description_width": "initial"},
            layout=wide(250),
        )

    def _scale(self, name: str) -> ipywidgets.SelectionSlider:
        recorded = getattr(self._recorded, name)
        return ipywidgets.SelectionSlider(
            options=sorted({*SCALES[name], recorded}),
            value=recorded,
            description=name,
            style={"description_width": "initial"},
            continuous_update=False,
            layout=wide(250),
        )

    def _prompts(self) -> list[tuple[str, int]]:
        return [(plain_text(prompt_of(self._rollout, g), 60), int(g)) for g in spreads(self._rollout).index]

    def _preset(self, name: str) -> ipywidgets.Button:
        def choose(_: ipywidgets.Button) -> None:
            with self._drawn_once():
                for setting, control in self.choices.items():
                    control.value = PRESETS[name].get(setting, getattr(self._recorded, setting))

        button = ipywidgets.Button(description=name, layout=ipywidgets.Layout(width="auto"))
        button.on_click(choose)
        return button

    def _open(self, iteration: int) -> None:
        self._rollout = self._record.rollout(iteration).reset_index(drop=True)
        with self._drawn_once():
            self.prompt.options = self._prompts()
            self.prompt.value = chosen_group(self._rollout, None)

    @contextmanager
    def _drawn_once(self) -> Iterator[None]:
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False
        self._draw()

    @property
    def settings(self) -> StepSettings:
        """The recorded settings with what was chosen here."""
        chosen = {name: control.value for name, control in self.choices.items()}
        settings = replace(self._recorded, **chosen)
        if settings.loss_type == "cispo" and (settings.epsilon_high or 0.0) < 1:
            return replace(settings, epsilon_high=CISPO_CAP)
        return settings

    @property
    def pushes(self) -> tuple[Pushes, Pushes]:
        """What the step did, and what it would have done, for every row of the rollout."""
        after = self.moment.value
        return recompute(self._rollout, self._recorded, after), recompute(self._rollout, self.settings, after)

    def _draw(self) -> None:
        if not self._quiet:
            self._image.value = self.figures()[0].to_png(DPI)
            self._words.value = message(self._reading())

    def _reading(self) -> str:
        """Say what changed, in numbers of this step."""
        if self.settings == self._recorded:
            return "These are the settings that the step was made with. Choose others, or a button above."
        recorded, other = self.pushes
        if not recorded.total or not other.total:
            return "One of the two would not have moved anything: no advantage differs from 0."
        before, after = (prompt_shares(self._rollout, pushes) for pushes in (recorded, other))
        prompt = (after - before).abs().idxmax()
        words, apart = plain_text(prompt_of(self._rollout, prompt), 60), spreads(self._rollout)[prompt]
        return (
            f"The whole push would have been {other.total / recorded.total:.2f} times the recorded one (Adam divides "
            f"such a factor out again). Among the prompts, “{words}”, whose rewards lie {apart:.3f} apart, changes "
            f"most: from {before[prompt]:.0%} to {after[prompt]:.0%} of the step."
        )

    def figures(self) -> list[Drawing]:
        """Return the comparison as it stands."""
        return [what_if_figure(self._rollout, self.prompt.value, *self.pushes)]

    def summary(self) -> str:
        """Return the settings and what they change."""
        return f"Iteration {self.iteration.value} with {self.settings.loss_type}: {self._reading()}"
