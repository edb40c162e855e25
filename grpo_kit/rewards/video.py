"""Rewards of videos, and of an object's views: X-CLIP, the shared CLIP on their pictures, and how much moves."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from transformers import XCLIPModel, XCLIPProcessor

from grpo_kit.config import Name
from grpo_kit.config.hub import load_whole, loading
from grpo_kit.config.media import Video, Views
from grpo_kit.config.threads import fitting_threads
from grpo_kit.rewards.clip import TOKENIZING, ClipEncoder
from grpo_kit.rewards.protocol import Texts

Videos = Sequence[Video]  # N
_CPU = torch.device("cpu")


def motion(images: Videos, prompts: Texts, enhanced_prompts: Texts) -> list[float]:
    """How much a video's pixels change from a frame to the next, in [0, 1]: 0 for a still, 1 for black to white.

    The mean absolute difference of all values. It does not see what moves, and flicker raises it: a check beside a
    reward that looks at frames one by one.
    """
    steps = [np.abs(np.diff(video.frames.astype(np.int16), axis=0)) for video in images]
    return [float(step.mean()) / 255 if step.size else 0.0 for step in steps]


motion.media = ("video",)


class ClipFrames:
    """Mean CLIP cosine of a video's frames with the user's prompt, in [-1, 1]; or the first frame's alone.

    It does not see their order: a still and a film of the same frames score the same. Watch `motion` beside it.
    """

    media = ("video",)

    def __init__(self, clip: ClipEncoder, frames: Literal["all", "first"] = "all") -> None:
        self.clip, self.frames = clip, frames

    def __call__(self, images: Videos, prompts: Texts, enhanced_prompts: Texts) -> list[float]:
        """N cosines of videos with users' prompts."""
        chosen = [video.pictures[: 1 if self.frames == "first" else None] for video in images]
        return [float(cosines.mean()) for cosines in _cosines(self.clip, chosen, prompts)]


class ClipViews:
    """CLIP cosine of an object's views with the user's prompt, in [-1, 1]: their mean, or that of the worst view."""

    media = ("views",)

    def __init__(self, clip: ClipEncoder, over: Literal["mean", "minimum"] = "mean") -> None:
        self.clip, self.over = clip, over

    def __call__(self, images: Sequence[Views], prompts: Texts, enhanced_prompts: Texts) -> list[float]:
        """N cosines of objects with users' prompts."""
        found = _cosines(self.clip, [views.pictures for views in images], prompts)
        return [float(cosines.min() if self.over == "minimum" else cosines.mean()) for cosines in found]


def _cosines(clip: ClipEncoder, rows: Sequence[Sequence[Image.Image]], prompts: Texts) -> list[torch.Tensor]:
    """N tensors, one cosine a picture; one medium at a time, so that long videos fit into memory."""
    texts = clip.encode_texts(prompts)
    return [clip.encode_images(pictures) @ text for pictures, text in zip(rows, texts, strict=True)]


class XClipSimilarity(ClipEncoder):
    """Cosine between a video and the *user's* prompt, in [-1, 1], by X-CLIP (arXiv 2208.02816).

    Its frames look at each other, and the text is read together with the video. Frames are taken at even distances,
    from the first to the last, as many as the model reads; a shorter video repeats some.
    """

    name = "xclip_similarity"
    media = ("video",)

    @torch.no_grad()
    def __call__(self, images: Videos, prompts: Texts, enhanced_prompts: Texts) -> torch.Tensor:
        """(N,) cosines; the videos of one prompt, a group, are one batch."""
        found = torch.empty(len(images))
        for text in dict.fromkeys(prompts):
            rows = [row for row, prompt in enumerate(prompts) if prompt == text]
            pixels = torch.stack([self.preprocess(images[row]) for row in rows]).to(self.device)
            with fitting_threads(self.model):
                seen = self.model(input_ids=self._ids(text).to(self.device), pixel_values=pixels)
            found[rows] = (seen.video_embeds * seen.text_embeds[:, 0]).sum(dim=-1).float().cpu()
        return found

    def _ids(self, text: str) -> torch.Tensor:
        """(1, tokens); of each distinct text they are kept."""
        if text not in self._texts:
            with TOKENIZING:
                self._texts[text] = self.tokenizer([text])
                self._count_truncated(text, self._texts[text])
        return self._texts[text]


def load_xclip_similarity(model: Name, device: torch.device = _CPU) -> XClipSimilarity:
    """An X-CLIP and its processor, as `save_pretrained` of transformers' `XCLIPModel` leaves them.

    Args:
        model: a folder or hub id, such as "microsoft/xclip-base-patch32".

    Raises:
        ModelError: it cannot be loaded, or lacks weights.
    """
    setting = "reward_settings.options.xclip_similarity.model"
    network = load_whole(XCLIPModel, model, setting, dtype=torch.float32)
    with loading(setting, model):
        tools = XCLIPProcessor.from_pretrained(model)
    count, context = network.config.vision_config.num_frames, network.config.text_config.max_position_embeddings

    def preprocess(video: Video) -> torch.Tensor:
        places = np.linspace(0, len(video.frames) - 1, count).round().astype(int)
        pictures = list(map(Image.fromarray, video.frames[places]))
        pixels = tools.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return pixels.reshape(count, *pixels.shape[-3:])  # VideoMAE's processor adds a dimension, CLIP's does not

    def tokenize(texts: Sequence[str], context_length: int = context) -> torch.Tensor:
        options = {"truncation": True, "max_length": context_length}
        return tools.tokenizer(list(texts), return_tensors="pt", **options)["input_ids"]

    return XClipSimilarity(network, preprocess, tokenize, device)
