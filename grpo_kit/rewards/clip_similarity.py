"""CLIP similarity: how well an image shows the *user's* prompt, whatever the policy made of it."""

from collections.abc import Sequence

import torch
from PIL import Image

from grpo_kit.rewards.clip_encoder import ClipEncoder, open_clip_model
from grpo_kit.rewards.transformers_clip import is_transformers_clip, transformers_clip


class ClipSimilarity(ClipEncoder):
    """Cosine between image and text embeddings of an open_clip model, in [-1, 1] (CLIPScore, arXiv 2104.08718).

    It is also the encoder that other rewards share. `truncated` counts the texts that were longer than the model's
    context and were cut.
    """

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]
    ) -> torch.Tensor:
        """(N,) cosines between images and users' prompts; the rewrites are not looked at."""
        return (self.encode_images(images) * self.encode_texts(prompts)).sum(dim=-1)


def load_clip_similarity(name: str, pretrained: str | None, device: torch.device) -> ClipSimilarity:
    """A CLIP by folder or hub id, or by open_clip's name and weights.

    A folder is in open_clip's form or in transformers'; a hub id is in open_clip's form where it begins with "hf-hub:".
    """
    if is_transformers_clip(name):
        return ClipSimilarity(*transformers_clip(name), device)
    return ClipSimilarity(*open_clip_model(name, pretrained), device)
