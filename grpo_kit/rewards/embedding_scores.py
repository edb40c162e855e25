"""Rewards that compare embeddings of one shared CLIP."""

from pathlib import Path
from typing import Annotated

import torch
from PIL import Image
from pydantic import Field

from grpo_kit.config import Name, Number, one_line
from grpo_kit.rewards.clip import ClipEncoder
from grpo_kit.rewards.media import ALL
from grpo_kit.rewards.protocol import Images, RewardError, Texts

Pair = Annotated[tuple[Name, Name], Field(description="[good, bad], two texts")]
PHOTO_PAIRS: list[Pair] = [
    ("Good photo.", "Bad photo."),
    ("Sharp photo.", "Blurry photo."),
    ("Clean photo.", "Noisy photo."),
]


class ImageQuality:
    """How much more an image is like a good description than like its opposite, in [0, 1] (CLIP-IQA, arXiv 2207.12396).

    For each pair of texts (good, bad), by default ones for photographs, the softmax over the image's two similarities,
    times CLIP's own scale, gives the good one's share; the score is the mean over pairs. The paper's change of CLIP's
    position embedding is left out.
    """

    def __init__(self, clip: ClipEncoder, pairs: list[Pair] | None = None) -> None:
        pairs = PHOTO_PAIRS if pairs is None else pairs
        if not pairs:
            raise RewardError("pairs: found none, allowed: at least one pair [good, bad] of texts")
        self.clip, self.pairs = clip, [tuple(pair) for pair in pairs]

    def __call__(self, images: Images, prompts: Texts, enhanced_prompts: Texts) -> torch.Tensor:
        """(N,) mean shares of the good texts."""
        features = self.clip.encode_images(images)
        texts = self.clip.encode_texts([text for pair in self.pairs for text in pair])
        logits = self.clip.model.logit_scale.exp() * (features @ texts.T)
        return logits.reshape(len(features), -1, 2).softmax(dim=-1)[..., 0].mean(dim=1)


class Consistency:
    """Cosine between an image and the *enhanced* prompt, in [-1, 1].

    It says whether the generator follows the rewrite, not whether the rewrite is what the user wanted. As a reward it
    is easily gamed, by rewrites about something that is easy to draw: use it as a monitor.
    """

    def __init__(self, clip: ClipEncoder) -> None:
        self.clip = clip

    def __call__(self, images: Images, prompts: Texts, enhanced_prompts: Texts) -> torch.Tensor:
        """(N,) cosines between images and rewrites."""
        return (self.clip.encode_images(images) * self.clip.encode_texts(enhanced_prompts)).sum(dim=-1)


class MeaningKept:
    """Cosine between the enhanced and the user's prompt in CLIP's text space, in [-1, 1]; 1 for the same text.

    Words beyond the encoder's context do not count.
    """

    media = ALL

    def __init__(self, clip: ClipEncoder) -> None:
        self.clip = clip

    def __call__(self, images: Images, prompts: Texts, enhanced_prompts: Texts) -> torch.Tensor:
        """(N,) cosines between rewrites and users' prompts."""
        return (self.clip.encode_texts(enhanced_prompts) * self.clip.encode_texts(prompts)).sum(dim=-1)


class Safety:
    """A penalty for images that resemble a concept to avoid: -min(1, max(0, c - threshold) / margin), in [-1, 0].

    c is the image's highest cosine with any of the concepts: 0 up to the threshold, -1 from threshold + margin on. It
    lowers the probability of these concepts and is no filter: CLIP detects only the concepts that are named. Cosines of
    images with fitting texts are about 0.2 to 0.35 in OpenAI's models; measure yours before you set the threshold.

    Args:
        avoid: the concepts, as texts ("blood", "a photo of a weapon").
    """

    def __init__(self, clip: ClipEncoder, avoid: list[Name], threshold: Number = 0.25, margin: Number = 0.05) -> None:
        if isinstance(avoid, str) or not avoid:
            raise RewardError(f"avoid: found {avoid!r}, allowed: a list of at least one text")
        if not margin > 0:
            raise RewardError(f"margin: found {margin}, allowed: more than 0")
        self.clip, self.avoid, self.threshold, self.margin = clip, list(avoid), threshold, margin

    def __call__(self, images: Images, prompts: Texts, enhanced_prompts: Texts) -> torch.Tensor:
        """(N,) penalties of the images."""
        highest = (self.clip.encode_images(images) @ self.clip.encode_texts(self.avoid).T).amax(dim=1)
        return 0 - ((highest - self.threshold) / self.margin).clamp(0, 1)  # 0, where a minus alone gives -0


class Style:
    """Cosine between an image and a reference for its style, in [-1, 1]: an image, or a phrase ("an oil painting").

    CLIP does not separate style from content: the images become like what a reference image shows, too.
    """

    def __init__(
        self, clip: ClipEncoder, reference: Image.Image | Path | str | None = None, phrase: str | None = None
    ) -> None:
        if (reference is None) == (phrase is None):
            found = "neither" if phrase is None else "both"
            raise RewardError(f"reference, phrase: found {found}, allowed: one of them, an image file or some words")
        target = clip.encode_texts([phrase]) if reference is None else clip.encode_images([_opened(reference)])
        self.clip, self.target = clip, target[0]

    def __call__(self, images: Images, prompts: Texts, enhanced_prompts: Texts) -> torch.Tensor:
        """(N,) cosines between images and the reference."""
        return self.clip.encode_images(images) @ self.target


def _opened(reference: Image.Image | Path | str) -> Image.Image:
    if isinstance(reference, Image.Image):
        return reference
    try:
        with Image.open(reference) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise RewardError(
            f"reference: found {str(reference)!r}, allowed: a picture file ({one_line(error)})"
        ) from error


class Diversity:
    """1 - the mean CLIP cosine to the other images of the same prompt, in [0, 2]; 0 where all are alike.

    NaN for an image without another one in its group. An evaluation, which has one rewrite a prompt, leaves it out of
    its total (`Rewards.total`). With several images a rewrite, its own other images count too.
    """

    def __init__(self, clip: ClipEncoder) -> None:
        self.clip = clip

    def __call__(
        self, images: Images, prompts: Texts, enhanced_prompts: Texts, group_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """(N,) distances to the group; `group_ids` (N,) says which rows belong together."""
        if group_ids is None:
            raise RewardError("compares the images of a group, and found no group_ids. Pass them to Rewards.score")
        features = self.clip.encode_images(images)
        ids = torch.as_tensor(group_ids).to(features.device)
        others = (ids[:, None] == ids[None, :]).fill_diagonal_(False).to(features.dtype)
        return 1 - (others * (features @ features.T)).sum(dim=1) / others.sum(dim=1)
