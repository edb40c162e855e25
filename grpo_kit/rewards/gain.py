"""Gain: the reward of the rewrite's image less that of the raw prompt's image from the same latents."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from grpo_kit.rewards.clip import fingerprint
from grpo_kit.rewards.media import media_of
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
    some_rows,
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
    and a resumed run has to draw the same ones. The inner reward scores single images.
    """

    def __init__(self, generator: ImageGenerator, reward: Reward) -> None:
        if "group_ids" in context_of(reward):
            raise RewardError("found an inner reward that asks for group_ids, allowed: one that scores single images")
        self.generator, self.reward, self.media = generator, reward, media_of(reward)
        self._kept: OrderedDict[tuple, torch.Tensor] = OrderedDict()

    def __call__(
        self,
        images: Images,
        prompts: Texts,
        enhanced_prompts: Texts,
        image_seeds: torch.Tensor | None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        references: Sequence[Sequence[Image.Image] | None] | None = None,
    ) -> torch.Tensor | list[float | None]:
        """(N,) differences; `image_seeds` (N,) are the latent seeds, the other two are for the inner reward."""
        if image_seeds is None:
            raise RewardError("draws raw prompts with the images' seeds, and found no image_seeds. Pass them to score")
        seeds, fields = torch.as_tensor(image_seeds), metadata or [{}] * len(prompts)
        given = references or [None] * len(prompts)
        seen = [fingerprint(pictures or ()) for pictures in given]
        steps = getattr(self.generator, "num_inference_steps", None)  # fewer in training than in evaluation
        key = (steps, *zip(prompts, seeds.tolist(), map(repr, fields), seen, strict=True))
        if key not in self._kept:
            self._kept[key] = self._raw_scores(prompts, seeds, fields, given)
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT_CALLS:
            self._kept.popitem(last=False)
        own, raw = self._score(images, prompts, enhanced_prompts, seeds, fields, given), self._kept[key]
        return as_answer((own - raw).masked_fill((own == ABSTAINED) | (raw == ABSTAINED), ABSTAINED))

    def _score(self, *columns: Sequence | torch.Tensor) -> torch.Tensor:
        """(N,) inner rewards of images, prompts, enhanced prompts, seeds, metadata and references, in float64."""
        batch = dict(zip((*COLUMNS, "image_seeds", "metadata", "references"), columns, strict=True))
        return as_column(call(self.reward, batch | {"group_ids": None}), len(columns[0]))

    def _raw_scores(self, prompts: Texts, seeds: torch.Tensor, *context: Sequence) -> torch.Tensor:
        """(N,) inner rewards of the raw prompts' images; NaN without one. `context` is metadata and references."""
        images = self.generator.generate_images(prompts, seeds.tolist())
        drawn = [place for place, image in enumerate(images) if image is not None]
        result = torch.full((len(images),), torch.nan, dtype=torch.float64)
        if drawn:
            result[drawn] = self._score(*(some_rows(one, drawn) for one in (images, prompts, prompts, seeds, *context)))
        return result
