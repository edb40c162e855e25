"""The exercises of 03_generator: the solution passes, the stub does not, and misconceptions are named."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from grpo_kit.course.exercise import check
from tests.support.course import solution, stub


@pytest.mark.parametrize(("name", "what"), [("03.1", "euler_step"), ("03.2", "guided_end")])
def test_the_solution_passes_and_the_stub_does_not(name: str, what: str) -> None:
    passed, empty = check(name, solution(name)[what]), check(name, stub(name)[what])
    assert passed.passed, passed
    assert not empty.passed and "not written yet" in empty.message


@pytest.mark.parametrize(
    ("wrong", "idea"),
    [
        (lambda x, end, level, after: x - (after - level) * (x - end) / level, "the sign is turned"),
        (lambda x, end, level, after: end, "that is the whole way"),
        (lambda x, end, level, after: x + (after - level) * (x - end), "not divided by the level"),
        (lambda x, end, level, after: (after - level) * (x - end) / level, "that is the change"),
    ],
)
def test_a_wrong_step_is_told_why(wrong: Callable, idea: str) -> None:
    found = check("03.1", wrong)
    assert not found.passed and idea in found.message, found


@pytest.mark.parametrize(
    ("wrong", "idea"),
    [
        (lambda x, level, p, e, w: p + w * (p - e), "added to the empty prompt's prediction"),
        (lambda x, level, p, e, w: p + w * (e - p), "exchanged"),
        (lambda x, level, p, e, w: w * p, "not the prompt's own"),
        (lambda x, level, p, e, w: e + min(w, 1.0) * (p - e), "not cut off"),
    ],
)
def test_a_wrong_guided_end_is_told_why(wrong: Callable, idea: str) -> None:
    found = check("03.2", wrong)
    assert not found.passed and idea in found.message, found
