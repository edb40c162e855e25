"""Rewards that look at pixels alone: sharpness, contrast, and the size as a JPEG file."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from grpo_kit.rewards.protocol import RewardError


def sharpness(images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]) -> list[float]:
    """Variance of the Laplacian of an image's lightness in [0, 1]: from 0, flat or blurred, to above 1, stripes.

    The measure of focus that Pech-Pacheco et al. compare (ICPR 2000). Noise and stripes are edges, too: alone it is
    gamed by them. It depends on the resolution, so compare images of one size.
    """
    return [float(ndimage.laplace(_lightness(image)).var()) / 255**2 for image in images]


def contrast(images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]) -> list[float]:
    """RMS contrast: the standard deviation of an image's lightness in [0, 1], from 0 (one grey) to 0.5 (Peli 1990)."""
    return [float(_lightness(image).std()) / 255 for image in images]


def _lightness(image: Image.Image) -> np.ndarray:
    """(H, W) luma in [0, 255]: whole numbers, so that a flat picture has a deviation of exactly 0."""
    return np.asarray(image.convert("L"), dtype=np.float64)


class JpegSize:
    """Kilobytes (of 1,000) of an image as a JPEG file, more than 0: the classic toy (DDPO, arXiv 2305.13301).

    Weight it with +1 for images that compress badly, with -1 for ones that compress well. It knows nothing of what an
    image shows, which makes it a good example of a reward that training can raise without helping anyone.

    Args:
        quality: of the JPEG, 1 to 95; DDPO's is 95.
    """

    def __init__(self, quality: int = 95) -> None:
        if not 1 <= quality <= 95:
            raise RewardError(f"quality: found {quality}, allowed: 1 to 95")
        self.quality = quality

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]
    ) -> list[float]:
        """(N,) sizes in kB; no prompt is looked at."""
        return [self._bytes(image) / 1000 for image in images]

    def _bytes(self, image: Image.Image) -> int:
        file = io.BytesIO()
        image.convert("RGB").save(file, format="JPEG", quality=self.quality)
        return file.tell()
