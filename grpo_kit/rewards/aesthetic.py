"""The LAION aesthetic head: linear layers on normalised CLIP image embeddings, read from a weights file."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from grpo_kit.config.hub import ModelError
from grpo_kit.rewards.clip_encoder import ClipEncoder

Layer = tuple[torch.Tensor, torch.Tensor]  # weight (out, in), bias (out,)


class Aesthetic:
    """How much people like the look of an image, about 1 to 10 with LAION's heads (arXiv 2210.08402, section 3).

    Linear layers, one after another without anything between them, on the unit image embedding: the form of LAION's
    `sa_0_4_vit_l_14_linear` (one layer) and `sac+logos+ava1-l14-linearMSE` (five). Those want OpenAI's ViT-L/14 as
    `clip_model`. A head with activations between its layers is another function, which its weights do not tell.

    Args:
        clip: the encoder whose embeddings the head was trained on.
        layers: (weight, bias) of each layer, in order; the last one has a single output.

    Raises:
        ModelError: shapes that do not fit each other, or the encoder.
    """

    def __init__(self, clip: ClipEncoder, layers: Sequence[Layer]) -> None:
        self.clip = clip
        self.layers = [(weight.float().to(clip.device), bias.float().to(clip.device)) for weight, bias in layers]
        _check_shapes(self.layers, _embedding_size(clip))

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]
    ) -> torch.Tensor:
        """(N,) scores of the images; no prompt is looked at."""
        values = self.clip.encode_images(images)
        for weight, bias in self.layers:
            values = torch.nn.functional.linear(values, weight, bias)
        return values[:, 0]


def load_aesthetic(weights: Path | str, clip: ClipEncoder) -> Aesthetic:
    """A head from a safetensors file, or from a torch file that holds tensors alone.

    Raises:
        ModelError: no such file, other things than tensors in it, or shapes that do not fit.
    """
    try:
        return Aesthetic(clip, _layers(_tensors(Path(weights))))
    except ModelError as error:
        raise ModelError(f"aesthetic: weights {str(weights)!r}: {error}") from error


def _tensors(place: Path) -> Mapping[str, torch.Tensor]:
    if not place.is_file():
        raise ModelError("no such file. Download LAION's head, or give the path of yours")
    try:
        if place.suffix == ".safetensors":
            return load_file(place)
        found = torch.load(place, map_location="cpu", weights_only=True)  # runs no code of the file's
    except (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ModelError(f"no file of plain tensors ({type(error).__name__}: {reason}). Download it again") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ModelError(f"found {type(found).__name__}, allowed: a state dict, name → tensor")
    return found


def _layers(tensors: Mapping[str, torch.Tensor]) -> list[Layer]:
    """(weight, bias) pairs, in the order of the numbers in their names ("layers.0.weight", "layers.2.weight" …)."""
    names = [name.removesuffix("weight") for name in tensors if name == "weight" or name.endswith(".weight")]
    names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    expected = {f"{name}{kind}" for name in names for kind in ("weight", "bias")}
    if not names or expected != set(tensors):
        odd = sorted(expected ^ set(tensors)) or ["nothing"]
        raise ModelError(f"found {', '.join(odd)[:150]} alone, allowed: a weight and a bias for each linear layer")
    return [(tensors[f"{name}weight"], tensors[f"{name}bias"]) for name in names]


def _check_shapes(layers: Sequence[Layer], size: int) -> None:
    """Each layer takes what the one before it gives, the first an embedding, and the last one gives one number."""
    for number, (weight, bias) in enumerate(layers):
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            found = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            raise ModelError(f"layer {number}: found shapes {found}, allowed: (out, in) and (out,)")
        if weight.shape[1] != size:
            source = "clip_model's embeddings have" if number == 0 else "the layer before gives"
            raise ModelError(f"layer {number} takes {weight.shape[1]} numbers, but {source} {size}")
        size = weight.shape[0]
    if size != 1:
        raise ModelError(f"the last layer gives {size} numbers, allowed: 1, the score")


def _embedding_size(clip: ClipEncoder) -> int:
    return clip.encode_texts([""]).shape[1]
