"""The groups of a run's kept rollouts: a widget that shows one, and what rows of a rollout say in words."""

import math
from collections.abc import Mapping
from pathlib import Path

import ipywidgets
import pandas as pd

from grpo_kit.config import KitError
from grpo_kit.config.media import Medium
from grpo_kit.evaluation.table import format_metric, metric_name
from grpo_kit.runs.record import RunRecord, read_run
from grpo_kit.show.style import plain_text
from grpo_kit.show.widgets.picture_box import PictureBox, dropdown, on_change


class GroupBox(PictureBox):
    """A picture of one group, and controls that choose the kept rollout (`iteration`) and the group (`prompt`).

    A run, a folder or its record, is opened at its last kept rollout or the given one (not kept: a `KitError`), and at
    the group whose rewards differ most. A subclass adds its own `controls`, which may depend on the opened `rollout`.
    """

    def __init__(self, run: RunRecord | Path | str, iteration: int | None = None) -> None:
        self.record = run if isinstance(run, RunRecord) else read_run(run)
        kept = self.record.rollout_iterations
        if not kept:
            how = "Train at least one iteration, or choose another run."
            raise KitError(f"run {self.record.path}: found no kept rollout. {how}")
        self.iteration = dropdown("iteration", kept, kept[-1], 160)
        self.prompt = dropdown("prompt", (), None, 540)
        self._open(kept[-1] if iteration is None else iteration)
        super().__init__(self.controls())
        on_change([self.iteration], lambda: self._open(self.iteration.value))
        on_change([self.prompt], self.redraw)

    def controls(self) -> list[ipywidgets.Widget]:
        """Return what stands above the picture, `iteration` and `prompt` among it."""
        raise NotImplementedError

    def _open(self, iteration: int) -> None:
        """Show an iteration, at the group whose rewards differ most."""
        self.rollout = self.record.rollout(iteration).reset_index(drop=True)
        apart = ranges(self.rollout)
        names = [f"{self.name_of(group, 60)}   (rewards {apart[group]:.3f} apart)" for group in apart.index]
        with self.drawn_once():
            self.iteration.value = iteration
            self.prompt.options = list(zip(names, map(int, apart.index), strict=True))
            self.prompt.value = int(apart.idxmax())

    def name_of(self, group: int, limit: int = 400) -> str:
        """Return what the user asked for in a group, as plain text."""
        return plain_text(self.rollout.loc[self.rollout["group_id"] == group, "user_prompt"].iloc[0], limit)


def ranges(rollout: pd.DataFrame) -> pd.Series:
    """Return each group's highest less lowest reward, by group id; 0 where fewer than two were scored."""
    rewards = rollout.groupby("group_id")["reward"]
    return (rewards.max() - rewards.min()).fillna(0.0)


def parts_text(row: Mapping[str, object]) -> str:
    """Return the single rewards of a row of a rollout in a line: `CLIP similarity 0.882 · gold check 60.0 %`."""
    parts = {str(name).removeprefix("reward/"): row[name] for name in row if str(name).startswith("reward/")}
    scored = {name: value for name, value in parts.items() if value != math.inf}  # the others abstained
    texts = [f"{metric_name(name)} {format_metric(name, value)}" for name, value in scored.items()]
    return " · ".join(texts).replace(" %", "\N{NO-BREAK SPACE}%")


def range_text(rewards: pd.Series) -> str:
    """Return the range and the deviation of rewards: `rewards from 0.082 to 0.882, standard deviation 0.258`."""
    low, high, deviation = (format_metric("reward", v) for v in (rewards.min(), rewards.max(), rewards.std()))
    return f"rewards from {low} to {high}, standard deviation {deviation}"


def open_image(record: RunRecord, thumbnail: object) -> Medium | None:
    """Open the picture, film or sound that a row names; None where it names none or the file is gone."""
    if not isinstance(thumbnail, str) or not thumbnail or not record.file(thumbnail).is_file():
        return None
    return record.medium(thumbnail)
