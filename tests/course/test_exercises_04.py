"""The exercises of 04_rewards: the solution passes, the stub does not, and misconceptions are named."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from grpo_kit.config import PROJECT_ROOT
from grpo_kit.course.exercise import check
from tests.support.course import solution, stub


@pytest.mark.parametrize(("name", "what"), [("04.1", "clip_scores"), ("04.2", "my_reward"), ("04.3", "broken")])
def test_the_solution_passes_and_the_stub_does_not(name: str, what: str) -> None:
    passed, empty = check(name, solution(name)[what]), check(name, stub(name)[what])
    assert passed.passed, passed
    assert not empty.passed and "not written yet" in empty.message


def unit(vectors: np.ndarray, axis: int = 1) -> np.ndarray:
    """Vectors of length 1."""
    return vectors / np.linalg.norm(vectors, axis=axis, keepdims=True)


@pytest.mark.parametrize(
    ("wrong", "idea"),
    [
        (lambda images, texts: (images * texts).sum(axis=1), "not brought to length 1"),
        (lambda images, texts: unit(texts) @ unit(images).T, "every text against every picture"),
        (lambda images, texts: unit(images) @ unit(texts).T, "every picture against every text"),
        (lambda images, texts: (unit(images, 0) * unit(texts, 0)).sum(axis=1), "a vector is a row"),
        (lambda images, texts: (unit(images) * texts).sum(axis=1), "only the pictures' vectors"),
        (lambda images, texts: (unit(images) * unit(texts)).mean(axis=1), "a cosine is their sum"),
    ],
)
def test_a_wrong_cosine_is_told_what_it_did(wrong: Callable, idea: str) -> None:
    found = check("04.1", wrong)
    assert not found.passed and idea in found.message, found


Texts = Sequence[str]


def file_size(images: Sequence[Image.Image], prompts: Texts, rewrites: Texts) -> list[int]:
    """Bytes of a JPEG."""
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        image.save(file, "JPEG")
    return [file.tell() for file in files]


def good_words(images: Sequence[Image.Image], prompts: Texts, rewrites: Texts) -> list[float]:
    """What the rewrite says of itself."""
    return [float("sharp" in text or "crisp" in text) for text in rewrites]


def turned(images: Sequence[Image.Image], prompts: Texts, rewrites: Texts) -> list[float]:
    """The distance to what is wanted."""
    return [-score for score in solution("04.2")["my_reward"](images, prompts, rewrites)]


def as_recorded(images: Sequence[Image.Image], prompts: Texts, rewrites: Texts) -> list[float]:
    """The scores that the run's own reward, CLIP, gave to these pictures."""
    rows = pd.read_parquet(PROJECT_ROOT / "data/demo_run/evaluation/rows.parquet").dropna(subset=["thumbnail"])
    return (2 * rows["reward/clip_similarity"] - 1).tolist()


@pytest.mark.parametrize(
    ("wrong", "idea"),
    [
        (as_recorded, "these are CLIP's numbers"),
        (file_size, "it never looks at what was asked"),
        (good_words, "a policy would be paid for its words"),
        (turned, "the sign is turned"),
        (lambda images, prompts, rewrites: [1.0] * len(images), "there is nothing to compare"),
        (lambda images, prompts, rewrites: 1.0, "expected 104 finite numbers"),
    ],
)
def test_a_poor_reward_is_told_why(wrong: Callable, idea: str) -> None:
    found = check("04.2", wrong)
    assert not found.passed and idea in found.message, found


@pytest.mark.parametrize(
    ("user", "rewrite", "idea"),
    [
        ("two crimson balls", "two red circles, white background, sharp", "that is a good rewrite"),
        ("a crimson ball", "a blue square, glitch", "that breaks the picture, not the reward"),
        ("a cat on a mat", "a red circle, sharp", "the check cannot read it"),
    ],
)
def test_a_reward_that_is_not_broken_is_told_why(user: str, rewrite: str, idea: str) -> None:
    found = check("04.3", lambda: (user, rewrite))
    assert not found.passed and idea in found.message, found
