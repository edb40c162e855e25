"""Trains the initial policy of tones: the class of the world of shapes, words alone, on mixed rewrites."""

import random
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from grpo_kit.config.seeds import derive_seed
from grpo_kit.shapeworld.tones import describe
from tools.shapeworld.loop import Outcome, Recipe, train_recipe
from tools.shapeworld.policy import BATCH, asked, new_policy, new_processor, supervised_batch
from tools.tones.sounds import random_tone
from tools.tones.words import corpus, leave_open, sample_rewrite


def train_policy(
    work: Path, steps: int, seed: int
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Outcome]:
    """Supervised training on sampled rewrites."""
    processor = new_processor(corpus())
    model = new_policy(processor)

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(derive_seed(seed, "policy-batch", step))
        requests = [leave_open(random_tone(rng), 0.5, rng) for _ in range(BATCH)]
        prompts = [describe(request, rng.choice((0.0, 0.5, 1.0)), rng) for request in requests]
        answers = [sample_rewrite(request, rng) for request in requests]
        batch = supervised_batch(processor, [[asked(prompt)] for prompt in prompts], None, answers)
        return model(**batch, use_cache=False).loss

    recipe = Recipe("policy", {"policy": model}, steps, 2e-3, loss, ema_decay=0.995, seed=seed)
    outcome = train_recipe(recipe, work)
    return model.eval(), processor, outcome
