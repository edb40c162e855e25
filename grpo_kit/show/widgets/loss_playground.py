"""The loss playground: one token's loss and gradient over the ratio, and a recorded step under other settings."""

from functools import partial
from pathlib import Path
from typing import get_args

import ipywidgets
import numpy as np
import pandas as pd
import torch

from grpo_kit.config import TrainingSettings
from grpo_kit.evaluation.table import number_text
from grpo_kit.grpo import CLIPPED_LOSS_TYPES, LOSS_TYPES
from grpo_kit.runs.record import RunRecord
from grpo_kit.show.pushes import Pushes, loss_and_push, recompute
from grpo_kit.show.style import BLUE, FAINT, GREY, INK, VERMILION, Drawing, explain, signed, styled
from grpo_kit.show.widgets.kept_groups import GroupBox, ranges
from grpo_kit.show.widgets.picture_box import LiveFigure, PictureBox, button, dropdown, look, on_change, row, slider

NO_PUSH = 1e-9
HIGHEST_RATIO, HIGHEST = 3.0, 3.2  # of the axes
STEPS = 241
PANELS = {
    "loss of one token": "dashed: −ratio × advantage, with nothing held back; grey: between the bounds",
    "push on its log-probability": "minus the gradient: above 0 more likely, below 0 less likely, at 0 nothing",
}
CISPO_CAP = 5.0  # its authors' bound of the ratio; the other types' epsilon_high means 1 + that
PRESETS = {
    "as recorded": {},
    "Dr. GRPO": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "RLOO": {"baseline": "leave_one_out", "scale_rewards": "none"},
    "GSPO": {"importance_sampling_level": "sequence"},
    "DAPO": {"loss_type": "dapo"},
}
OPENING = PRESETS["Dr. GRPO"]  # what it opens with, so that its picture in a report compares something
CHOICES = ("loss_type", "scale_rewards", "baseline", "importance_sampling_level")
SCALES = {"epsilon": (0.05, 0.1, 0.2, 0.3, 0.5), "beta": (0.0, 0.01, 0.04, 0.1, 0.5, 1.0)}
LEGEND = "outline: as recorded · filled: with these settings · below each rewrite its reward and its tokens"
OUTLINE = dict(facecolor="none", edgecolor=INK, lw=1.1, zorder=3)
PUSH_PANELS = {  # field of the pushes → title, factor
    "advantages": ("advantage of each rewrite", 1),
    "weights": ("weight of one of its tokens, in thousandths", 1000),
    "shares": ("push on each rewrite, % of the whole step", 100),
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


class WhatIf(GroupBox):
    """One group of a kept rollout: what the step did to each sample, and what it would have done.

    It opens with Dr. GRPO's settings beside the recorded ones; a `KitError` where there are no log-probabilities.
    """

    def controls(self) -> list[ipywidgets.Widget]:
        """Return the choice of a group and of the moment, the presets, and one control a setting."""
        self.recorded = TrainingSettings.model_construct(**self.record.config.get("training_settings", {}))
        moments = [("before the step: all ratios are 1", False), ("after the recorded step", True)]
        self.moment = dropdown("policy", moments, False, 340)
        self.choices: dict[str, ipywidgets.Widget] = {}
        for name in CHOICES:
            options = get_args(TrainingSettings.model_fields[name].annotation)
            value = OPENING.get(name, getattr(self.recorded, name))
            self.choices[name] = dropdown(name.replace("importance_sampling_", ""), options, value, 250)
        for name, options in SCALES.items():
            value = getattr(self.recorded, name)
            scale = dict(options=sorted({*options, value}), value=value, continuous_update=False)
            self.choices[name] = ipywidgets.SelectionSlider(**scale, **look(name, "250px"))
        self.presets = [button(name, partial(self._choose, changes)) for name, changes in PRESETS.items()]
        on_change([self.moment, *self.choices.values()], self.redraw)
        return [row([self.iteration, self.prompt, self.moment]), row(self.presets), row(self.choices.values())]

    def _choose(self, changes: dict[str, str]) -> None:
        """Set the controls to the recorded settings with these changes."""
        with self.drawn_once():
            for name, control in self.choices.items():
                control.value = changes.get(name, getattr(self.recorded, name))

    @property
    def settings(self) -> TrainingSettings:
        """The recorded settings with what was chosen here."""
        changes = {name: control.value for name, control in self.choices.items()}
        if changes["loss_type"] == "cispo" and (self.recorded.epsilon_high or 0.0) < 1:
            changes["epsilon_high"] = CISPO_CAP
        return self.recorded.model_copy(update=changes)

    @property
    def pushes(self) -> tuple[Pushes, Pushes]:
        """What the step did, and what it would have done, for every row of the rollout."""
        longest = self.record.config.get("generation_settings", {}).get("max_new_tokens")
        return tuple(recompute(self.rollout, s, longest, self.moment.value) for s in (self.recorded, self.settings))

    def reading(self) -> list[str]:
        """Say what changed, in numbers of this step."""
        if self.settings == self.recorded:
            return ["These are the settings that the step was made with. Choose others, or a button above."]
        recorded, other = self.pushes
        if not recorded.total or not other.total:
            return ["One of the two would not have moved anything: no advantage differs from 0."]
        before, after = (self._prompt_shares(pushes) for pushes in (recorded, other))
        prompt = (after - before).abs().idxmax()
        return [
            f"The whole push would have been {other.total / recorded.total:.2f} times the recorded one (Adam divides "
            f"such a factor out again). Among the prompts, “{self.name_of(prompt, 60)}”, whose rewards lie "
            f"{ranges(self.rollout)[prompt]:.3f} apart, changes most: from {before[prompt]:.0%} to "
            f"{after[prompt]:.0%} of the step."
        ]

    def _prompt_shares(self, pushes: Pushes) -> pd.Series:
        """Return by group id which share of the step's push goes to the prompt's samples, whatever their signs."""
        return pd.Series(np.abs(pushes.shares)).groupby(self.rollout["group_id"].to_numpy()).sum()

    @styled
    def figures(self) -> list[Drawing]:
        """Return one group's advantages, token weights and pushes, and every prompt's share of the step."""
        group = self.rollout[self.rollout["group_id"] == self.prompt.value]
        group = group.sort_values("reward", ascending=False, kind="stable")
        samples = zip(group["reward"], group["completion_ids"], strict=True)
        names = [f"{number_text(reward, '.2f')}\n{len(ids)}" for reward, ids in samples]
        steps = self.pushes
        figure = Drawing(figsize=(11.4, 5.8), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.09, w_pad=0.09)
        title = f"iteration {self.iteration.value}, computed again with other settings"
        figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=13)
        halves = figure.subfigures(2, 1)  # apart, so that the prompts' names take no room above them
        *panels, prompts = (axes for half in halves for axes in half.subplots(1, 2))
        for axes, (name, (title, factor)) in zip(panels, PUSH_PANELS.items(), strict=True):
            recorded, other = (factor * getattr(step, name)[group.index] for step in steps)
            places = np.arange(len(group))
            axes.bar(places, recorded, width=0.82, **OUTLINE)
            signs = dict(color=np.where(other < 0, VERMILION, BLUE), hatch=np.where(other < 0, "////", ""))
            axes.bar(places, other, width=0.5, edgecolor="white", lw=0.5, zorder=2, **signs)
            axes.set_xticks(places, names)
            axes.axhline(0, color=INK, lw=0.8)
            axes.margins(x=0.03, y=0.08)
            axes.set_title(title)
        shares = [100 * self._prompt_shares(step) for step in steps]
        places = np.arange(len(shares[0]))[::-1]
        colours = [BLUE if number == self.prompt.value else GREY for number in shares[0].index]
        prompts.barh(places, shares[0], height=0.82, **OUTLINE)
        prompts.barh(places, shares[1], height=0.5, color=colours, zorder=2)
        prompts.set_yticks(places, [self.name_of(number, 30) for number in shares[0].index])
        prompts.set_title("each prompt's share, %")
        prompts.grid(True, axis="x")
        prompts.grid(False, axis="y")
        figure.supxlabel(LEGEND, fontsize=9.5, color=GREY)
        return [figure]
