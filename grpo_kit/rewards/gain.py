"""Gain: the reward of the rewrite's image less that of the raw prompt's image from the same latents."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from grpo_kit.rewards.protocol import (
    ABSTAINED,
    COLUMNS,
    Images,
    Reward,
    RewardError,
    Texts,
    as_answer,
    as_column,
    call,
    context_of,
)

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
        self,
        images: Images,
        prompts: Texts,
        enhanced_prompts: Texts,
        image_seeds: torch.Tensor | None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> torch.Tensor | list[float | None]:
        """(N,) differences; `image_seeds` (N,) are the latent seeds of the images, `metadata` is for the inner reward.

        Raises:
            RewardError: no seeds, or an inner reward that does not return N numbers.
        """
        if image_seeds is None:
            raise RewardError("draws raw prompts with the images' seeds, and found no image_seeds. Pass them to score")
        fields = metadata or [{}] * len(prompts)
        rows = list(zip(images, prompts, enhanced_prompts, torch.as_tensor(image_seeds).tolist(), fields, strict=True))
        steps = getattr(self.generator, "num_inference_steps", None)  # fewer in training than in evaluation
        key = (steps, *((prompt, seed, repr(known)) for _, prompt, _, seed, known in rows))
        if key not in self._kept:
            self._kept[key] = self._raw_scores(rows)
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT_CALLS:
            self._kept.popitem(last=False)
        own, raw = self._score(rows), self._kept[key]
        return as_answer((own - raw).masked_fill((own == ABSTAINED) | (raw == ABSTAINED), ABSTAINED))

    def _score(self, rows: Sequence[tuple]) -> torch.Tensor:
        images, prompts, enhanced_prompts, seeds, fields = map(list, zip(*rows, strict=True))
        batch = dict(zip(COLUMNS, (images, prompts, enhanced_prompts), strict=True)) | {"group_ids": None}
        batch |= {"image_seeds": torch.tensor(seeds), "metadata": fields, "references": [None] * len(rows)}
        return as_column(call(self.reward, batch), len(rows))

    def _raw_scores(self, rows: Sequence[tuple]) -> torch.Tensor:
        """(N,) inner rewards of the raw prompts' images, in float64."""
        images = self.generator.generate_images([row[1] for row in rows], [row[3] for row in rows])
        drawn = [place for place, image in enumerate(images) if image is not None]
        result = torch.full((len(rows),), torch.nan, dtype=torch.float64)
        if drawn:
            result[drawn] = self._score([(images[row], rows[row][1], rows[row][1], *rows[row][3:]) for row in drawn])
        return result
