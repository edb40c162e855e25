"""Exercises of 06: solutions pass, stubs say that nothing is written, mistakes are called by their names."""

import numpy as np
import pytest

from grpo_kit.course import check
from grpo_kit.course.exercises_06 import BROKEN, broken_losses
from grpo_kit.preflight.loss_checks import FALLS_IN, examine, subject_of
from tests.support.course import solution, stub

ANSWERS = {
    "06.1": "push",
    "06.2": "loss_is_0",
    "06.3": "mean_and_pull",
    "06.4": "wrong_line",
    "06.5": "token_weight",
}
RIGHT_LINES = {"loss_a": 3, "loss_b": 1, "loss_c": 4, "loss_d": 2, "loss_e": 4}
ZERO = {"a": True, "b": True, "c": True, "d": False, "e": True, "f": False}


def without_clip(ratio, advantage, epsilon=0.2):
    return -ratio * advantage


def clipped_on_both_sides(ratio, advantage, epsilon=0.2):
    return -ratio * advantage if 1 - epsilon < ratio < 1 + epsilon else 0.0


def by_ratio(ratio, advantage, epsilon=0.2):
    gone = ratio > 1 + epsilon if advantage > 0 else ratio < 1 - epsilon
    return 0.0 if gone else -advantage


def turned(ratio, advantage, epsilon=0.2):
    gone = ratio > 1 + epsilon if advantage > 0 else ratio < 1 - epsilon
    return 0.0 if gone else ratio * advantage


def pulls(name, logits, reference, *, upside_down=False, half=0.5, attached=False, weighted=True):
    import torch

    leaf = logits.detach().clone().requires_grad_()
    log_p, log_q = leaf.log_softmax(0), reference.log_softmax(0)
    log_r = log_p - log_q if upside_down else log_q - log_p
    estimate = {"k1": -log_r, "k2": half * log_r**2, "k3": log_r.exp() - 1 - log_r}[name]
    weights = log_p.exp() if attached else log_p.exp().detach()
    mean = (weights * estimate).sum() if weighted else estimate.mean()
    return mean, torch.autograd.grad(mean, leaf)[0]


def weight(loss_type, lengths, limit, **others):
    rows = len(lengths)
    formulas = {
        "grpo": 1 / (rows * lengths),
        "dapo": np.full(rows, 1 / lengths.sum()),
        "dr_grpo": np.full(rows, 1 / (rows * limit)),
        "luspo": np.full(rows, 1 / rows),
    } | {name: other(rows, lengths) for name, other in others.items()}
    return formulas[loss_type]


WRONG = [
    ("06.1", without_clip, "the clip is missing"),
    ("06.1", clipped_on_both_sides, "the clip holds on both sides"),
    ("06.1", by_ratio, "this is the slope by the ratio"),
    ("06.1", turned, "the sign is turned"),
    ("06.2", lambda: ZERO | {"d": True}, "dapo weighs each token the same"),
    ("06.2", lambda: ZERO | {"b": False}, "leave one out only multiplies"),
    ("06.2", lambda: ZERO | {"f": True}, "the policy has left the reference"),
    ("06.3", lambda *given: pulls(*given, upside_down=True), "r is upside down"),
    ("06.3", lambda *given: pulls(*given, half=1.0), "k2 is half of the square"),
    ("06.3", lambda *given: pulls(*given, attached=True), "detach the probabilities"),
    ("06.3", lambda *given: pulls(*given, weighted=False), "weigh each by its probability"),
    ("06.4", lambda: RIGHT_LINES | {"loss_b": 4}, "line 4 is sound"),
    ("06.4", lambda: RIGHT_LINES | {"loss_e": 1}, "line 1 is sound"),
    ("06.4", lambda: RIGHT_LINES | {"loss_d": 3}, "line 3 is sound"),
    ("06.5", lambda *given: weight(*given, grpo=lambda n, lengths: np.full(n, 1 / n)), "a row's own length is missing"),
    ("06.5", lambda *given: weight(*given, dapo=lambda n, lengths: 1 / (n * lengths)), "all tokens of the batch alike"),
    (
        "06.5",
        lambda *given: weight(*given, dr_grpo=lambda n, lengths: np.full(n, 1 / (n * lengths.max()))),
        "the length limit, not by the longest row",
    ),
    ("06.5", lambda *given: weight(*given, luspo=lambda n, lengths: np.full(n, 1 / lengths.sum())), "not by that of"),
]


@pytest.mark.parametrize("name", ANSWERS)
def test_the_solution_of_the_notebook_passes_and_its_stub_does_not(name):
    assert check(name, solution(name)[ANSWERS[name]]).passed
    empty = check(name, stub(name)[ANSWERS[name]])
    assert not empty.passed and "not written yet" in empty.message


@pytest.mark.parametrize(("name", "answer", "idea"), WRONG)
def test_a_mistake_is_called_by_its_name(name, answer, idea):
    found = check(name, answer)
    assert not found.passed and idea in found.message, found.message


def test_each_of_the_five_losses_has_one_wrong_line_and_the_examiner_finds_it():
    assert {name: place for name, (place, _) in BROKEN.items()} == RIGHT_LINES
    for text, loss in broken_losses().values():
        assert any(finding.outcome == FALLS_IN for finding in examine(subject_of(loss))), text
