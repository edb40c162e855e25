"""Gain: what the rewrite is worth, compared with the user's own prompt drawn from the same latents."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image

from grpo_kit.rewards.protocol import Reward, RewardError, as_column, context_of

_KEPT_CALLS = 16


class Draws(Protocol):
    """What a gain needs of a generator."""

    def generate_images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        """One picture for each prompt and seed; None where it came out unusable."""


class Gain:
    """An inner reward of the image less that of the raw prompt's image with the same seed; NaN without a raw image.

    Its range is twice as wide as the inner reward's. Within a group that shares its seeds the raw score is the same for
    all, so the advantages are the inner reward's own; it makes a difference to means and curves, to running
    normalisation, and to groups whose samples have seeds of their own, whose luck it takes out.

    Each pair of raw prompt and seed of a call is drawn once. The raw scores of the last 16 calls are kept, whole calls
    at a time: a picture's last bits may depend on its batch, and a resumed run has to see the same ones.

    Args:
        generator: draws the raw prompts.
        reward: the inner reward, of single images.

    Raises:
        RewardError: an inner reward that looks at groups.
    """

    def __init__(self, generator: Draws, reward: Reward) -> None:
        if "group_ids" in context_of(reward):
            raise RewardError("found an inner reward that asks for group_ids, allowed: one that scores single images")
        self.generator, self.reward = generator, reward
        self._kept: OrderedDict[tuple[tuple[str, int], ...], torch.Tensor] = OrderedDict()

    def __call__(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        enhanced_prompts: Sequence[str],
        image_seeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """(N,) differences; `image_seeds` (N,) are the latent seeds that the images were drawn from.

        Raises:
            RewardError: no seeds, or an inner reward that does not return N numbers.
        """
        if image_seeds is None:
            raise RewardError("draws raw prompts with the images' seeds, and found no image_seeds. Pass them to score")
        seeds = torch.as_tensor(image_seeds).tolist()
        return self._inner(images, prompts, enhanced_prompts, seeds) - self._raw_scores(prompts, seeds)

    def _inner(
        self, images: Sequence[Image.Image], prompts: Sequence[str], rewrites: Sequence[str], seeds: list[int]
    ) -> torch.Tensor:
        given = {"image_seeds": torch.tensor(seeds)} if context_of(self.reward) else {}
        return as_column(self.reward(images, prompts, rewrites, **given), len(images))

    def _raw_scores(self, prompts: Sequence[str], seeds: list[int]) -> torch.Tensor:
        """(N,) inner rewards of the raw prompts' images, in float64."""
        key = tuple(zip(prompts, seeds, strict=True))
        if key not in self._kept:
            self._kept[key] = self._drawn_and_scored(prompts, seeds)
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT_CALLS:
            self._kept.popitem(last=False)
        return self._kept[key]

    def _drawn_and_scored(self, prompts: Sequence[str], seeds: list[int]) -> torch.Tensor:
        pictures = self.generator.generate_images(prompts, seeds)
        drawn = [row for row, picture in enumerate(pictures) if picture is not None]
        result = torch.full((len(prompts),), torch.nan, dtype=torch.float64)
        if drawn:
            texts = [prompts[row] for row in drawn]
            result[drawn] = self._inner([pictures[row] for row in drawn], texts, texts, [seeds[row] for row in drawn])
        return result
