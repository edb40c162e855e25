"""What a check says of answers that are not what it asked for: always one sentence, never an error of its own."""

import numpy as np
import pytest
import torch

from grpo_kit.config import KitError
from grpo_kit.course import check
from grpo_kit.course.exercise import WrongAnswer, expect


@pytest.mark.parametrize(
    "found", [None, "1", [1.0], [[1.0], [2.0, 3.0]], {"a": 1}, np.nan, 1j, object(), torch.ones(2, requires_grad=True)]
)
def test_whatever_is_handed_in_is_compared(found: object):
    with pytest.raises(WrongAnswer, match=r"for an input: expected 1\., found "):
        expect(found, 1.0, "an input")


@pytest.mark.parametrize("found", [1, np.float32(1), torch.tensor(1.0, requires_grad=True), 1 + 1e-8])
def test_a_right_number_may_be_of_any_kind(found: object):
    expect(found, 1.0, "an input")


def test_rows_of_different_lengths_are_compared_as_they_are():
    expect([[1], [2, 3]], [[1], [2, 3]], "rows")
    with pytest.raises(WrongAnswer, match="expected"):
        expect([[1], [2, 4]], [[1], [2, 3]], "rows")


def test_a_misconception_is_named():
    with pytest.raises(WrongAnswer, match=r"expected 0\., found 2\. \(the clip is missing\)"):
        expect(2.0, 0.0, "ratio 2", wrong={"both sides": 1.0, "the clip is missing": 2.0})


@pytest.mark.parametrize("name", ["99.1", "06", "", "06.", 6.1, None, "../06.1", "06.1; ls", "00.9"])
def test_a_name_that_no_exercise_has_is_one_line(name: object):
    with pytest.raises(KitError, match=r"^exercise: found .*, allowed: .*, such as 06\.1$"):
        check(name)


@pytest.mark.parametrize("wrong", [lambda *_: 1 / 0, lambda: None, "no function", None])
def test_code_that_stops_is_an_answer(wrong: object):
    found = check("06.1", wrong)
    assert not found.passed and "your code stopped with" in found.message
