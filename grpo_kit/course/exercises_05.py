"""Exercises of 05_groups: a group's advantages, and the variance of rewards by rewrites and seeds."""

from collections.abc import Callable

import numpy as np

from grpo_kit.course.exercise import exercise, expect

NAN = float("nan")


@exercise("05.1", "Group advantages with NaN and ties", minutes=10, difficulty=2)
def check_advantages(advantages: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """Advantages of batches whose groups have missing, equal and single rewards, and rows in any order."""
    rng = np.random.default_rng(51)
    drawn = rng.random(12).round(3)
    drawn[[2, 7]] = NAN
    batches = (
        ("two groups of two", [0.2, 0.6, 0.9, 0.5], [0, 0, 1, 1]),
        ("one NaN in the first group", [0.9, NAN, 0.3, 0.6, 0.1, 0.4], [0, 0, 0, 0, 1, 1]),
        ("a flat group", [0.7, 0.7, 0.7, 0.2, 0.4, 0.9], [3, 3, 3, 5, 5, 5]),
        ("a group with a single score", [0.3, NAN, NAN, 0.5, 0.8, 0.6], [0, 0, 0, 1, 1, 1]),
        ("rows of three groups in any order", drawn, rng.permutation(np.repeat([4, 7, 9], 4))),
    )
    for name, *batch in batches:
        rewards, ids = map(np.array, batch)
        right, scored = _by_group(rewards, ids), ~np.isnan(rewards)
        alone = scored & (np.array([scored[ids == group].sum() for group in ids]) == 1)
        with_zeros = _by_group(np.nan_to_num(rewards), ids)
        touched = np.isin(ids, ids[~scored])  # rows of groups in which a score is missing
        wrong = {
            "the standard deviation divides by n, not by n - 1: ddof=1": _by_group(rewards, ids, ddof=0),
            "NaN was counted as a reward of 0: leave it out of mean and deviation": with_zeros,
            "one NaN makes the whole group's mean NaN: take the mean of the scored rows": np.where(touched, NAN, right),
            "rows came back group by group: each belongs in its own place": right[np.argsort(ids, kind="stable")],
            "the mean is that of the whole batch, not of the group": _by_group(rewards, 0 * ids),
            "rewards are not divided by the group's standard deviation": _by_group(rewards, ids, scaled=False),
            "a row without a score must get 0, not NaN": np.where(scored, right, NAN),
            "a group with a single score has nothing to compare: 0, not NaN": np.where(alone, NAN, right),
        }
        expect(advantages(rewards.copy(), ids.copy()), right, name, wrong=wrong)


def _by_group(rewards: np.ndarray, ids: np.ndarray, ddof: int = 1, scaled: bool = True) -> np.ndarray:
    """(N,) rewards less their group's mean, by its standard deviation; 0 where there is nothing to compare."""
    found = np.zeros(len(rewards))
    for group in np.unique(ids):
        rows = (ids == group) & ~np.isnan(rewards)
        if rows.sum() > 1 and np.ptp(rewards[rows]) > 0:
            centred = rewards[rows] - rewards[rows].mean()
            found[rows] = centred / (rewards[rows].std(ddof=ddof) + 1e-4) if scaled else centred
    return found


@exercise("05.2", "Words, seeds and the rest of six numbers", minutes=10, difficulty=4)
def check_parts(parts: Callable[[np.ndarray], tuple[float, float, float]]) -> None:
    """Two-way analysis of variance of tables of several sizes, against the kit's own."""
    from grpo_kit.evaluation.noise import split_variance

    rng = np.random.default_rng(52)
    shown = np.array([[0.9, 0.5], [0.7, 0.5], [0.5, 0.2]])
    for R, S in ((3, 2), (3, 4), (5, 3), (4, 6)):
        drawn = 0.3 * rng.normal(size=(R, 1)) + 0.2 * rng.normal(size=S) + 0.05 * rng.normal(size=(R, S))
        table = shown if (R, S) == shown.shape else drawn  # effects are large, so that no estimate lies below 0
        split = split_variance(table[None])
        rewrites, seeds, rest = split.rewrite, split.seed, split.rest
        means = np.array([table.mean(axis=1).var(ddof=1), table.mean(axis=0).var(ddof=1)])
        counts, others = np.array([R, S]), np.array([S, R])
        over_all = rest * (R - 1) * (S - 1) / (R * S)
        by_all_cells = (*(means - over_all / others), over_all)
        wrong = {
            "a row mean still holds rest / seeds, a column mean rest / rewrites: take it off": (*means, rest),
            "rest / seeds and rest / rewrites are exchanged": (*(means - rest / counts), rest),
            "the rest's squares are divided by (R - 1)(S - 1), not by all cells": by_all_cells,
            "variances of means take ddof=1": (*(means * (1 - 1 / counts) - rest / others), rest),
            "rewrites are the rows and seeds the columns: the order is turned": (seeds, rewrites, rest),
            "these are standard deviations; variances are asked": np.sqrt([rewrites, seeds, rest]),
        }
        given = f"a table of {R} rewrites and {S} seeds"
        expect(parts(table.copy()), (rewrites, seeds, rest), given, wrong=wrong)
