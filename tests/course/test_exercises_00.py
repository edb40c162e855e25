"""The exercises of notebook 00: solutions pass, stubs and plausible mistakes do not."""

import numpy as np
import pytest

from grpo_kit import course
from tests.support.course import solution, stub

REWARDS = [0.1, 0.6, 0.3, 0.5, 0.2, 0.4, 0.0, 0.7]


def _divided(rewards, by):
    return [(reward - np.mean(rewards)) / by for reward in rewards]


def test_the_solutions_of_the_notebook_pass():
    assert course.check("00.1", solution("00.1")["advantages_of"]).passed
    assert course.check("00.2", solution("00.2")["ranking"], REWARDS).passed


def test_what_is_not_written_yet_is_told():
    for checked in (
        course.check("00.1", stub("00.1")["advantages_of"]),
        course.check("00.2", stub("00.2")["ranking"], REWARDS),
    ):
        assert not checked.passed and "not written yet" in checked.message


@pytest.mark.parametrize(
    ("answer", "misconception"),
    [
        (lambda r: _divided(r, np.std(r) + 1e-4), "divides by G − 1, not by G"),
        (lambda r: _divided(r, max(r) - min(r) + 1e-4), "the range, highest less lowest, is no standard deviation"),
        (lambda r: _divided(r, np.var(r, ddof=1) + 1e-4), "the square root of the variance"),
        (lambda r: _divided(r, 1.0), "the division by the standard deviation is missing"),
        (lambda r: [x / (np.std(r, ddof=1) + 1e-4) for x in r], "the mean of the group is not subtracted"),
        (lambda r: [-x for x in _divided(r, np.std(r, ddof=1) + 1e-4)], "the sign is turned round"),
        (lambda r: _divided(r, np.std(r, ddof=1)), "0 divided by 0"),
        (lambda r: [(x - sum(r) / len(r)) / float(np.std(r, ddof=1)) for x in r], "0 divided by 0"),
        (lambda r: _divided(r[:4], np.std(r[:4], ddof=1) + 1e-4), "expected"),
    ],
)
def test_a_mistake_in_the_advantages_is_named(answer, misconception):
    checked = course.check("00.1", answer)
    assert not checked.passed and misconception in checked.message and "for rewards [" in checked.message


@pytest.mark.parametrize(
    ("answer", "misconception"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], "the first picture has the number 0, not 1"),
        ([0.9, 0.2, 0.4, 0.3, 0.8, 0.1, 0.5, 0.6], "these are scores"),
        ([0, 1, 2, 3, 4, 5, 6, 6], "a number stands twice"),
        ([7, 1], "pictures are missing"),
        ("the third", "expected each of"),
        (None, "expected each of"),
        ([[0, 1], [2, 3]], "expected each of"),
    ],
)
def test_a_list_that_is_no_order_is_named(answer, misconception):
    checked = course.check("00.2", lambda: answer, REWARDS)
    assert not checked.passed and misconception in checked.message


def test_an_order_is_compared_with_the_rewards_pair_by_pair():
    best_first = np.argsort(REWARDS)[::-1].tolist()
    assert "agrees with you on 28 of 28 pairs (chance: 14)" in course.check("00.2", lambda: best_first, REWARDS).message
    turned = course.check("00.2", lambda: best_first[::-1], REWARDS)
    assert turned.passed and "on 0 of 28 pairs" in turned.message and "from the worst to the best?" in turned.message
    equal = course.check("00.2", lambda: [1, 0, 2], [0.5, 0.5, 0.1])  # equal rewards are no pair
    assert "on 2 of 2 pairs" in equal.message
