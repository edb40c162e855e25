"""CLIP in open_clip's and transformers' forms: unit vectors of images and texts, and their cosine as a reward."""

import hashlib
import logging
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, CLIPModel, PreTrainedModel

from grpo_kit.config import media
from grpo_kit.config.hub import ModelError, load_whole, loading
from grpo_kit.config.threads import fitting_threads
from grpo_kit.rewards.protocol import Images, Texts

logger = logging.getLogger(__name__)
TOKENIZING = threading.Lock()  # a hub tokenizer's call changes its padding and length: one thread at a time
_KEPT_TEXTS = 4096
_KEPT_BATCHES = 2  # of images: the rewards that share a model score the same ones
Loaded = tuple[torch.nn.Module, Callable[[Image.Image], torch.Tensor], Callable[..., torch.Tensor]]


@dataclass(eq=False, repr=False)
class ClipEncoder:
    """Image and text embeddings of a frozen CLIP; `truncated` counts texts longer than its context, which were cut."""

    name = "clip_similarity"  # of the reward, for the log

    model: torch.nn.Module  # with the methods `encode_image` and `encode_text` of open_clip's models
    preprocess: Callable[[Image.Image], torch.Tensor]  # an image → its pixels (3, height, width)
    tokenizer: Callable[..., torch.Tensor]  # texts → ids (N, context)
    device: torch.device  # where the model runs

    def __post_init__(self) -> None:
        self.model.to(self.device).eval().requires_grad_(False)
        self.truncated = 0
        self._texts: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._batches: tuple[tuple[bytes, torch.Tensor], ...] = ()

    @torch.no_grad()
    def encode_images(self, images: Images) -> torch.Tensor:
        """(N, D) unit vectors. The last two batches are kept, by their pixels."""
        key = fingerprint(images)
        if kept := [features for batch, features in self._batches if batch == key]:
            return kept[0]
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        with fitting_threads(self.model):
            features = self.model.encode_image(pixels, normalize=True).float()
        self._batches = ((key, features), *self._batches[: _KEPT_BATCHES - 1])
        return features

    @torch.no_grad()
    def encode_texts(self, texts: Texts) -> torch.Tensor:
        """(N, D) unit vectors; each distinct text is encoded once and kept."""
        found = {text: self._encoded(text) for text in dict.fromkeys(texts)}
        while len(self._texts) > _KEPT_TEXTS:
            self._texts.popitem(last=False)
        return torch.stack([found[text] for text in texts])

    def _encoded(self, text: str) -> torch.Tensor:
        """(D,) one text at a time, so that its embedding does not depend on the others of its batch."""
        features = self._texts.get(text)
        if features is None:
            with TOKENIZING:
                ids = self.tokenizer([text])
                self._count_truncated(text, ids)
            with fitting_threads(self.model):
                features = self.model.encode_text(ids.to(self.device), normalize=True).float()[0]
            self._texts[text] = features
        return features

    def _count_truncated(self, text: str, ids: torch.Tensor) -> None:
        """Count a text that was cut: a context longer by one token changes the ids before it."""
        length = ids.shape[1]
        if not torch.equal(self.tokenizer([text], context_length=length + 1)[:, :length], ids):
            if not self.truncated:
                logger.warning("%s: a text longer than %d tokens was cut: %r", self.name, length, text)
            self.truncated += 1


class ClipSimilarity(ClipEncoder):
    """Cosine between image and *user's* prompt, in [-1, 1] (CLIPScore, arXiv 2104.08718); others share its encoder."""

    def __call__(self, images: Images, prompts: Texts, enhanced_prompts: Texts) -> torch.Tensor:
        """(N,) cosines between images and users' prompts."""
        return (self.encode_images(images) * self.encode_texts(prompts)).sum(dim=-1)


def load_clip_similarity(name: str, pretrained: str | None, device: torch.device) -> ClipSimilarity:
    """A CLIP by folder or hub id, or by open_clip's name and weights.

    A folder is in open_clip's form or in transformers'; a hub id that begins with "hf-hub:" is in open_clip's.
    """
    setting = "model_settings.clip_model"
    if is_transformers_clip(name):
        return ClipSimilarity(*load_transformers_clip(name, setting, name, setting), device)
    return ClipSimilarity(*load_open_clip(name, pretrained, setting), device)


