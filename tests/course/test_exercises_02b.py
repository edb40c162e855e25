"""The exercises of notebook 02b: the solution passes, the stub says so, and a wrong answer is told by its mistake."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from grpo_kit.course import check
from tests.support.course import solution, stub

ANSWERS = {
    "02b.1": "expected_reward",
    "02b.2": "policy_gradient",
    "02b.3": "reinforce",
    "02b.4": "moments",
    "02b.5": "against_the_others",
    "02b.6": "train",
}
every_exercise = pytest.mark.parametrize(("name", "function"), ANSWERS.items())


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


@every_exercise
def test_the_committed_solution_passes(name: str, function: str):
    found = check(name, solution(name)[function])
    assert found.passed, found


@every_exercise
def test_the_stub_says_that_it_is_not_written_yet(name: str, function: str):
    found = check(name, stub(name)[function])
    assert not found.passed and "not written yet" in found.message


def two_tokens(first, second):
    return (first[:3, None] * second).ravel()


def sampled(logits, rewards, drawn, advantages, weights=None):
    p = softmax(logits)
    each = advantages[:, None] * (np.eye(len(p))[drawn] - p)
    return each.mean(axis=0) if weights is None else weights @ each


def loop(steps=400, rate=1.0, baseline=True, sign=1):
    """A loop with one thing changed."""

    def train(logits, rewards, rng):
        for _ in range(steps):
            p = softmax(logits - logits.max())
            drawn = rng.choice(13, size=16, p=p)
            A = rewards[drawn] - (rewards[drawn].mean() if baseline else 0)
            logits = logits + sign * rate * (A @ (np.eye(13)[drawn] - p)) / 16
        return logits

    return train


def mean_square(p, g, rewards, b):
    draws = (rewards - b)[:, None] * g
    return p @ draws, p @ (draws**2).sum(axis=1)


def alike(p, g, rewards, b):
    draws = (rewards - b)[:, None] * g
    return draws.mean(axis=0), draws.var(axis=0).sum()


def aim_moved(p, g, rewards, b):
    mean, noise = solution("02b.4")["moments"](p, g, rewards, b)
    return mean - b, noise


def averaged(p, g, rewards, b):
    mean, noise = solution("02b.4")["moments"](p, g, rewards, b)
    return mean, noise / len(mean)


WRONG: list[tuple[str, Callable, str]] = [
    ("02b.1", lambda first, second, r: r.mean(), "the plain mean"),
    ("02b.1", lambda first, second, r: two_tokens(first, second) @ r[1:], "ends at once is left out"),
    ("02b.1", lambda first, second, r: first[3] * r[0] + second.ravel() @ r[1:], "the product of both"),
    ("02b.2", lambda x, r: softmax(x) * r, "has a second part"),
    ("02b.2", lambda x, r: r @ (np.eye(len(x)) - softmax(x)), "weigh each text by its probability"),
    ("02b.2", lambda x, r: -softmax(x) * (r - softmax(x) @ r), "the sign is turned round"),
    ("02b.2", lambda x, r: softmax(x) ** 2 * (r - softmax(x) @ r), "once more"),
    ("02b.3", lambda x, r, drawn: sampled(x, r, drawn, r[drawn], np.ones(len(drawn))), "not their sum"),
    ("02b.3", lambda x, r, drawn: sampled(x, r, drawn, softmax(x)[drawn] * r[drawn]), "do not weigh by p again"),
    ("02b.3", lambda x, r, drawn: sampled(x, r, drawn, np.ones(len(drawn))), "the reward is left out"),
    ("02b.3", lambda x, r, drawn: softmax(x) * (r - softmax(x) @ r), "from the drawn texts alone"),
    ("02b.4", mean_square, "take the square of the mean off"),
    ("02b.4", alike, "weigh by p"),
    ("02b.4", aim_moved, "the baseline moved the aim"),
    ("02b.4", averaged, "not averaged"),
    ("02b.4", lambda p, g, r, b: p @ ((r - b)[:, None] * g), "expected two values"),
    ("02b.5", lambda r: r - r.mean(), "leave the sample itself out"),
    ("02b.5", lambda r: (r - r.mean()) * (len(r) - 1) / len(r), "the factor is turned round"),
    ("02b.5", lambda r: r - (r.sum() - r) / len(r), "the others are G − 1"),
    ("02b.5", lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-4), "divides by the standard deviation too"),
    ("02b.5", lambda r: (r.sum() - r) / (len(r) - 1), "subtract it from the reward"),
    ("02b.6", loop(baseline=False), "without a baseline"),
    ("02b.6", loop(sign=-1), "does the step go up"),
    ("02b.6", loop(steps=0), "no step was made"),
    ("02b.6", loop(steps=20, rate=0.1), "too little"),
    ("02b.6", lambda x, r, rng: 9.0 * (r == r.max()), "`rng` drew no text"),
    ("02b.6", lambda x, r, rng: float(r.max()), "expected 13 logits"),
]


@pytest.mark.parametrize(("name", "answer", "mistake"), WRONG, ids=[f"{name} {what}" for name, _, what in WRONG])
def test_a_wrong_answer_is_told_by_its_mistake(name: str, answer: Callable, mistake: str):
    found = check(name, answer)
    assert not found.passed and mistake in found.message, found


def test_training_may_be_done_in_other_ways_too():
    """Exercise 02b.6 sets an aim, not a way: one text a step, against the mean of all earlier rewards."""

    def one_at_a_time(logits, rewards, rng):
        seen = []
        for _ in range(4000):
            p = softmax(logits)
            text = rng.choice(13, p=p)
            A = rewards[text] - (np.mean(seen[-100:]) if seen else rewards[text])
            seen.append(rewards[text])
            logits = logits + 0.3 * A * (np.eye(13)[text] - p)
        return logits

    assert check("02b.6", one_at_a_time).passed
