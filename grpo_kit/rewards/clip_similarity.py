"""CLIP similarity: how well an image shows the *user's* prompt, whatever the policy made of it."""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from PIL import Image

from grpo_kit.models.loading import ModelError, load_failure

logger = logging.getLogger(__name__)
_KEPT_TEXTS = 4096
_OPENAI = {  # transformers' names of OpenAI's models → open_clip's
    "openai/clip-vit-base-patch32": "ViT-B-32-quickgelu",
    "openai/clip-vit-base-patch16": "ViT-B-16-quickgelu",
    "openai/clip-vit-large-patch14": "ViT-L-14-quickgelu",
    "openai/clip-vit-large-patch14-336": "ViT-L-14-336-quickgelu",
}


class ClipSimilarity:
    """Cosine between image and text embeddings of an open_clip model, in [-1, 1].

    `truncated` counts the texts that were longer than the model's context and were cut.
    """

    def __init__(self, model: open_clip.CLIP, preprocess: object, tokenizer: object, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.device = device
        self.truncated = 0
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]
    ) -> torch.Tensor:
        """(N,) cosines between images and users' prompts; the rewrites are not looked at."""
        return (self.encode_images(images) * self.encode_texts(prompts)).sum(dim=-1)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(N, D) unit vectors."""
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        return self.model.encode_image(pixels, normalize=True).float()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(N, D) unit vectors; each distinct text is encoded once and kept."""
        for text in dict.fromkeys(texts):
            if text not in self._features:  # one at a time: a text's features must not depend on what it came with
                ids = self.tokenizer([text])
                self._count_truncated(text, ids)
                self._features[text] = self.model.encode_text(ids.to(self.device), normalize=True).float()[0]
        rows = torch.stack([self._features[text] for text in texts])
        while len(self._features) > _KEPT_TEXTS:
            self._features.popitem(last=False)
        return rows

    def _count_truncated(self, text: str, ids: torch.Tensor) -> None:
        """A text was cut where one more place in the context changes what stands in the places before it."""
        length = ids.shape[1]
        if not torch.equal(self.tokenizer([text], context_length=length + 1)[:, :length], ids):
            if not self.truncated:
                logger.warning("clip_similarity: a text longer than %d tokens was cut: %r", length, text)
            self.truncated += 1


def load_clip_similarity(name: str, pretrained: str | None, device: torch.device) -> ClipSimilarity:
    """An open_clip model from a folder, by its name and weights, from the hub ("hf-hub:…"), or OpenAI's by hub id."""
    if Path(name).is_dir():
        name, pretrained = f"local-dir:{name}", None
    elif name in _OPENAI:
        name, pretrained = _OPENAI[name], "openai"
    try:
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained=pretrained)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # the libraries raise a dozen kinds; each becomes one line that says what to do
        raise ModelError(load_failure("clip_model", name.removeprefix("local-dir:"), error)) from error
    return ClipSimilarity(model, preprocess, tokenizer, device)
