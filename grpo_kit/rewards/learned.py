"""Rewards that were learned from people's choices: the LAION aesthetic head, PickScore, and HPS."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from grpo_kit.config import Name, one_line
from grpo_kit.config.hub import ModelError, loading
from grpo_kit.rewards.clip import ClipEncoder, ClipSimilarity, load_open_clip, load_transformers_clip
from grpo_kit.rewards.protocol import Images, Texts

Layer = tuple[torch.Tensor, torch.Tensor]  # weight (out, in), bias (out,)
PICKSCORE = ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")  # model, processor
HPS = ("ViT-H-14", "xswu/HPSv2/HPS_v2.1_compressed.pt")  # architecture, weights
_CPU = torch.device("cpu")


class Aesthetic:
    """How much people like the look of an image, about 1 to 10 with LAION's heads (arXiv 2210.08402, section 3).

    Linear layers, one after another without activations, on the unit image embedding: the form of LAION's
    `sa_0_4_vit_l_14_linear` (one layer) and `sac+logos+ava1-l14-linearMSE` (five). Those need OpenAI's ViT-L/14 as
    `clip_model`. A head with activations between its layers is another function, which its weights do not show.

    Raises:
        ModelError: layers whose shapes do not fit each other or the encoder, or do not end in one number.
    """

    def __init__(self, clip: ClipEncoder, layers: Sequence[Layer]) -> None:
        self.clip = clip
        self.layers = [(weight.float().to(clip.device), bias.float().to(clip.device)) for weight, bias in layers]
        size = clip.encode_texts([""]).shape[1]
        for number, (weight, bias) in enumerate(layers):
            if weight.shape[1:] != (size,) or bias.shape != weight.shape[:1]:
                found = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
                source = "the layer before it" if number else "clip_model"
                raise ModelError(f"layer {number}: found shapes {found}, allowed after {source}: (n, {size}) and (n,)")
            size = weight.shape[0]
        if size != 1:
            raise ModelError(f"the last layer gives {size} numbers, allowed: 1, the score")

    def __call__(self, images: Images, prompts: Texts, enhanced_prompts: Texts) -> torch.Tensor:
        """(N,) scores of the images."""
        values = self.clip.encode_images(images)
        for weight, bias in self.layers:
            values = torch.nn.functional.linear(values, weight, bias)
        return values[:, 0].detach()


def load_aesthetic(weights: Path, clip: ClipEncoder) -> Aesthetic:
    """A head from a safetensors file, or from a torch file that holds tensors alone; `ModelError` for any other."""
    try:
        return Aesthetic(clip, _layers(_tensors(Path(weights))))
    except ModelError as error:
        raise ModelError(f"aesthetic: weights {str(weights)!r}: {error}") from error


def _tensors(file: Path) -> Mapping[str, torch.Tensor]:
    if not file.is_file():
        raise ModelError("no such file. Download LAION's head, or give the path of yours")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)  # runs no code of the file's
    except (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = one_line(error, 150)
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


class PickScore(ClipSimilarity):
    """How much people prefer an image for the user's prompt: logit scale times CLIP cosine (arXiv 2305.01569).

    PickScore v1 gives about 17 to 24. Differences for the same prompt alone mean something: log-odds of a preference.
    """

    name = "pickscore"

    def __call__(self, images: Images, prompts: Texts, enhanced_prompts: Texts) -> torch.Tensor:
        """(N,) scores against the users' prompts."""
        return self.model.logit_scale.exp() * super().__call__(images, prompts, enhanced_prompts)


def load_pickscore(model: Name | None = None, processor: Name | None = None, device: torch.device = _CPU) -> PickScore:
    """A transformers `CLIPModel` by folder or hub id (PickScore v1 by default), and a processor (the model's own)."""
    model, processor = (model, processor or model) if model else PICKSCORE
    setting = "reward_settings.options.pickscore"
    return PickScore(*load_transformers_clip(model, f"{setting}.model", processor, f"{setting}.processor"), device)


class HumanPreference(ClipSimilarity):
    """How much people prefer an image for the user's prompt: the cosine of a CLIP that learned it (arXiv 2306.09341).

    HPS v2 gives about 0.2 to 0.35. Only differences for the same prompt have a meaning.
    """

    name = "hps"


def load_hps(model: Name | None = None, weights: Name | None = None, device: torch.device = _CPU) -> HumanPreference:
    """An open_clip model with preference weights.

    Args:
        model: an open_clip folder or hub id ("hf-hub:…"), which has its weights, or the name of an architecture; None
            is HPS v2.1 with its weights.
        weights: an architecture's, a file (safetensors, or plain tensors), or "owner/repository/file" on the hub.
    """
    model, weights = (model, weights) if model else HPS
    setting = "reward_settings.options.hps"
    if weights is None or Path(model).is_dir() or model.startswith("hf-hub:"):
        return HumanPreference(*load_open_clip(model, None, f"{setting}.model"), device)
    setting = f"{setting}.weights"
    # HPS sees the whole image, with bars beside it where it is no square; CLIP's own preprocessing cuts out the middle
    weights = _file(weights, setting)
    return HumanPreference(*load_open_clip(model, weights, setting, image_resize_mode="longest"), device)


def _file(weights: str, setting: str) -> str:
    """The path of a file of weights, fetched from the hub where it is not on this machine."""
    parts = weights.split("/", 2)
    if Path(weights).is_file() or Path(weights).is_absolute() or len(parts) < 3:
        return weights
    with loading(setting, weights):
        return hf_hub_download(repo_id="/".join(parts[:2]), filename=parts[2])
