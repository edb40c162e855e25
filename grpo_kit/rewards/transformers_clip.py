"""A transformers `CLIPModel` in the form of open_clip's models, for a hub id or a folder that holds one."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, CLIPModel, CLIPProcessor

from grpo_kit.config.hub import ModelError, require_weights
from grpo_kit.rewards.clip_encoder import not_loaded


class TransformersClip(torch.nn.Module):
    """The two calls of an open_clip model, on a transformers `CLIPModel`."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, pixels: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """(N, D) embeddings of (N, 3, height, width) preprocessed pixels; unit vectors with `normalize`."""
        features = self.model.get_image_features(pixel_values=pixels).pooler_output
        return torch.nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, ids: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """(N, D) embeddings of (N, context) token ids; unit vectors with `normalize`.

        No mask is needed: attention is causal, and the embedding is read at the first end-of-text token.
        """
        features = self.model.get_text_features(input_ids=ids).pooler_output
        return torch.nn.functional.normalize(features, dim=-1) if normalize else features


def transformers_clip(name: str, setting: str = "model_settings.clip_model") -> tuple[TransformersClip, object, object]:
    """Model, preprocessing and tokenizer, as `open_clip_model` gives them, of a `CLIPModel` by folder or hub id.

    Raises:
        ModelError: it cannot be loaded; the line names the `setting`.
    """
    model = load_clip_model(name, setting)
    try:
        processor = AutoProcessor.from_pretrained(name)
    except Exception as error:  # the libraries raise a dozen kinds; each becomes one line that says what to do
        raise not_loaded(setting, name, error) from error
    return (
        TransformersClip(model),
        _Pixels(processor),
        _Ids(processor, model.config.text_config.max_position_embeddings),
    )


def load_clip_model(name: str, setting: str) -> CLIPModel:
    """A transformers `CLIPModel` with all of its weights, by folder or hub id.

    Raises:
        ModelError: it cannot be loaded, is of another kind, or lacks weights, which transformers would draw at random.
    """
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        model, found = CLIPModel.from_pretrained(name, output_loading_info=True) if kind == "clip" else (None, {})
    except Exception as error:  # the libraries raise a dozen kinds; each becomes one line that says what to do
        raise not_loaded(setting, name, error) from error
    if model is None:
        raise ModelError(
            f"{setting}: found {name!r} of type {kind!r}, allowed here: clip; open_clip has others by name (SigLIP …)"
        )
    require_weights(found["missing_keys"], setting, name)
    return model


def is_transformers_clip(name: str) -> bool:
    """Whether a reward model's name is a hub id without open_clip's prefix, or a folder in transformers' form."""
    folder = Path(name)
    if folder.is_dir():
        return (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file()
    return name.count("/") == 1 and not folder.is_absolute() and not name.startswith("hf-hub:")


class _Pixels:
    """A picture as the model's pixels (3, height, width)."""

    def __init__(self, processor: CLIPProcessor) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")
        return pixels["pixel_values"][0]


class _Ids:
    """Texts as token ids (N, context), cut and padded to the context, an over-long text with its end token kept."""

    def __init__(self, processor: CLIPProcessor, context_length: int) -> None:
        self.tokenizer = processor.tokenizer
        self.context_length = context_length

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> torch.Tensor:
        longest = context_length or self.context_length
        batch = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        )
        return batch["input_ids"]
