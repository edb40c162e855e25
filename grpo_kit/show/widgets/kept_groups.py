"""The groups of a run's kept rollouts: a widget that shows one, and what rows of a rollout say in words."""

import math
from collections.abc import Mapping
from pathlib import Path

import ipywidgets
import pandas as pd
from PIL import Image

from grpo_kit.config import KitError
from grpo_kit.evaluation.table import format_metric, metric_name
from grpo_kit.runs.record import RunRecord, read_run
from grpo_kit.show.style import plain_text
from grpo_kit.show.widgets.picture_box import PictureBox, dropdown, on_change


class GroupBox(PictureBox):
    """A picture of one group, and controls that choose the kept rollout (`iteration`) and the group (`prompt`).

    A subclass adds its own `controls`, which may depend on the opened `rollout`.

    Args:
        run: a run folder, or its record.
        iteration: which kept rollout to open; the last by default.
        group: which of its prompts, counted from 0; by default the one whose rewards differ most.

    Raises:
        KitError: the run kept no such rollout, or it has no such group.
    """

    def __init__(self, run: RunRecord | Path | str, iteration: int | None = None, group: int | None = None) -> None:
        self.record = open_run(run)
        kept = self.record.rollout_iterations
        if not kept:
            raise KitError(
                f"run {self.record.path}: found no kept rollout. Train at least one iteration, or choose another run."
            )
        if iteration is not None and iteration not in kept:
            allowed = ", ".join(map(str, kept))
            raise KitError(f"iteration: found {iteration}, allowed: {allowed}. Choose a kept rollout.")
        iteration = kept[-1] if iteration is None else iteration
        self.rollout = self.record.rollout(iteration).reset_index(drop=True)
        groups = [value for _, value in self._prompts()]
        if group is not None and group not in groups:
            raise KitError(
                f"group: found {group}, allowed: {groups[0]} to {groups[-1]}. Choose a prompt of this iteration."
            )
        group = int(ranges(self.rollout).idxmax()) if group is None else group
        self.iteration = dropdown("iteration", kept, iteration, 160)
        self.prompt = dropdown("prompt", self._prompts(), group, 540)
        super().__init__(self.controls())
        on_change([self.iteration], self._open)
        on_change([self.prompt], self.redraw)

    def controls(self) -> list[ipywidgets.Widget]:
        """Return what stands above the picture, `iteration` and `prompt` among it."""
        raise NotImplementedError

    def _prompts(self) -> list[tuple[str, int]]:
        apart = ranges(self.rollout)
        return [(f"{self.name_of(g, 60)}   (rewards {apart[g]:.3f} apart)", int(g)) for g in apart.index]

    def _open(self) -> None:
        """Show another iteration, at the group whose rewards differ most."""
        self.rollout = self.record.rollout(self.iteration.value).reset_index(drop=True)
        with self.drawn_once():
            self.prompt.options = self._prompts()
            self.prompt.value = int(ranges(self.rollout).idxmax())

    def name_of(self, group: int, limit: int = 400) -> str:
        """Return what the user asked for in a group, as plain text."""
        return plain_text(self.rollout.loc[self.rollout["group_id"] == group, "user_prompt"].iloc[0], limit)


def open_run(run: RunRecord | Path | str) -> RunRecord:
    """Return the record of a run given as a record or as its folder."""
    return run if isinstance(run, RunRecord) else read_run(run)


def ranges(rollout: pd.DataFrame) -> pd.Series:
    """Return each group's highest less lowest reward, by group id; 0 where fewer than two were scored."""
    rewards = rollout.groupby("group_id")["reward"]
    return (rewards.max() - rewards.min()).fillna(0.0)


def parts_text(row: Mapping[str, object]) -> str:
    """Return the single rewards of a row of a rollout in a line: `CLIP similarity 0.882 · gold check 60.0 %`."""
    names = [str(name).removeprefix("reward/") for name in row if str(name).startswith("reward/")]
    names = [name for name in names if row[f"reward/{name}"] != math.inf]  # it abstained
    parts = [f"{metric_name(name)} {format_metric(name, row[f'reward/{name}'])}" for name in names]
    return " · ".join(parts).replace(" %", "\N{NO-BREAK SPACE}%")


def range_text(rewards: pd.Series) -> str:
    """Return the range and the deviation of rewards: `rewards from 0.082 to 0.882, standard deviation 0.258`."""
    low, high, deviation = (format_metric("reward", v) for v in (rewards.min(), rewards.max(), rewards.std()))
    return f"rewards from {low} to {high}, standard deviation {deviation}"


def open_image(record: RunRecord, thumbnail: object) -> Image.Image | None:
    """Open the picture that a row names; None where it names none or the file is gone."""
    if not isinstance(thumbnail, str) or not thumbnail or not record.file(thumbnail).is_file():
        return None
    return record.image(thumbnail)
