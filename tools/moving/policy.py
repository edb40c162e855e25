"""Trains the initial policy of the world of films: the policy of the world of pictures, with other words."""

import random
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from grpo_kit.config.seeds import derive_seed
from grpo_kit.shapeworld.moving import Film, describe
from tools.moving.captions import corpus, sample_rewrite
from tools.shapeworld.loop import Outcome, Recipe, train_recipe
from tools.shapeworld.policy import asked, new_policy, new_processor, supervised_batch

BATCH = 48


def train_policy(
    scenes: list[Film], work: Path, steps: int, seed: int
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Outcome]:
    """Supervised training on sampled rewrites, without pictures."""
    processor = new_processor(corpus())
    model = new_policy(processor)

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(derive_seed(seed, "policy-batch", step))
        drawn = rng.sample(scenes, BATCH)
        requests = [replace(film, speed=film.speed if rng.random() < 0.6 else None, style=None) for film in drawn]
        asked_for = [[asked(describe(request, rng.choice((0.0, 0.5, 1.0)), rng))] for request in requests]
        answers = [sample_rewrite(request, rng) for request in requests]
        return model(**supervised_batch(processor, asked_for, None, answers), use_cache=False).loss

    outcome = train_recipe(Recipe("policy", {"policy": model}, steps, 2e-3, loss, ema_decay=0.998, seed=seed), work)
    return model.eval(), processor, outcome
