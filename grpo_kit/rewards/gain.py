"""Gain: the reward of the rewrite's image less that of the raw prompt's image from the same latents."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image

from grpo_kit.rewards.protocol import Images, Reward, RewardError, Texts, as_column, context_of

_KEPT_CALLS = 16


class ImageGenerator(Protocol):
    """What a gain needs of a generator."""

    def generate_images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        """One image for each prompt and seed; None where it came out unusable."""


class Gain:
    """An inner reward of the image less that of the raw prompt's image with the same seed; NaN without a raw image.

    Its range is twice as wide as the inner reward's. In a group that shares its seeds all rows have the same raw score,
    so the advantages are those of the inner reward. It changes means and curves, running normalisation, and groups
    whose samples have seeds of their own, where it removes the luck of the seed.

    The raw scores of the last 16 calls are kept, a whole call at a time: an image's last bits may depend on its batch,
    and a resumed run has to draw the same ones.

    Args:
        generator: draws the raw prompts, equal pairs of prompt and seed once.
        reward: the inner reward, of single images.

    Raises:
        RewardError: an inner reward that takes `group_ids`.
    """

    def __init__(self, generator: ImageGenerator, reward: Reward) -> None:
        if "group_ids" in context_of(reward):
            raise RewardError("found an inner reward that asks for group_ids, allowed: one that scores single images")
        self.generator, self.reward = generator, reward
        self._kept: OrderedDict[tuple, torch.Tensor] = OrderedDict()

    def __call__(
        self, images: Images, prompts: Texts, enhanced_prompts: Texts, image_seeds: torch.Tensor | None
    ) -> torch.Tensor:
        """(N,) differences; `image_seeds` (N,) are the latent seeds of the images.

        Raises:
            RewardError: no seeds, or an inner reward that does not return N numbers.
        """
        if image_seeds is None:
            raise RewardError("draws raw prompts with the images' seeds, and found no image_seeds. Pass them to score")
        seeds = torch.as_tensor(image_seeds).tolist()
        steps = getattr(self.generator, "num_inference_steps", None)  # fewer in training than in evaluation
        key = (steps, *zip(prompts, seeds, strict=True))
        if key not in self._kept:
            self._kept[key] = self._raw_scores(prompts, seeds)
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT_CALLS:
            self._kept.popitem(last=False)
        return self._score(images, prompts, enhanced_prompts, seeds) - self._kept[key]

    def _score(self, images: Images, prompts: Texts, enhanced_prompts: Texts, seeds: list[int]) -> torch.Tensor:
        given = {"image_seeds": torch.tensor(seeds)} if context_of(self.reward) else {}
        return as_column(self.reward(images, prompts, enhanced_prompts, **given), len(images))

    def _raw_scores(self, prompts: Texts, seeds: list[int]) -> torch.Tensor:
        """(N,) inner rewards of the raw prompts' images, in float64."""
        images = self.generator.generate_images(prompts, seeds)
        drawn = [row for row, image in enumerate(images) if image is not None]
        result = torch.full((len(prompts),), torch.nan, dtype=torch.float64)
        if drawn:
            texts = [prompts[row] for row in drawn]
            result[drawn] = self._score([images[row] for row in drawn], texts, texts, [seeds[row] for row in drawn])
        return result
