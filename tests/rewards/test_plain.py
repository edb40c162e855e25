"""Rewards without a model: sharpness, contrast and JPEG size on renders of the embedded world; length, repetition."""

import io
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageFilter

from grpo_kit.rewards import JpegSize, Length, Repetition, RewardError, Rewards, contrast, sharpness
from grpo_kit.shapeworld.render import apply_style, render
from grpo_kit.shapeworld.scene import random_scenes

IMAGES = [render(scene) for scene in random_scenes(40, seed=2, style="clean")]
FLAT = Image.new("RGB", (32, 32), (90, 90, 90))
HOSTILE = ["", " ", "\n\t", "🙂🙂", "\ud800 half", "مرحبا بالعالم", "\u202eright to left", "a" * 10_000, ",,,"]
Measure = Callable[[Sequence[Image.Image], object, object], list[float]]


def _of(measure: Measure, images: Sequence[Image.Image]) -> np.ndarray:
    texts = [""] * len(images)
    return np.asarray(measure(images, texts, texts))


def _styled(style: str) -> list[Image.Image]:
    return [apply_style(image, style) for image in IMAGES]


def _falls_with_blur(measure: Measure) -> bool:
    """Whether every picture scores lower the more it is blurred."""
    rows = [
        _of(measure, [image.filter(ImageFilter.GaussianBlur(radius)) for image in IMAGES]) for radius in (0, 0.8, 2)
    ]
    return bool((rows[0] > rows[1]).all() and (rows[1] > rows[2]).all())


def brightness(images: Sequence[Image.Image], prompts: object, enhanced_prompts: object) -> list[float]:
    """What a sloppy measure of sharpness might be."""
    return [float(np.asarray(image).mean()) for image in images]


def test_sharpness_falls_with_blur_and_is_zero_for_a_flat_picture():
    assert _falls_with_blur(sharpness) and not _falls_with_blur(brightness)
    assert _of(sharpness, [FLAT]).tolist() == [0.0]


def test_sharpness_is_the_variance_of_the_five_point_laplacian():
    pixels = np.zeros((9, 9), np.uint8)
    pixels[4, 4] = 255  # one white point: -4 in the middle, 1 at each neighbour
    found = _of(sharpness, [Image.fromarray(pixels).convert("RGB")])
    assert found[0] == pytest.approx((16 + 4) / 81)


def test_contrast_is_the_deviation_of_lightness_and_falls_when_a_picture_fades():
    half = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, axis=0).repeat(4, axis=1)).convert("RGB")
    assert _of(contrast, [half, FLAT]).tolist() == [0.5, 0.0]
    assert (_of(contrast, IMAGES) > _of(contrast, _styled("vintage"))).all()
    assert 0 < _of(contrast, IMAGES).min() and _of(contrast, IMAGES).max() <= 0.5


def test_stripes_fool_pixel_measures_as_their_descriptions_say():
    striped = _styled("glitch")
    assert (_of(sharpness, striped) > _of(sharpness, IMAGES)).all()
    assert (_of(JpegSize(), striped) > _of(JpegSize(), IMAGES)).all()


def test_jpeg_size_is_the_size_of_the_file_and_falls_with_quality_and_blur():
    file = io.BytesIO()
    IMAGES[0].save(file, format="JPEG", quality=95)
    assert _of(JpegSize(), IMAGES[:1])[0] == len(file.getvalue()) / 1000
    assert (_of(JpegSize(50), IMAGES) < _of(JpegSize(95), IMAGES)).all()
    assert (_of(JpegSize(), _styled("dreamy")) < _of(JpegSize(), IMAGES)).mean() > 0.9


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
@pytest.mark.parametrize("measure", [sharpness, contrast, JpegSize()])
def test_pictures_of_every_mode_are_measured(measure: Measure, mode: str):
    assert np.isfinite(_of(measure, [image.convert(mode) for image in IMAGES[:3]])).all()


@pytest.mark.parametrize("quality", [0, 96])
def test_impossible_quality_is_one_line(quality: int):
    with pytest.raises(RewardError, match=f"quality: found {quality}, allowed: 1 to 95"):
        JpegSize(quality)


# --- texts ------------------------------------------------------------------------------------------------------------


def _penalties(reward: object, texts: list[str]) -> list[float]:
    return reward([None] * len(texts), [""] * len(texts), texts)


def test_length_is_free_up_to_the_limit_then_falls_linearly_to_minus_one():
    texts = [" ".join(["red"] * count) for count in (0, 9, 10, 11, 15, 20, 400)]
    assert _penalties(Length(10), texts) == pytest.approx([0, 0, 0, -0.1, -0.5, -1, -1])


def test_length_counts_words_and_not_punctuation():
    assert _penalties(Length(2), ["a - b !!", "a, b, c."]) == [0, -0.5]


def test_repetition_is_the_share_of_runs_that_stood_there_before():
    texts = ["sharp sharp sharp sharp", "a red circle, sharp", "a red circle a red circle", "Sharp, sharp; SHARP"]
    assert _penalties(Repetition(1), texts) == pytest.approx([-0.75, 0, -0.5, -2 / 3])
    assert _penalties(Repetition(2), texts) == pytest.approx([-2 / 3, 0, -2 / 5, -0.5])
    assert _penalties(Repetition(3), ["one two", "one", ""]) == [0, 0, 0]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_saying_it_again_is_never_rewarded(size: int):
    text = "two red circles, white background, sharp"
    found = _penalties(Repetition(size), [", ".join([text] * times) for times in (1, 2, 3, 6)])
    assert found[0] == 0 and all(later < earlier for earlier, later in pairwise(found))
    assert found[-1] > -1


@pytest.mark.parametrize("reward", [Length(5), Repetition(1), Repetition(3)])
def test_hostile_texts_are_scored_like_any(reward: object):
    assert all(-1 <= value <= 0 for value in _penalties(reward, HOSTILE))


def test_penalties_enter_a_total_beside_other_rewards():
    images = [object()] * 3  # never looked at
    rewards = Rewards({"length": Length(2), "repetition": Repetition(1)}, {"length": 0.5, "repetition": 2.0})
    found = rewards(images, ["a"] * 3, ["a b", "a a", "a b c d"])
    assert found.tolist() == [0.0, -1.0, -0.5]


@pytest.mark.parametrize(("kind", "name"), [(Length, "max_words"), (Repetition, "size")])
def test_limit_below_one_is_one_line(kind: type, name: str):
    with pytest.raises(RewardError, match=f"{name}: found 0, allowed: at least 1"):
        kind(0)
