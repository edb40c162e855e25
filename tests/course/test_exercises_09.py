"""The exercise of 09_ablations: the solution passes, the stub does not, and misconceptions are named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scipy import stats

from grpo_kit.course.exercise import check
from tests.support.course import solution, stub


def test_the_solution_passes_and_the_stub_does_not() -> None:
    names = "half_widths", "choose"
    passed, empty = (check("09.1", *(found[name] for name in names)) for found in (solution("09.1"), stub("09.1")))
    assert passed.passed, passed
    assert not empty.passed and "not written yet" in empty.message


def right(n: int, s: float, r: float) -> tuple[float, float]:
    """Both half-widths."""
    t_pairs, t_two = stats.t.ppf(0.975, [n - 1, 2 * n - 2])
    return t_pairs * s * (2 * (1 - r) / n) ** 0.5, t_two * s * (2 / n) ** 0.5


def choose_right(n: int, r: float) -> str:
    """By the narrower one."""
    pairs, two = right(n, 1.0, r)
    return "paired" if pairs < two else "two samples"


def large_samples(n: int, s: float, r: float) -> tuple[float, float]:
    """1.96 for t."""
    return 1.96 * s * (2 * (1 - r) / n) ** 0.5, 1.96 * s * (2 / n) ** 0.5


def same_freedom(n: int, s: float, r: float) -> tuple[float, float]:
    """2n − 2 for both."""
    t = stats.t.ppf(0.975, 2 * n - 2)
    return t * s * (2 * (1 - r) / n) ** 0.5, t * s * (2 / n) ** 0.5


def no_correlation(n: int, s: float, r: float) -> tuple[float, float]:
    """Pairs as if independent."""
    return stats.t.ppf(0.975, n - 1) * s * (2 / n) ** 0.5, right(n, s, r)[1]


def correlated_samples(n: int, s: float, r: float) -> tuple[float, float]:
    """The correlation in both."""
    return right(n, s, r)[0], right(n, s, r)[1] * (1 - r) ** 0.5


def by_sign(n: int, r: float) -> str:
    """Paired wherever they correlate."""
    return "paired" if r > 0 else "two samples"


def always_two(n: int, r: float) -> str:
    """Never paired."""
    return "two samples"


@pytest.mark.parametrize(
    ("half_widths", "choose", "idea"),
    [
        (large_samples, choose_right, "1.96 stands in place of t"),
        (same_freedom, choose_right, "n pairs have n − 1 degrees of freedom"),
        (no_correlation, choose_right, "the correlation is missing"),
        (correlated_samples, choose_right, "two samples share nothing"),
        (right, by_sign, "pairs cost degrees of freedom"),
        (right, always_two, "with enough correlation pairs are narrower"),
    ],
)
def test_a_wrong_answer_is_told_what_it_did(half_widths: Callable, choose: Callable, idea: str) -> None:
    found = check("09.1", half_widths, choose)
    assert not found.passed and idea in found.message, found
