"""What a step did to each token of a group: the change of its log-probability, its ratio, its KL from the reference."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from grpo_kit.grpo import kl_divergence
from grpo_kit.show.style import BLUE, PURPLE, VERMILION, plain_text

QUANTILE = 0.95  # of the sizes in a group: one outlier does not pale all the others


@dataclass(frozen=True)
class Measure:
    """A number a token, of its log-probability after the step and another one."""

    short: str
    name: str
    other: str  # the column of a rollout with the other one
    floor: float  # sizes below it stay pale, however small all others are
    above: str  # the colour of values above the middle


MEASURES = {
    "change": Measure("change", "change of log-probability", "old_logprobs", 0.02, BLUE),
    "ratio": Measure("ratio", "ratio, after / before the step", "old_logprobs", 0.02, BLUE),
    "kl": Measure("KL", "KL from the reference (k3)", "ref_logprobs", 0.005, PURPLE),
}


@dataclass(frozen=True)
class Token:
    """A token's text, its value under a measure, its tint from −1 to 1 and that tint's colour; `clipped` marks it."""

    text: str
    value: float
    clipped: bool
    tint: float
    colour: str


def token_values(group: pd.DataFrame, measure: str) -> list[np.ndarray]:
    """Return each sample's values, one a token, from rows of a rollout with the measure's columns.

    "change" is new − old log-probability, "ratio" its exponential, "kl" the k3 estimate of the KL between the policy
    after the step and the reference.
    """
    compute = {
        "change": lambda new, old: new - old,
        "ratio": lambda new, old: (new - old).exp(),
        "kl": lambda new, reference: kl_divergence(new, reference, "k3"),
    }
    columns = zip(group["new_logprobs"], group[MEASURES[measure].other], strict=True)
    pairs = ((torch.tensor(np.asarray(row, float)) for row in rows) for rows in columns)
    return [compute[measure](*pair).numpy() for pair in pairs]


def tinted(
    group: pd.DataFrame, measure: str, clip: tuple[float, float] = (0.0, np.inf)
) -> tuple[list[list[Token]], float]:
    """Return each sample's tokens with their tints, and the size that has the full one: nearly the group's largest.

    A ratio's size is that of its logarithm, and a ratio outside of `clip`, the lowest and the highest one that is not
    clipped, is marked.
    """
    values = token_values(group, measure)
    sizes = [np.log(row) if measure == "ratio" else row for row in values]
    every = np.abs(np.concatenate([*sizes, np.zeros(0)]))
    every = every[np.isfinite(every)]
    full = max(float(np.quantile(every, QUANTILE)) if len(every) else 0.0, MEASURES[measure].floor)
    rows = []
    for texts, row, size in zip(group["tokens"], values, sizes, strict=True):
        outside = (measure == "ratio") & ((row < clip[0]) | (row > clip[1]))
        tints = np.clip(np.nan_to_num(size / full), -1, 1)
        colours = np.where(tints < 0, VERMILION, MEASURES[measure].above)
        columns = zip(texts, row.tolist(), outside.tolist(), tints.tolist(), colours.tolist(), strict=True)
        rows.append([Token(plain_text(text, 60), *rest) for text, *rest in columns])
    return rows, full
