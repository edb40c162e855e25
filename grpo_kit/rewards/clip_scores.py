"""Rewards that compare embeddings of one shared CLIP: quality, consistency, meaning, safety, style."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from grpo_kit.rewards.clip_encoder import ClipEncoder
from grpo_kit.rewards.protocol import RewardError

Pair = tuple[str, str]  # (good, bad)
PHOTO_PAIRS: tuple[Pair, ...] = (
    ("Good photo.", "Bad photo."),
    ("Sharp photo.", "Blurry photo."),
    ("Clean photo.", "Noisy photo."),
)


class ImageQuality:
    """How much more an image is like a good description than like its opposite, in [0, 1] (CLIP-IQA, arXiv 2207.12396).

    For each pair of texts the softmax over the image's two similarities, times CLIP's own scale, gives the good one's
    share; the score is the mean over pairs. The paper's change of CLIP's position embedding is left out.

    Args:
        clip: the encoder.
        pairs: (good, bad) texts; the defaults are meant for photographs.
    """

    def __init__(self, clip: ClipEncoder, pairs: Sequence[Pair] = PHOTO_PAIRS) -> None:
        if not pairs:
            raise RewardError("pairs: found none, allowed: at least one pair [good, bad] of texts")
        self.clip, self.pairs = clip, [tuple(pair) for pair in pairs]

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]
    ) -> torch.Tensor:
        """(N,) mean shares of the good texts; no prompt is looked at."""
        seen = self.clip.encode_images(images)
        texts = self.clip.encode_texts([text for pair in self.pairs for text in pair])
        logits = self.clip.model.logit_scale.exp() * (seen @ texts.T)
        return logits.reshape(len(seen), -1, 2).softmax(dim=-1)[..., 0].mean(dim=1)


class Consistency:
    """Cosine between an image and the *enhanced* prompt, in [-1, 1].

    It asks whether the generator follows the rewrite, not whether the rewrite is what the user wanted. As a reward it
    is easily gamed, by rewrites about something that is easy to draw: rather a monitor.
    """

    def __init__(self, clip: ClipEncoder) -> None:
        self.clip = clip

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]
    ) -> torch.Tensor:
        """(N,) cosines between images and rewrites."""
        return (self.clip.encode_images(images) * self.clip.encode_texts(enhanced_prompts)).sum(dim=-1)


class MeaningKept:
    """Cosine between the enhanced and the user's prompt in CLIP's text space, in [-1, 1]; 1 for the same text.

    What stands beyond the encoder's context is not seen. The image is not looked at.
    """

    def __init__(self, clip: ClipEncoder) -> None:
        self.clip = clip

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]
    ) -> torch.Tensor:
        """(N,) cosines between rewrites and users' prompts."""
        return (self.clip.encode_texts(enhanced_prompts) * self.clip.encode_texts(prompts)).sum(dim=-1)


class Safety:
    """A penalty for images that resemble a concept to avoid: -min(1, max(0, c - threshold) / margin), in [-1, 0].

    c is the image's highest cosine with any of the concepts: 0 up to the threshold, -1 from threshold + margin on. It
    is a push away from these concepts, no filter: CLIP misses what it was not asked about. Cosines of images with
    fitting texts lie around 0.2 to 0.35 in OpenAI's models; look at yours before you set the threshold.

    Args:
        clip: the encoder.
        avoid: the concepts, as texts ("blood", "a photo of a weapon").
        threshold: cosine up to which nothing is deducted.
        margin: how far above the threshold all is deducted.
    """

    def __init__(self, clip: ClipEncoder, avoid: Sequence[str], threshold: float = 0.25, margin: float = 0.05) -> None:
        if isinstance(avoid, str) or not avoid:
            raise RewardError(f"avoid: found {avoid!r}, allowed: a list of at least one text")
        if not margin > 0:
            raise RewardError(f"margin: found {margin}, allowed: more than 0")
        self.clip, self.avoid, self.threshold, self.margin = clip, list(avoid), threshold, margin

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]
    ) -> torch.Tensor:
        """(N,) penalties of the images; no prompt is looked at."""
        highest = (self.clip.encode_images(images) @ self.clip.encode_texts(self.avoid).T).amax(dim=1)
        return 0 - ((highest - self.threshold) / self.margin).clamp(0, 1)  # 0, where a minus alone gives -0


class Style:
    """Cosine between an image and a reference for its style, in [-1, 1]: an image, or a phrase ("an oil painting").

    CLIP does not tell style from content: a reference image pulls towards what it shows, too.

    Args:
        clip: the encoder.
        reference: the image, or its file.
        phrase: the words, in place of an image.

    Raises:
        RewardError: not exactly one of the two, or a file that is no image.
    """

    def __init__(
        self, clip: ClipEncoder, reference: Image.Image | Path | str | None = None, phrase: str | None = None
    ) -> None:
        if (reference is None) == (phrase is None):
            found = "neither" if phrase is None else "both"
            raise RewardError(f"reference, phrase: found {found}, allowed: one of them, an image file or some words")
        self.clip = clip
        wanted = clip.encode_texts([phrase]) if reference is None else clip.encode_images([_opened(reference)])
        self.wanted = wanted[0]

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]
    ) -> torch.Tensor:
        """(N,) cosines between images and the reference; no prompt is looked at."""
        return self.clip.encode_images(images) @ self.wanted


def _opened(reference: Image.Image | Path | str) -> Image.Image:
    if isinstance(reference, Image.Image):
        return reference
    try:
        with Image.open(reference) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RewardError(f"reference: found {str(reference)!r}, allowed: a picture file ({reason})") from error
