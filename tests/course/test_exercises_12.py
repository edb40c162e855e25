"""The exercises of 12_other_media: solutions pass, stubs do not, and misconceptions are named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from grpo_kit import rewards
from grpo_kit.config.media import Sound, Video
from grpo_kit.course.exercise import check
from tests.support.course import solution, stub

ANSWERS = {"12.1": "motion", "12.2": "loudness"}


@pytest.mark.parametrize(("name", "function"), ANSWERS.items())
def test_the_solution_passes_and_the_stub_does_not(name: str, function: str) -> None:
    passed, empty = (check(name, found[function]) for found in (solution(name), stub(name)))
    assert passed.passed, passed
    assert not empty.passed and "not written yet" in empty.message


@pytest.mark.parametrize(
    ("motion", "idea"),
    [
        (lambda f: np.abs(np.diff(f, axis=0)).mean() / 255, "begins again at 255"),
        (lambda f: np.abs(np.diff(f.astype(float), axis=0)).mean(), "from 0 to 1"),
        (lambda f: np.diff(f / 255, axis=0).mean(), "cancel each other"),
        (lambda f: np.abs(f[-1] / 255 - f[0] / 255).mean(), "the last one alone"),
        (lambda f: np.abs(np.diff(f / 255, axis=1)).mean(), "use axis 0"),
        (lambda f: np.abs(np.diff(f / 255, axis=0)).mean(), "does not move: 0"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_wrong_motion_is_told_what_it_did(motion: Callable, idea: str) -> None:
    found = check("12.1", motion)
    assert not found.passed and idea in found.message, found


@pytest.mark.parametrize(
    ("loudness", "idea"),
    [
        (lambda s: 10 * np.log10(max(np.sqrt(np.square(s).mean()), 1e-6)), "20 times the logarithm"),
        (lambda s: np.square(s).mean(), "not its logarithm"),
        (lambda s: 10 * np.log(np.square(s).mean()), "natural logarithm"),
        (lambda s: 20 * np.log10(np.abs(s).max()), "one click would be loud"),
        (lambda s: 10 * np.log10(np.square(s.mean(axis=0)).mean()), "cancel each other"),
        (lambda s: 20 * np.log10(np.abs(s).mean()), "not the mean size"),
        (lambda s: 10 * np.log10(np.square(s).mean()), "take 1e-6 at least"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_wrong_loudness_is_told_what_it_did(loudness: Callable, idea: str) -> None:
    found = check("12.2", loudness)
    assert not found.passed and idea in found.message, found


def test_the_answers_are_the_kits_own_rewards() -> None:
    rng = np.random.default_rng(0)
    film = Video(rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8), 8.0)
    sounds = [
        Sound(rng.uniform(-0.3, 0.3, (2, 800)).astype(np.float32), 8000),
        Sound(np.zeros((1, 80), np.float32), 8000),
    ]
    assert solution("12.1")["motion"](film.frames) == pytest.approx(rewards.motion([film], [""], [""])[0])
    for sound, expected in zip(sounds, rewards.loudness(sounds, [""] * 2, [""] * 2), strict=True):
        assert solution("12.2")["loudness"](sound.samples) == pytest.approx(expected, abs=1e-4)
