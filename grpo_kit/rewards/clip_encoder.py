"""CLIP as an encoder: images and texts as unit vectors of one space, for all rewards that compare them."""

import hashlib
import logging
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from PIL import Image

from grpo_kit.config.hub import ModelError, load_failure

logger = logging.getLogger(__name__)
TOKENIZING = threading.Lock()  # a tokenizer of the hub keeps a call's length in itself: one thread at a time
_KEPT_TEXTS = 4096
_KEPT_BATCHES = 2  # of images: what one reward encoded, the next one asks for


class ClipEncoder:
    """Image and text embeddings of a CLIP in open_clip's form, frozen.

    `truncated` counts the texts that were longer than the model's context and were cut.
    """

    def __init__(self, model: torch.nn.Module, preprocess: object, tokenizer: object, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.device = device
        self.truncated = 0
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._batches: tuple[tuple[bytes, torch.Tensor], ...] = ()

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(N, D) unit vectors. The last batches are kept by content: rewards that share the model encode once."""
        key = _fingerprint(images)
        for kept, features in self._batches:
            if kept == key:
                return features
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        features = self.model.encode_image(pixels, normalize=True).float()
        self._batches = ((key, features), *self._batches[: _KEPT_BATCHES - 1])
        return features

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(N, D) unit vectors; each distinct text is encoded once and kept."""
        found = {text: self._encoded(text) for text in dict.fromkeys(texts)}
        while len(self._features) > _KEPT_TEXTS:
            self._features.popitem(last=False)
        return torch.stack([found[text] for text in texts])

    def _encoded(self, text: str) -> torch.Tensor:
        """(D,) one text at a time: its features must not depend on what it came with."""
        features = self._features.get(text)
        if features is None:
            with TOKENIZING:
                ids = self.tokenizer([text])
                self._count_truncated(text, ids)
            features = self.model.encode_text(ids.to(self.device), normalize=True).float()[0]
            self._features[text] = features
        return features

    def _count_truncated(self, text: str, ids: torch.Tensor) -> None:
        """A text was cut where one more place in the context changes what stands in the places before it."""
        length = ids.shape[1]
        if not torch.equal(self.tokenizer([text], context_length=length + 1)[:, :length], ids):
            if not self.truncated:
                logger.warning("clip_similarity: a text longer than %d tokens was cut: %r", length, text)
            self.truncated += 1

    def forget_images(self) -> None:
        """Let the kept image embeddings go, so that the next call encodes again."""
        self._batches = ()


def open_clip_model(
    name: str, pretrained: str | None, setting: str = "model_settings.clip_model", **options: object
) -> tuple[open_clip.CLIP, object, object]:
    """Model, preprocessing and tokenizer of an open_clip folder, name and weights, or hub id ("hf-hub:…").

    Raises:
        ModelError: it cannot be loaded; the line names the `setting`.
    """
    if Path(name).is_dir():
        name, pretrained = f"local-dir:{name}", None
    try:
        model, preprocess = open_clip.create_model_from_pretrained(
            name, pretrained=pretrained, **_form_of_the_weights(name, pretrained), **options
        )
        return model, preprocess, open_clip.get_tokenizer(name)
    except Exception as error:  # the libraries raise a dozen kinds; each becomes one line that says what to do
        if name in open_clip.list_models() and not _weights_exist(name, pretrained):
            raise ModelError(_no_such_weights(setting, name, pretrained)) from error
        repository = _pretrained(name, pretrained).get("hf_hub", "").strip("/") or None
        raise not_loaded(setting, name.removeprefix("local-dir:"), error, repository) from error


def not_loaded(setting: str, name: str, error: Exception, repository: str | None = None) -> ModelError:
    """The error for a model that a dotted setting names."""
    return ModelError(load_failure(setting, name, error, repository))


def _pretrained(name: str, tag: str | None) -> dict[str, object]:
    """What open_clip knows of the weights that a tag names."""
    return (open_clip.get_pretrained_cfg(name, tag) if tag else None) or {}


def _form_of_the_weights(name: str, pretrained: str | None) -> dict[str, bool]:
    """Options for weights in OpenAI's form; with another activation than they were trained with, scores are off."""
    if pretrained and Path(pretrained).is_file():
        scripted = zipfile.is_zipfile(pretrained) and any(
            entry.endswith("/constants.pkl") for entry in zipfile.ZipFile(pretrained).namelist()
        )  # a TorchScript archive, as OpenAI published them; torch reads it without running Python
        return {"weights_only": False, "force_quick_gelu": True} if scripted else {}
    return {"force_quick_gelu": True} if _pretrained(name, pretrained).get("quick_gelu") else {}


def _weights_exist(name: str, pretrained: str | None) -> bool:
    return bool(pretrained) and (Path(pretrained).is_file() or bool(_pretrained(name, pretrained)))


def _no_such_weights(setting: str, name: str, pretrained: str | None) -> str:
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "no tag"
    place = "model_settings.clip_pretrained" if setting == "model_settings.clip_model" else setting
    return (
        f"{place}: could not load {name!r}: found {pretrained!r}, allowed: {tags}, or the path of a file of weights "
        "(.safetensors, .bin, .pt); set one of them"
    )


def _fingerprint(images: Sequence[Image.Image]) -> bytes:
    """What the pixels of some images hash to."""
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        plain = image if image.mode == "RGB" else image.convert("RGBA")
        digest.update(f"{plain.mode}{plain.size}".encode())
        digest.update(plain.tobytes())
    return digest.digest()
