"""Penalties for the text of an enhanced prompt: its length, and repetition."""

import re
from collections.abc import Sequence

from PIL import Image

from grpo_kit.rewards.protocol import RewardError

_WORD = re.compile(r"\w+")


class Length:
    """A penalty for rewrites of more than `max_words` words: -min(1, excess / max_words), in [-1, 0].

    0 up to the limit, -1 from twice the limit on. A word is a run of letters and digits, so a text in a script without
    spaces counts as few.
    """

    def __init__(self, max_words: int = 60) -> None:
        if max_words < 1:
            raise RewardError(f"max_words: found {max_words}, allowed: at least 1")
        self.max_words = max_words

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]
    ) -> list[float]:
        """(N,) penalties of the rewrites; images and users' prompts are not looked at."""
        return [self._penalty(len(_words(text))) for text in enhanced_prompts]

    def _penalty(self, count: int) -> float:
        return 0 - min(1.0, max(0, count - self.max_words) / self.max_words)


class Repetition:
    """A penalty for rewrites that repeat themselves: (distinct n-grams / n-grams) - 1, in (-1, 0].

    The share of runs of `size` words that stood there before (arXiv 2502.03373 uses such a penalty); 0 for a text of
    fewer words. Case and punctuation are ignored.
    """

    def __init__(self, size: int = 2) -> None:
        if size < 1:
            raise RewardError(f"size: found {size}, allowed: at least 1")
        self.size = size

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]
    ) -> list[float]:
        """(N,) penalties of the rewrites; images and users' prompts are not looked at."""
        return [self._penalty(_words(text)) for text in enhanced_prompts]

    def _penalty(self, words: list[str]) -> float:
        runs = [tuple(words[start : start + self.size]) for start in range(len(words) - self.size + 1)]
        return len(set(runs)) / len(runs) - 1 if runs else 0.0


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
