"""The exercises of 11_eyes: solutions pass, stubs do not, and misconceptions are named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from grpo_kit.course.exercise import check
from tests.support.course import solution, stub

ANSWERS = {"11.1": "worth", "11.2": "best_to_come"}


@pytest.mark.parametrize(("name", "function"), ANSWERS.items())
def test_the_solution_passes_and_the_stub_does_not(name: str, function: str) -> None:
    passed, empty = (check(name, found[function]) for found in (solution(name), stub(name)))
    assert passed.passed, passed
    assert not empty.passed and "not written yet" in empty.message


def looking(M: np.ndarray, p: np.ndarray) -> float:
    """What is reached with a look."""
    return (M.max(axis=0) * p).sum()


def blind(M: np.ndarray, p: np.ndarray) -> float:
    """What is reached without one."""
    return (M @ p).max()


@pytest.mark.parametrize(
    ("worth", "idea"),
    [
        (lambda M, p: (M.max(axis=0).mean(), blind(M, p)), "the chances are missing"),
        (lambda M, p: ((np.diag(M[: len(p)]) * p).sum(), blind(M, p)), "need not be the one on the diagonal"),
        (lambda M, p: (M.max(axis=1).mean(), blind(M, p)), "in each column, not in each row"),
        (lambda M, p: (looking(M, p), looking(M, p)), "the mean comes before the maximum"),
        (lambda M, p: (looking(M, p), M.mean(axis=1).max()), "the chances are missing"),
        (lambda M, p: (looking(M, p), (M @ p).mean()), "take the best row"),
        (looking, "expected two numbers"),
    ],
)
def test_a_wrong_worth_is_told_what_it_did(worth: Callable, idea: str) -> None:
    found = check("11.1", worth)
    assert not found.passed and idea in found.message, found


@pytest.mark.parametrize(
    ("credit", "idea"),
    [
        (lambda r: np.fmax.accumulate(r, axis=1), "from the left"),
        (lambda r: np.repeat(r.max(axis=1), r.shape[1]).reshape(r.shape), "not what came before"),
        (lambda r: np.repeat(r[:, -1:], r.shape[1], axis=1), "reward of the last picture"),
        (lambda r: np.maximum.accumulate(r[:, ::-1], axis=1)[:, ::-1], "took the others with it"),
        (lambda r: np.maximum.accumulate(np.nan_to_num(r)[:, ::-1], axis=1)[:, ::-1], "what was not scored is no 0"),
    ],
)
def test_a_wrong_credit_is_told_what_it_did(credit: Callable, idea: str) -> None:
    found = check("11.2", credit)
    assert not found.passed and idea in found.message, found
