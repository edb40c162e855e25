"""The picture of a recorded step beside the same step under other settings: sample by sample, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from grpo_kit.show.style import BLUE, GREY, INK, VERMILION, Drawing, plain_text, styled
from grpo_kit.show.widgets.groups import prompt_of
from grpo_kit.show.widgets.recompute import Pushes

PROMPT_LENGTH = 30


@styled
def what_if_figure(rollout: pd.DataFrame, group: int, recorded: Pushes, other: Pushes) -> Drawing:
    """Draw one group's advantages, token weights and pushes, and every prompt's share of the step.

    Args:
        rollout: all rows of an iteration, numbered from 0.
        group: the prompt whose samples are drawn, best first.
        recorded, other: what the step did and what it would have done, a value each row.
    """
    rows = rollout[rollout["group_id"] == group].sort_values("reward", ascending=False, kind="stable").index
    figure = Drawing(figsize=(11.4, 5.5), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.09)
    upper, lower = figure.subfigures(2, 1)  # apart, so that the prompts' names take no room above them
    (advantages, weights), (pushes, prompts) = upper.subplots(1, 2), lower.subplots(1, 2)
    labels = [_sample_label(rollout.loc[row]) for row in rows]
    _pairs(advantages, labels, recorded.advantages[rows], other.advantages[rows], "advantage of each rewrite")
    title = "weight of one of its tokens, in thousandths"
    _pairs(weights, labels, 1000 * recorded.weights[rows], 1000 * other.weights[rows], title)
    title = "push on each rewrite, % of the whole step"
    _pairs(pushes, labels, 100 * recorded.shares[rows], 100 * other.shares[rows], title)
    _draw_prompts(prompts, rollout, group, recorded, other)
    figure.supxlabel(
        "outline: as recorded · filled: with these settings · below each rewrite its reward and its tokens",
        fontsize=8.5,
        color=GREY,
    )
    return figure


def _sample_label(row: pd.Series) -> str:
    reward = f"{row['reward']:.2f}" if row["reward"] == row["reward"] else "–"
    return f"{reward}\n{len(row['completion_ids'])}"


def _pairs(axes: Axes, labels: Sequence[str], recorded: np.ndarray, other: np.ndarray, title: str) -> None:
    """Draw two bars a sample: the recorded one an outline, the other one filled by its sign."""
    places = np.arange(len(labels))
    axes.bar(places, recorded, width=0.82, facecolor="none", edgecolor=INK, lw=1.1, zorder=3)
    bars = axes.bar(places, other, width=0.5, color=_by_sign(other), edgecolor="white", lw=0.5, zorder=2)
    for bar, value in zip(bars, other, strict=True):
        bar.set_hatch("////" if value < 0 else None)
    axes.axhline(0, color=INK, lw=0.8)
    axes.set_xticks(places, labels, fontsize=8)
    axes.set_title(title)
    axes.margins(x=0.03, y=0.08)


def _by_sign(values: np.ndarray) -> list[str]:
    return [VERMILION if value < 0 else BLUE for value in values]


def prompt_shares(rollout: pd.DataFrame, pushes: Pushes) -> pd.Series:
    """Return by group id which share of the step's push goes to the prompt's samples, whatever their signs."""
    return pd.Series(np.abs(pushes.shares)).groupby(rollout["group_id"].to_numpy()).sum()


def _draw_prompts(axes: Axes, rollout: pd.DataFrame, group: int, recorded: Pushes, other: Pushes) -> None:
    before, after = (100 * prompt_shares(rollout, pushes) for pushes in (recorded, other))
    places = np.arange(len(before))[::-1]
    axes.barh(places, before, height=0.82, facecolor="none", edgecolor=INK, lw=1.1, zorder=3)
    axes.barh(places, after, height=0.5, color=[BLUE if g == group else GREY for g in before.index], zorder=2)
    axes.set_yticks(places, [plain_text(prompt_of(rollout, g), PROMPT_LENGTH) for g in before.index], fontsize=8)
    axes.set_title("each prompt's share, %")
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
