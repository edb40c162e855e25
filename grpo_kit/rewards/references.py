"""Rewards that judge an image by what its row holds beside the prompt: its first picture, and texts of its metadata."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from grpo_kit.config import Name
from grpo_kit.config.hub import ModelError, load_whole, loading
from grpo_kit.config.threads import fitting_threads
from grpo_kit.rewards.clip import ClipEncoder, ClipSimilarity
from grpo_kit.rewards.protocol import Images, References, Texts, text_of

Fields = Sequence[Mapping[str, Any]]  # N, the metadata of each row
Answers = list[float | None] | None  # N; None where it abstains
DINO = "facebook/dinov2-base"
_CPU = torch.device("cpu")
_SAME = 1e-3  # apart by less, two unit vectors have a cosine that float32 cannot tell from 1


class FieldSimilarity:
    """CLIP similarity to a metadata field of the row, such as its "target"; to the user's prompt where it has none."""

    def __init__(self, clip: ClipSimilarity, field: Name) -> None:
        self.clip, self.field = clip, field

    def __call__(self, images: Images, prompts: Texts, enhanced_prompts: Texts, metadata: Fields) -> torch.Tensor:
        """(N,) cosines between images and texts."""
        texts = [text_of(row, self.field) or prompt for row, prompt in zip(metadata, prompts, strict=True)]
        return self.clip(images, texts, enhanced_prompts)


class ImageSimilarity:
    """Cosine between an image and its row's picture, in [-1, 1]; 1 for the same. Abstains where a row has none.

    CLIP and DINO alike compare content and style at once. As the only reward of an edit it asks for none.
    """

    def __init__(self, encode: Callable[[Images], torch.Tensor]) -> None:
        self.encode = encode  # images → (N, D) unit vectors

    def __call__(self, images: Images, prompts: Texts, enhanced_prompts: Texts, references: References) -> Answers:
        """N cosines, None where a row has no picture."""
        rows = [row for row, pictures in enumerate(references) if pictures]
        if not rows:
            return None
        given = _first_of(references, rows, self.encode)
        return _at_rows(rows, (self.encode(images)[rows] * given).sum(dim=-1), len(images))


class EditDirection:
    """Whether an image differs from its row's picture as two texts differ, in [-1, 1] (arXiv 2108.00946).

    The cosine of image less picture, in CLIP's image space, with the metadata's `target` less `caption`, in its text
    space. It does not say by how much the image differs. Abstains without a picture, or two texts that differ; NaN
    where the image is the picture: no difference has no direction.
    """

    def __init__(self, clip: ClipEncoder) -> None:
        self.clip = clip

    def __call__(
        self, images: Images, prompts: Texts, enhanced_prompts: Texts, references: References, metadata: Fields
    ) -> Answers:
        """N cosines, None where a row asks for no edit of a picture."""
        texts = [(text_of(row, "target"), text_of(row, "caption")) for row in metadata]
        asks = [None not in pair and pair[0] != pair[1] for pair in texts]
        rows = [row for row, pictures in enumerate(references) if pictures and asks[row]]
        if not rows:
            return None
        change = self.clip.encode_images(images)[rows] - _first_of(references, rows, self.clip.encode_images)
        target, caption = (self.clip.encode_texts([texts[row][side] for row in rows]) for side in (0, 1))
        is_same = torch.stack([change, target - caption]).norm(dim=-1).amin(dim=0) < _SAME
        cosines = cosine_similarity(change, target - caption).masked_fill(is_same, torch.nan)
        return _at_rows(rows, cosines, len(images))


def _at_rows(rows: list[int], values: torch.Tensor, count: int) -> Answers:
    found = dict(zip(rows, values.tolist(), strict=True))
    return [found.get(row) for row in range(count)]


def _first_of(references: References, rows: list[int], encode: Callable[[Images], torch.Tensor]) -> torch.Tensor:
    """(n, D) embeddings of the first picture of some rows; a picture that several rows share is encoded once."""
    firsts = [references[row][0] for row in rows]
    distinct = list({id(picture): picture for picture in firsts}.values())
    place = {id(picture): number for number, picture in enumerate(distinct)}
    return encode(distinct)[[place[id(picture)] for picture in firsts]]


def load_dino_similarity(model: Name = DINO, device: torch.device = _CPU) -> ImageSimilarity:
    """Similarity by the class token of a DINO (v2, arXiv 2304.07193, or v3), a transformers folder or hub id."""
    setting = "reward_settings.options.dino_similarity.model"
    with loading(setting, model):
        kind = AutoConfig.from_pretrained(model).model_type
    if not kind.startswith("dino"):
        raise ModelError(f"{setting}: found {model!r} of type {kind!r}, allowed: DINOv2 or DINOv3. Name one of those")
    network = load_whole(AutoModel, model, setting).to(device).eval().requires_grad_(False)
    with loading(setting, model):
        processor = AutoImageProcessor.from_pretrained(model)

    @torch.no_grad()
    def encode(images: Images) -> torch.Tensor:
        pixels = [processor(image.convert("RGB"), return_tensors="pt")["pixel_values"] for image in images]
        with fitting_threads(network):
            tokens = network(pixel_values=torch.cat(pixels).to(device)).pooler_output.float()
        return torch.nn.functional.normalize(tokens, dim=-1)

    return ImageSimilarity(encode)
