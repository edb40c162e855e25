"""The exercises of 01_prompts: the solution passes, the stub does not, and misconceptions are named."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from grpo_kit.course.exercise import check
from tests.support.course import solution, stub


@pytest.mark.parametrize(("name", "what"), [("01.1", "pictures_needed"), ("01.2", "times_as_many")])
def test_the_solution_passes_and_the_stub_does_not(name: str, what: str) -> None:
    passed, empty = check(name, solution(name)[what]), check(name, stub(name)[what])
    assert passed.passed, passed
    assert not empty.passed and "not written yet" in empty.message


@pytest.mark.parametrize(
    ("wrong", "idea"),
    [
        (lambda s, h: int((2 * s / h) ** 2), "rounded down"),
        (lambda s, h: int((2 * s / h) ** 2) + 1, "one too many where it comes out whole"),
        (lambda s, h: math.ceil(2 * s / h), "the square is missing"),
        (lambda s, h: math.ceil((s / h) ** 2), "that is for one standard error"),
        (lambda s, h: (2 * s / h) ** 2, "not a whole number"),
    ],
)
def test_a_wrong_number_of_pictures_is_told_why(wrong: Callable, idea: str) -> None:
    found = check("01.1", wrong)
    assert not found.passed and idea in found.message, found


@pytest.mark.parametrize(
    ("wrong", "idea"),
    [
        (lambda a, b: ((a.var(ddof=1) + b.var(ddof=1)) / (b - a).var(ddof=1)) ** 0.5, "pictures go with its square"),
        (lambda a, b: (b - a).var(ddof=1) / (a.var(ddof=1) + b.var(ddof=1)), "upside down"),
        (lambda a, b: a.var(ddof=1) / (b - a).var(ddof=1), "b's own variance is missing"),
        (lambda a, b: (a + b).var(ddof=1) / (b - a).var(ddof=1), "of a sum of both"),
    ],
)
def test_a_wrong_saving_is_told_why(wrong: Callable, idea: str) -> None:
    found = check("01.2", wrong)
    assert not found.passed and idea in found.message, found
