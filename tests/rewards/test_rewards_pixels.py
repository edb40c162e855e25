"""Rewards of pixels alone: sharpness, contrast and JPEG size, on renders of the embedded world."""

import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image, ImageFilter

from grpo_kit.rewards import JpegSize, RewardError, contrast, sharpness
from grpo_kit.shapeworld.render import apply_style, render
from grpo_kit.shapeworld.scene import random_scenes

IMAGES = [render(scene) for scene in random_scenes(40, seed=2, style="clean")]
FLAT = Image.new("RGB", (32, 32), (90, 90, 90))
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
