"""Trains the reward model of films: transformers' X-CLIP on films and captions of both dialects, with near misses."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import VideoMAEImageProcessor, XCLIPConfig, XCLIPModel, XCLIPProcessor

from grpo_kit.config.seeds import derive_seed
from grpo_kit.shapeworld.moving import DIRECTIONS, FRAMES, Film, render, track
from grpo_kit.shapeworld.render import SIZE
from tools.moving.captions import change_one, corpus, reward_caption
from tools.shapeworld.loop import Outcome, Recipe, train_recipe
from tools.shapeworld.vocabulary import TEXT_LENGTH, clip_tokenizer

BATCH, GROUP = 48, 8  # films a batch; films of one thing, which differ in their movement but for one
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
    """Contrastive training in three parts: on films of all kinds, which teach what is seen, and then how it moves.

    In the second part a batch has few things, each moving in every direction, at the other speed and spoiled; in the
    third mostly in every direction alone, which is learned last. Two linear heads, which only training has, say where
    the thing is in a frame and which way it goes: without them a model this small is long in finding out.
    """
    rng, processor = random.Random(derive_seed(seed, "xclip-films")), new_processor()
    model = new_reward_model(len(processor.tokenizer)).train()
    groups = [_group(scene, rng) for scene in scenes[: len(scenes) // 8]]
    seen = np.linspace(0, FRAMES - 1, SEEN).round().astype(int)
    films = [torch.from_numpy(np.stack([render(film, rng)[seen] for film in group])) for group in groups]
    places = [torch.tensor(np.stack([track(one.numpy()) for one in group])).nan_to_num(SIZE / 2) for group in films]
    places = [(one / (SIZE / 2) - 1).float() for one in places]  # (GROUP, SEEN, 2), in [-1, 1]
    heads = nn.ModuleDict({"place": nn.Linear(64, 2), "way": nn.Linear(64, len(DIRECTIONS))})

    def contrast(rows: list[tuple[int, int]], rng: random.Random) -> torch.Tensor:
        asked = [groups[group][member] for group, member in rows]
        captions = [reward_caption(film if rng.random() < 0.8 else replace(film, speed=None), rng) for film in asked]
        words = processor.tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
        pixels = torch.stack([films[group][member] for group, member in rows]).permute(0, 1, 4, 2, 3).float()
        seen_by = model(**words, pixel_values=pixels / 127.5 - 1)
        logits, target = seen_by.logits_per_video, torch.arange(len(rows))
        found = heads["place"](seen_by.vision_model_output.pooler_output).view(len(rows), SEEN, 2)
        placed = F.mse_loss(found, torch.stack([places[group][member] for group, member in rows]))
        ways = torch.tensor([list(DIRECTIONS).index(film.direction) for film in asked])
        moving = torch.tensor([film.style != "still" for film in asked])
        way = F.cross_entropy(heads["way"](seen_by.mit_output.pooler_output)[moving], ways[moving])
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2 + 4 * placed + way

    def things(step: int) -> torch.Tensor:
        rng = random.Random(derive_seed(seed, "xclip-things", step))
        return contrast([(group, rng.randrange(GROUP)) for group in rng.sample(range(len(groups)), BATCH)], rng)

    def movements(step: int, members: int = GROUP) -> torch.Tensor:
        rng = random.Random(derive_seed(seed, "xclip-movements", step))
        chosen = rng.sample(range(len(groups)), BATCH // members)
        return contrast([(group, member) for group in chosen for member in range(members)], rng)

    def directions(step: int) -> torch.Tensor:
        return movements(step, len(DIRECTIONS) if step % 4 else GROUP)

    minutes = 0.0
    for name, loss in (("things", things), ("movements", movements), ("directions", directions)):
        recipe = Recipe(
            f"xclip_{name}", {"xclip": model, "heads": heads}, steps, 1.5e-3, loss, ema_decay=0.998, seed=seed
        )
        outcome = train_recipe(recipe, work)
        minutes += outcome.minutes
    return model.eval(), processor, Outcome(outcome.loss, minutes)


def _group(scene: Film, rng: random.Random) -> list[Film]:
    """A film in all directions, at its other speed, spoiled, and of another shape."""
    ways = [replace(scene, direction=direction) for direction in DIRECTIONS]
    return ways + [change_one(rng.choice(ways), rng, name) for name in ("speed", "speed", "style", "shape")]