def fingerprint(images: Images) -> bytes:
    """A digest of the images' pixels, or of other media."""
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        if not isinstance(image, Image.Image):
            digest.update(media.digest(image).encode())
            continue
        plain = image if image.mode == "RGB" else image.convert("RGBA")
        digest.update(f"{plain.mode}{plain.size}".encode())
        digest.update(plain.tobytes())
    return digest.digest()


@torch.random.fork_rng(devices=[])  # it fills a model with random numbers first: the user's stay as they are
def load_open_clip(name: str, pretrained: str | None, setting: str, **options: object) -> Loaded:
    """Model, preprocessing and tokenizer in open_clip's form, by folder, hub id ("hf-hub:…"), or name and weights.

    Args:
        pretrained: open_clip's tag of the weights, or their file.
        setting: the dotted setting that names the model, for errors.
        options: of open_clip's `create_model_from_pretrained`.
    """
    if Path(name).is_dir():
        name, pretrained = f"local-dir:{name}", None
    tag = (open_clip.get_pretrained_cfg(name, pretrained) if pretrained else None) or {}  # what open_clip knows of it
    is_file = bool(pretrained) and Path(pretrained).is_file()
    if name in open_clip.list_models() and not is_file and not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "no tag"
        place = "model_settings.clip_pretrained" if setting == "model_settings.clip_model" else setting
        raise ModelError(
            f"{place}: could not load {name!r}: found {pretrained!r}, allowed: {tags}, or the path of a file of "
            "weights (.safetensors, .bin, .pt); set one of them"
        )
    with loading(setting, name.removeprefix("local-dir:"), tag.get("hf_hub", "").strip("/") or None):
        if is_file:
            names = zipfile.ZipFile(pretrained).namelist() if zipfile.is_zipfile(pretrained) else []
            if any(entry.endswith("/constants.pkl") for entry in names):  # OpenAI's TorchScript, which runs no Python
                # such weights were trained with QuickGELU: with another activation the scores are wrong
                options |= {"weights_only": False, "force_quick_gelu": True}
        elif tag.get("quick_gelu"):
            options["force_quick_gelu"] = True
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained=pretrained, **options)
        return model, preprocess, open_clip.get_tokenizer(name)


def is_transformers_clip(name: str) -> bool:
    """Whether a model's name is a folder in transformers' form, or a hub id without open_clip's prefix."""
    folder = Path(name)
    if folder.is_dir():
        return (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file()
    return name.count("/") == 1 and not folder.is_absolute() and not name.startswith("hf-hub:")


class TransformersClip(torch.nn.Module):
    """A transformers `CLIPModel` with the methods of open_clip's models."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def logit_scale(self) -> torch.nn.Parameter:
        """The logarithm of what cosines are multiplied by."""
        return self.model.logit_scale

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


def load_transformers_clip(name: str, setting: str, processor: str, processor_setting: str) -> Loaded:
    """A transformers `CLIPModel` in open_clip's form, with an image processor and a tokenizer, by folder or hub id."""
    with loading(setting, name):
        kind = AutoConfig.from_pretrained(name).model_type
    if kind != "clip":
        raise ModelError(
            f"{setting}: found {name!r} of type {kind!r}, allowed here: clip; open_clip has others by name (SigLIP …)"
        )
    model = load_whole(CLIPModel, name, setting)
    with loading(processor_setting, processor):
        tools = AutoProcessor.from_pretrained(processor)
    context = model.config.text_config.max_position_embeddings

    def preprocess(image: Image.Image) -> torch.Tensor:
        return tools.image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def tokenize(texts: Sequence[str], context_length: int = context) -> torch.Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": context_length}
        return tools.tokenizer(list(texts), return_tensors="pt", **options)["input_ids"]

    return TransformersClip(model), preprocess, tokenize
