"""Trains the reward model of films: transformers' X-CLIP on films and captions of both dialects, with near misses."""

import random
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import VideoMAEImageProcessor, XCLIPConfig, XCLIPModel, XCLIPProcessor

from grpo_kit.config.seeds import derive_seed
from grpo_kit.shapeworld.moving import FRAMES, Film, render
from grpo_kit.shapeworld.render import SIZE
from tools.moving.captions import change_one, corpus, reward_caption
from tools.shapeworld.loop import Outcome, Recipe, train_recipe
from tools.shapeworld.vocabulary import TEXT_LENGTH, clip_tokenizer

BATCH = 24  # films a batch; each brings a near miss along
SEEN = 5  # frames that the model sees, of a film's nine: every second one


def new_processor() -> XCLIPProcessor:
    """X-CLIP's processor for frames of 32 x 32, with a tokenizer of this world's words."""
    crop, half = {"height": SIZE, "width": SIZE}, [0.5] * 3
    frames = VideoMAEImageProcessor(size={"shortest_edge": SIZE}, crop_size=crop, image_mean=half, image_std=half)
    return XCLIPProcessor(frames, clip_tokenizer(corpus()))


def new_reward_model(vocabulary: int) -> XCLIPModel:
    """An X-CLIP of 0.5 M parameters, untrained: three layers with attention across frames, one over the whole film."""
    text = {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": TEXT_LENGTH, "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": SIZE, "patch_size": 8, "num_frames": SEEN, "mit_hidden_size": 64, "mit_intermediate_size": 256,
        "mit_num_hidden_layers": 1, "mit_num_attention_heads": 4,
    }  # fmt: skip
    config = XCLIPConfig(
        text_config=text, vision_config=vision, projection_dim=64, prompt_layers=1, prompt_num_attention_heads=4,
        prompt_attention_dropout=0.0,
    )  # fmt: skip
    return XCLIPModel(config)


def train_reward_model(
    scenes: list[Film], work: Path, steps: int, seed: int
) -> tuple[XCLIPModel, XCLIPProcessor, Outcome]:
    """Contrastive training on films and near misses, of which most move elsewhere or have another shape."""
    rng, processor = random.Random(derive_seed(seed, "xclip-films")), new_processor()
    model = new_reward_model(len(processor.tokenizer)).train()
    missed = [change_one(scene, rng, rng.choice(("direction", "shape", None))) for scene in scenes]
    both, half = [*scenes, *missed], len(scenes)
    seen = np.linspace(0, FRAMES - 1, SEEN).round().astype(int)
    films = torch.from_numpy(np.stack([render(scene, rng)[seen] for scene in both])).permute(0, 1, 4, 2, 3)

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(derive_seed(seed, "xclip-batch", step))
        rows = rng.sample(range(half), BATCH)
        rows = rows + [row + half for row in rows]
        captions = [reward_caption(both[row], rng) for row in rows]
        words = processor.tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
        logits = model(**words, pixel_values=films[rows].float() / 127.5 - 1).logits_per_video
        target = torch.arange(len(rows))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    outcome = train_recipe(Recipe("xclip", {"xclip": model}, steps, 1.5e-3, loss, ema_decay=0.998, seed=seed), work)
    return model.eval(), processor, outcome
