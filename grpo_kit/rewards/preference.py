"""Models of what people prefer: the PickScore form (transformers) and the HPS form (open_clip)."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import AutoProcessor, CLIPModel, CLIPProcessor

from grpo_kit.rewards.clip_encoder import TOKENIZING, not_loaded, open_clip_model
from grpo_kit.rewards.clip_similarity import ClipSimilarity
from grpo_kit.rewards.transformers_clip import load_clip_model

logger = logging.getLogger(__name__)
PICKSCORE = ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")  # model, processor
HPS = ("ViT-H-14", "xswu/HPSv2/HPS_v2.1_compressed.pt")  # architecture, weights


class PickScore:
    """How much people prefer an image for the user's prompt: logit scale times CLIP cosine (arXiv 2305.01569).

    Any transformers `CLIPModel` with its processor. PickScore v1 gives about 17 to 24; only differences for the same
    prompt mean something: its scale makes them the log-odds of a preference. `truncated` counts texts that were longer
    than the model's context and were cut.
    """

    def __init__(self, model: CLIPModel, processor: CLIPProcessor, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.processor = processor
        self.device = device
        self.truncated = 0

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]
    ) -> torch.Tensor:
        """(N,) scores against the users' prompts; the rewrites are not looked at."""
        distinct = list(dict.fromkeys(prompts))
        pictures = [image.convert("RGB") for image in images]
        with TOKENIZING:
            inputs = self.processor(
                text=distinct,
                images=pictures,
                padding=True,
                truncation=True,
                max_length=self._longest(distinct),
                return_tensors="pt",
            )
        found = self.model(**inputs.to(self.device))
        texts = found.text_embeds[[distinct.index(prompt) for prompt in prompts]]
        return self.model.logit_scale.exp() * (found.image_embeds * texts).sum(dim=-1)

    def _longest(self, texts: Sequence[str]) -> int:
        """The model's context in tokens; texts that do not fit are counted, and the first is reported."""
        longest = self.model.config.text_config.max_position_embeddings
        for text in texts:
            if len(self.processor.tokenizer(text, verbose=False).input_ids) > longest:
                if not self.truncated:
                    logger.warning("pickscore: a text longer than %d tokens was cut: %r", longest, text)
                self.truncated += 1
        return longest


def load_pickscore(model: str, processor: str | None, device: torch.device) -> PickScore:
    """A transformers `CLIPModel` by folder or hub id; the processor's place is the model's where it is None.

    Raises:
        ModelError: one of them cannot be loaded.
    """
    loaded = load_clip_model(model, "reward_settings.options.pickscore.model")
    place = processor or model
    try:
        return PickScore(loaded, AutoProcessor.from_pretrained(place), device)
    except Exception as error:  # the libraries raise a dozen kinds; each becomes one line that says what to do
        raise not_loaded("reward_settings.options.pickscore.processor", place, error) from error


class HumanPreference(ClipSimilarity):
    """How much people prefer an image for the user's prompt: the cosine of a CLIP that learned it (arXiv 2306.09341).

    Any open_clip model; HPS v2 gives about 0.2 to 0.35, and only differences for the same prompt mean something.
    """


def load_hps(model: str, weights: str | None, device: torch.device) -> HumanPreference:
    """An open_clip model with preference weights.

    Args:
        model: an open_clip folder or hub id ("hf-hub:…"), which has its weights, or the name of an architecture.
        weights: for an architecture: a file (safetensors, or a checkpoint of plain tensors), or "owner/repository/file"
            on the hub.
        device: where it runs.

    Raises:
        ModelError: the model or its weights cannot be loaded.
    """
    if weights is None or Path(model).is_dir() or model.startswith("hf-hub:"):
        return HumanPreference(*open_clip_model(model, None, "reward_settings.options.hps.model"), device)
    setting = "reward_settings.options.hps.weights"
    # HPS looks at the whole picture, with bars beside it where it is no square, instead of at the middle
    parts = open_clip_model(model, _file(weights, setting), setting, image_resize_mode="longest")
    return HumanPreference(*parts, device)


def _file(weights: str, setting: str) -> str:
    """The path of a file of weights, fetched from the hub where it is none on this machine."""
    parts = weights.split("/", 2)
    if Path(weights).is_file() or Path(weights).is_absolute() or len(parts) < 3:
        return weights
    try:
        return hf_hub_download(repo_id="/".join(parts[:2]), filename=parts[2])
    except Exception as error:
        raise not_loaded(setting, weights, error) from error
