"""Rewards without a model: an image's sharpness, contrast and JPEG size; a rewrite's length and repetition."""

import io

import numpy as np
from PIL import Image
from scipy import ndimage

from grpo_kit.config import Count, Whole
from grpo_kit.rewards.media import ALL
from grpo_kit.rewards.protocol import Images, RewardError, Texts
from grpo_kit.rewards.words import words


def sharpness(images: Images, prompts: Texts, enhanced_prompts: Texts) -> list[float]:
    """Variance of the Laplacian of an image's lightness in [0, 1]: 0 for a flat image, above 1 for stripes.

    The measure of focus that Pech-Pacheco et al. compare (ICPR 2000). Noise and stripes raise it, too: as the only
    reward it is gamed by them. It depends on the resolution, so compare images of one size.
    """
    return [float(ndimage.laplace(_lightness(image)).var()) / 255**2 for image in images]


def contrast(images: Images, prompts: Texts, enhanced_prompts: Texts) -> list[float]:
    """RMS contrast: the standard deviation of an image's lightness in [0, 1], from 0 (one grey) to 0.5 (Peli 1990)."""
    return [float(_lightness(image).std()) / 255 for image in images]


def as_file(image: Image.Image, kind: str, quality: int = 95) -> bytes:
    """An image's RGB pixels as a file, "png" or "jpeg"; a PNG has no quality."""
    file = io.BytesIO()
    image.convert("RGB").save(file, kind, quality=quality)
    return file.getvalue()


def _lightness(image: Image.Image) -> np.ndarray:
    """(H, W) luma in [0, 255]: whole numbers, so that a flat image has a deviation of exactly 0."""
    return np.asarray(image.convert("L"), dtype=np.float64)


class JpegSize:
    """Kilobytes (of 1,000) of an image as a JPEG file (DDPO, arXiv 2305.13301).

    Weight it with +1 for images that compress badly, with -1 for ones that compress well. It does not see what an image
    shows: an example of a reward that training can raise without helping anyone. `quality` is 1 to 95; DDPO's is 95.
    """

    def __init__(self, quality: Whole = 95) -> None:
        if not 1 <= quality <= 95:
            raise RewardError(f"quality: found {quality}, allowed: 1 to 95")
        self.quality = quality

    def __call__(self, images: Images, prompts: Texts, enhanced_prompts: Texts) -> list[float]:
        """(N,) sizes in kB; no text is read."""
        return [len(as_file(image, "jpeg", self.quality)) / 1000 for image in images]


class Length:
    """A penalty for rewrites of more than `max_words` words: -min(1, excess / max_words), in [-1, 0].

    0 up to the limit, -1 from twice the limit on. In a script without spaces, such as Chinese, each letter counts
    (`rewards.words`), so the limit must be higher there.
    """

    media = ALL

    def __init__(self, max_words: Count = 60) -> None:
        if max_words < 1:
            raise RewardError(f"max_words: found {max_words}, allowed: at least 1")
        self.max_words = max_words

    def __call__(self, images: Images, prompts: Texts, enhanced_prompts: Texts) -> list[float]:
        """(N,) penalties of the rewrites."""
        excess = [max(0, len(words(text)) - self.max_words) for text in enhanced_prompts]
        return [0 - min(1.0, count / self.max_words) for count in excess]


class Repetition:
    """A penalty for rewrites that repeat themselves: (distinct n-grams / n-grams) - 1, in (-1, 0].

    The share of runs of `size` words that occurred before (arXiv 2502.03373 uses such a penalty); 0 for a text of fewer
    words. Case and punctuation are ignored.
    """

    media = ALL

    def __init__(self, size: Count = 2) -> None:
        if size < 1:
            raise RewardError(f"size: found {size}, allowed: at least 1")
        self.size = size

    def __call__(self, images: Images, prompts: Texts, enhanced_prompts: Texts) -> list[float]:
        """(N,) penalties of the rewrites."""
        return [self._penalty(words(text)) for text in enhanced_prompts]

    def _penalty(self, written: list[str]) -> float:
        runs = [tuple(written[start : start + self.size]) for start in range(len(written) - self.size + 1)]
        return len(set(runs)) / len(runs) - 1 if runs else 0.0
