"""Trains the reward model: open_clip's CLIP on pictures and captions of both dialects, near misses in each batch."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from grpo_kit.config.seeds import derive_seed
from grpo_kit.shapeworld.scene import Scene
from tools.shapeworld.captions import reward_caption
from tools.shapeworld.loop import Outcome, Recipe, train_recipe
from tools.shapeworld.pictures import change_one, draw_all
from tools.shapeworld.vocabulary import TEXT_LENGTH, clip_tokenizer

BATCH = 64  # scenes a batch; each brings a near miss along
_MEAN = _STD = (0.5, 0.5, 0.5)


def model_config(vocabulary: int) -> dict:
    """open_clip's configuration of the model, tokenizer and preprocessing included."""
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
            "text_cfg": {
                "context_length": TEXT_LENGTH,
                "vocab_size": vocabulary,
                "width": 96,
                "heads": 4,
                "layers": 2,
                "hf_tokenizer_name": "shapeworld",  # any name: the files beside this one are read
            },
        },
        "preprocess_cfg": {"mean": _MEAN, "std": _STD, "interpolation": "bicubic", "resize_mode": "shortest"},
    }


def near_misses(scenes: list[Scene], seed: int) -> list[Scene]:
    """For each scene one that differs in a single attribute; the shape, hardest to see, more often than the others."""
    rng = random.Random(seed)
    return [change_one(scene, rng, "shape" if rng.random() < 0.25 else None) for scene in scenes]


def draw_for_reward(scenes: list[Scene], seed: int) -> np.ndarray:
    """The scenes as the model's preprocessing hands them over: (N, 64, 64, 3) uint8."""
    pictures = draw_all(scenes, seed)
    return np.stack([np.asarray(Image.fromarray(p).resize((64, 64), Image.Resampling.BICUBIC)) for p in pictures])


def train_reward_model(scenes: list[Scene], work: Path, steps: int, seed: int) -> tuple[open_clip.CLIP, Outcome]:
    """Contrastive training on scenes and their near misses, whose captions state what differs."""
    tokenizer = clip_tokenizer()
    model = new_reward_model(len(tokenizer))
    scenes = [*scenes, *near_misses(scenes, seed)]
    pixels = torch.from_numpy(draw_for_reward(scenes, seed))
    half = len(scenes) // 2

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(derive_seed(seed, "clip-batch", step))
        rows = rng.sample(range(half), BATCH)
        rows = rows + [row + half for row in rows]
        keep = rng.choice((0.5, 1.0))
        captions = [reward_caption(scenes[row], rng, keep) for row in rows]
        images = (pixels[rows].permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        image, text, scale = model(images, tokenize(tokenizer, captions))
        logits = scale * image @ text.T
        target = torch.arange(len(rows))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    recipe = Recipe("clip", {"clip": model}, steps, 1.2e-3, loss, ema_decay=0.998, seed=seed)
    outcome = train_recipe(recipe, work)
    return model.eval(), outcome


def new_reward_model(vocabulary: int) -> open_clip.CLIP:
    """A ModifiedResNet CLIP of 1.6 M parameters, untrained."""
    settings = model_config(vocabulary)["model_cfg"]
    return open_clip.CLIP(
        embed_dim=settings["embed_dim"], vision_cfg=settings["vision_cfg"], text_cfg=settings["text_cfg"]
    )


def tokenize(tokenizer: Callable, texts: list[str]) -> torch.Tensor:
    """(N, 24) token ids, as open_clip's own tokenizer wrapper makes them."""
    return tokenizer(
        texts, max_length=TEXT_LENGTH, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids


def save_reward_model(model: open_clip.CLIP, folder: Path) -> None:
    """Write the model as open_clip's `local-dir:` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(folder)
    text = json.dumps(model_config(len(tokenizer)), indent=2) + "\n"
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
