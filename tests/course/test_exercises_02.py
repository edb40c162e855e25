"""The exercises of notebook 02: the solution passes, the stub says so, and a wrong answer is told by its mistake."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from grpo_kit.course import check
from tests.support.course import solution, stub

ANSWERS = {"02.1": "logprobs_of", "02.2": "mask_of", "02.3": "ratio_of"}
every_exercise = pytest.mark.parametrize(("name", "function"), ANSWERS.items())


@every_exercise
def test_the_committed_solution_passes(name: str, function: str):
    found = check(name, solution(name)[function])
    assert found.passed, found


@every_exercise
def test_the_stub_says_that_it_is_not_written_yet(name: str, function: str):
    found = check(name, stub(name)[function])
    assert not found.passed and "not written yet" in found.message


def taken(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return scores.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def at(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    return taken((logits / temperature).softmax(dim=-1), ids)


WRONG: list[tuple[str, Callable, str]] = [
    ("02.1", lambda z, ids, n: taken(z[:, n:].log_softmax(-1), ids[:, n:]), "not shifted"),
    ("02.1", lambda z, ids, n: taken(z[:, n - 1 : -1], ids[:, n:]), "take the log-softmax"),
    ("02.1", lambda z, ids, n: taken(z[:, n - 1 : -1].softmax(-1), ids[:, n:]), "the logarithm is missing"),
    ("02.1", lambda z, ids, n: taken(z[:, :-1].log_softmax(-1), ids[:, 1:]), "not written by the policy"),
    ("02.1", lambda z, ids, n: taken(z[:, n - 1 : -1].log_softmax(-1), ids[:, n:]).sum(1), "one number for each token"),
    ("02.2", lambda ids, end: ids != end, "behind the first one is padding"),
    ("02.2", lambda ids, end: (ids == end).cumsum(dim=1) == 0, "to stop was a choice too"),
    ("02.2", lambda ids, end: torch.ones_like(ids).bool(), "padding counts too"),
    ("02.2", lambda ids, end: ((ids == end).cumsum(dim=1) - (ids == end).int()) > 0, "turn it round"),
    ("02.3", lambda z, ids, a, b: at(z, ids, a) / at(z, ids, b), "turned round"),
    ("02.3", lambda z, ids, a, b: (at(z, ids, b) / at(z, ids, a)).log(), "the log of the ratio"),
    ("02.3", lambda z, ids, a, b: taken(z / b - z / a, ids).exp(), "sums of their own"),
    ("02.3", lambda z, ids, a, b: at(z, ids, 1 / b) / at(z, ids, 1 / a), "does not multiply"),
    ("02.3", lambda z, ids, a, b: torch.ones(len(ids)), "still the ratio is not 1"),
    ("02.3", lambda z, ids, a, b: (at(z, ids, b) / at(z, ids, a)).prod(), "one a token"),
]


@pytest.mark.parametrize(("name", "answer", "mistake"), WRONG, ids=[f"{name} {what}" for name, _, what in WRONG])
def test_a_wrong_answer_is_told_by_its_mistake(name: str, answer: Callable, mistake: str):
    found = check(name, answer)
    assert not found.passed and mistake in found.message, found
