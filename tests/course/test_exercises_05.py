"""Exercises of 05: solutions pass, stubs say that nothing is written, mistakes are called by their names."""

import numpy as np
import pytest

from grpo_kit.course import check
from tests.support.course import solution, stub

ANSWERS = {"05.1": "advantages", "05.2": "parts"}


def advantages(rewards, ids, *, ddof=1, zeros=False, batch=False, scaled=True, kept=False, single=False):
    rewards = np.nan_to_num(rewards) if zeros else rewards
    found = np.full(len(rewards), np.nan) if kept else np.zeros(len(rewards))
    for group in np.unique(ids):
        rows = (batch | (ids == group)) & ~np.isnan(rewards)
        r = rewards[rows]
        if len(r) == 0 or (len(r) == 1 and not single) or (len(r) > 1 and np.ptp(r) == 0):
            found[rows] = 0
            continue
        with np.errstate(all="ignore"):
            found[rows] = (r - r.mean()) / ((r.std(ddof=ddof) + 1e-4) if scaled else 1)
    return found


def parts(table, *, taken=True, all_cells=False, ddof=1, turned=False):
    rewrites, seeds = table.shape
    rows, columns = table.mean(axis=1), table.mean(axis=0)
    left = table - rows[:, None] - columns + table.mean()
    rest = (left**2).sum() / (table.size if all_cells else (rewrites - 1) * (seeds - 1))
    off = (rest / seeds, rest / rewrites) if taken else (0, 0)
    found = rows.var(ddof=ddof) - off[0], columns.var(ddof=ddof) - off[1], rest
    return (found[1], found[0], found[2]) if turned else found


def by_group(rewards, ids, right=None):
    """The advantages of one group after the other."""
    return np.concatenate([advantages(rewards, ids)[ids == group] for group in np.unique(ids)])


def nan_spreads(rewards, ids):
    """A group's mean and deviation of all its rows, a missing score among them."""
    missing = np.isin(ids, ids[np.isnan(rewards)])
    return np.where(missing, np.nan, advantages(rewards, ids))


WRONG = [
    ("05.1", {"ddof": 0}, "divides by n, not by n - 1"),
    ("05.1", {"zeros": True}, "NaN was counted as a reward of 0"),
    ("05.1", {"batch": True}, "that of the whole batch"),
    ("05.1", {"scaled": False}, "not divided by the group's standard deviation"),
    ("05.1", {"kept": True}, "must get 0, not NaN"),
    ("05.1", {"single": True}, "a group with a single score has nothing to compare"),
    ("05.2", {"taken": False}, "a row mean still holds rest / seeds"),
    ("05.2", {"all_cells": True}, "divided by (R - 1)(S - 1)"),
    ("05.2", {"ddof": 0}, "variances of means take ddof=1"),
    ("05.2", {"turned": True}, "the order is turned"),
]


@pytest.mark.parametrize(
    ("wrong", "idea"),
    [(by_group, "each belongs in its own place"), (nan_spreads, "one NaN makes the whole group's mean NaN")],
)
def test_rows_and_missing_scores_that_went_astray_are_told(wrong, idea):
    found = check("05.1", wrong)
    assert not found.passed and idea in found.message, found


@pytest.mark.parametrize("name", ANSWERS)
def test_the_solution_of_the_notebook_passes_and_its_stub_does_not(name):
    assert check(name, solution(name)[ANSWERS[name]]).passed
    empty = check(name, stub(name)[ANSWERS[name]])
    assert not empty.passed and "not written yet" in empty.message


@pytest.mark.parametrize(("name", "change", "idea"), WRONG)
def test_a_mistake_is_called_by_its_name(name, change, idea):
    written = advantages if name == "05.1" else parts
    found = check(name, lambda *given: written(*given, **change))
    assert not found.passed and idea in found.message, found.message
