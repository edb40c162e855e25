"""What a step did to each token of a group: the change of its log-probability, its ratio, its KL from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from grpo_kit.grpo import kl_divergence
from grpo_kit.show.frame import signed
from grpo_kit.show.style import plain_text

BLUE_RGB, VERMILION_RGB, PURPLE_RGB = (0, 114, 178), (213, 94, 0), (143, 78, 139)
DEEPEST = 0.55  # opacity of the strongest tint: dark text stays readable on it
QUANTILE = 0.95  # of the sizes in a group: one outlier does not pale all the others


@dataclass(frozen=True)
class Measure:
    """A number a token: its name, the columns of a rollout that it needs, its colour."""

    name: str
    columns: tuple[str, str]
    floor: float  # sizes below it stay pale, however small all others are
    above: tuple[int, int, int]  # the colour of values above the middle


MEASURES = {
    "change": Measure("change of log-probability", ("new_logprobs", "old_logprobs"), 0.02, BLUE_RGB),
    "ratio": Measure("ratio, after / before the step", ("new_logprobs", "old_logprobs"), 0.02, BLUE_RGB),
    "kl": Measure("KL from the reference (k3)", ("new_logprobs", "ref_logprobs"), 0.005, PURPLE_RGB),
}


@dataclass(frozen=True)
class Token:
    """A token's text, its value under a measure, its tint from −1 to 1 and that tint's colour; `clipped` marks it."""

    text: str
    value: float
    clipped: bool
    tint: float
    rgb: tuple[int, int, int]

    @property
    def opacity(self) -> float:
        """The tint's strength, at most `DEEPEST`."""
        return DEEPEST * abs(self.tint)


def measures_of(rollout: pd.DataFrame) -> list[str]:
    """Return which measures a rollout has the columns for."""
    return [name for name, m in MEASURES.items() if {"tokens", *m.columns} <= set(rollout.columns)]


def token_values(group: pd.DataFrame, measure: str) -> list[np.ndarray]:
    """Return each sample's values, one a token.

    Args:
        group: rows of a rollout with the measure's columns.
        measure: "change" is new − old log-probability, "ratio" its exponential, "kl" the k3 estimate of the KL
            between the policy after the step and the reference.
    """
    new, other = ([torch.tensor(np.asarray(row, dtype=float)) for row in group[c]] for c in MEASURES[measure].columns)
    pairs = zip(new, other, strict=True)
    if measure == "kl":
        return [kl_divergence(n, o, "k3").numpy() for n, o in pairs]
    changes = [(n - o).numpy() for n, o in pairs]
    return [np.exp(change) for change in changes] if measure == "ratio" else changes


def full_tint(values: Sequence[np.ndarray], measure: str) -> float:
    """Return the size that gets the full tint: nearly the largest of the group. A ratio's size is that of its log."""
    together = np.concatenate([*values, np.zeros(0)])
    sizes = np.abs(np.log(together) if measure == "ratio" else together)
    sizes = sizes[np.isfinite(sizes)]
    return max(float(np.quantile(sizes, QUANTILE)) if len(sizes) else 0.0, MEASURES[measure].floor)


def tinted(
    group: pd.DataFrame, measure: str, clip: tuple[float, float] = (0.0, np.inf)
) -> tuple[list[list[Token]], float]:
    """Return each sample's tokens with their tints, and the size that has the full one.

    Args:
        group: rows of a rollout.
        measure: one of `measures_of(group)`.
        clip: the lowest and highest ratio that is not clipped; only "ratio" marks what lies outside.
    """
    values = token_values(group, measure)
    full = full_tint(values, measure)
    rows = []
    for texts, row in zip(group["tokens"], values, strict=True):
        sizes = np.log(row) if measure == "ratio" else row
        outside = (row < clip[0]) | (row > clip[1]) if measure == "ratio" else np.zeros(len(row), dtype=bool)
        tints = np.clip(np.nan_to_num(sizes / full), -1, 1)
        columns = zip(texts, row.tolist(), outside.tolist(), tints.tolist(), strict=True)
        rows.append([Token(plain_text(text, 60), *rest, _colour(measure, rest[-1])) for text, *rest in columns])
    return rows, full


def _colour(measure: str, tint: float) -> tuple[int, int, int]:
    return VERMILION_RGB if tint < 0 else MEASURES[measure].above


def ends_of_scale(measure: str, full: float) -> tuple[str, str, str]:
    """Return what stands at the lower end, the middle and the upper end of the tints' scale."""
    if measure == "ratio":
        return f"{np.exp(-full):.2f}", "1", f"{np.exp(full):.2f}"
    if measure == "kl":
        return "", "0", f"{full:.3f}"
    return signed(-full), "0", signed(full)
