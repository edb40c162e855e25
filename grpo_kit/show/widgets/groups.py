"""Reading a run for the widgets: which rollouts it kept, their groups, pictures and the clip range it trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from PIL import Image

from grpo_kit.config import KitError
from grpo_kit.runs.record import RunRecord, read_run
from grpo_kit.show.style import format_metric, metric_name


def open_run(run: RunRecord | Path | str) -> RunRecord:
    """Return the record of a run given as a record or as its folder."""
    return run if isinstance(run, RunRecord) else read_run(run)


def chosen_iteration(record: RunRecord, iteration: int | None) -> int:
    """Return `iteration` if its rollout was kept, the last one kept for None.

    Raises:
        KitError: that rollout, or every one, was not kept.
    """
    kept = record.rollout_iterations
    if not kept:
        raise KitError(
            f"run {record.path}: found no kept rollout. Train at least one iteration, or choose another run."
        )
    if iteration is not None and iteration not in kept:
        raise KitError(f"iteration: found {iteration}, allowed: {', '.join(map(str, kept))}. Choose a kept rollout.")
    return kept[-1] if iteration is None else iteration


def chosen_group(rollout: pd.DataFrame, group: int | None) -> int:
    """Return `group` if the rollout has it, the one whose rewards differ most for None.

    Raises:
        KitError: there is no such group.
    """
    ids = sorted(int(i) for i in rollout["group_id"].unique())
    if group is not None and group not in ids:
        raise KitError(f"group: found {group}, allowed: {ids[0]} to {ids[-1]}. Choose a prompt of this iteration.")
    return int(spreads(rollout).idxmax()) if group is None else group


def spreads(rollout: pd.DataFrame) -> pd.Series:
    """Return each group's highest less lowest reward, by group id; 0 where fewer than two were scored."""
    rewards = rollout.groupby("group_id")["reward"]
    return (rewards.max() - rewards.min()).fillna(0.0)


def prompt_of(rollout: pd.DataFrame, group: int) -> str:
    """Return what the user asked for in a group."""
    return str(rollout.loc[rollout["group_id"] == group, "user_prompt"].iloc[0])


def parts_text(row: Mapping[str, object]) -> str:
    """Return the single rewards of a row of a rollout in a line: `CLIP similarity 0.882 · gold check 60.0 %`."""
    names = [str(name).removeprefix("reward/") for name in row if str(name).startswith("reward/")]
    parts = [f"{metric_name(name)} {format_metric(name, row[f'reward/{name}'])}" for name in names]
    return " · ".join(parts).replace(" %", "\N{NO-BREAK SPACE}%")


def range_text(rewards: pd.Series) -> str:
    """Return the range and the spread of rewards: `rewards from 0.082 to 0.882, standard deviation 0.258`."""
    low, high, spread = (format_metric("reward", v) for v in (rewards.min(), rewards.max(), rewards.std()))
    return f"rewards from {low} to {high}, standard deviation {spread}"


def open_image(record: RunRecord, thumbnail: object) -> Image.Image | None:
    """Open the picture that a row names; None where it names none or the file is gone."""
    if not isinstance(thumbnail, str) or not thumbnail or not record.file(thumbnail).is_file():
        return None
    return record.image(thumbnail)


def clip_range(record: RunRecord) -> tuple[float, float]:
    """Return the lowest and highest ratio that the run's clip left alone."""
    training = record.config.get("training_settings", {})
    low = training.get("epsilon", 0.2)
    high = training.get("epsilon_high")
    return 1 - low, 1 + (low if high is None else high)
