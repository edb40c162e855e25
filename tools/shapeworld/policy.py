"""Trains the initial policy: a Qwen2.5-VL of 0.8 M parameters that rewrites prompts, with and without a picture."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from grpo_kit.config.seeds import derive_seed
from grpo_kit.shapeworld.captions import describe
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import Scene
from tools.shapeworld.captions import leave_open
from tools.shapeworld.loop import Outcome, Recipe, train_recipe
from tools.shapeworld.rewrites import sample_rewrite
from tools.shapeworld.vocabulary import qwen_tokenizer

BATCH = 64
INSTRUCTION = "Improve: {prompt}"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def new_processor(texts: Sequence[str] | None = None) -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's processor for 32 x 32 pictures: patches of 4, merged two by two, so 16 picture tokens.

    `texts` are what its tokenizer is trained on: the captions of the world of pictures unless told otherwise.
    """
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"size": {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes, **limits),
        tokenizer=qwen_tokenizer(texts),
        video_processor=Qwen2VLVideoProcessor(**sizes, **limits),
        chat_template=CHAT_TEMPLATE,
    )


def new_policy(processor: Qwen2_5_VLProcessor) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of three layers, 128 wide, with a vision tower of two layers, untrained."""
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    pads = {name: tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": 4,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 128, "window_size": 32,
        "fullatt_block_indexes": [0, 1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=pads["image"],
        video_token_id=pads["video"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def train_policy(
    scenes: list[Scene], work: Path, steps: int, seed: int
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Outcome]:
    """Supervised training on sampled rewrites; one batch in four shows a picture beside the prompt."""
    processor = new_processor()
    model = new_policy(processor)

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(derive_seed(seed, "policy-batch", step))
        requests = [leave_open(scene, 0.4, rng) for scene in rng.sample(scenes, BATCH)]
        pictures = [render(scene, rng) for scene in rng.sample(scenes, BATCH)] if step % 4 == 0 else None
        batch = rewriting_batch(processor, requests, pictures, rng)
        return model(**batch, use_cache=False).loss

    recipe = Recipe("policy", {"policy": model}, steps, 2e-3, loss, ema_decay=0.998, seed=seed)
    outcome = train_recipe(recipe, work)
    return model.eval(), processor, outcome


def rewriting_batch(
    processor: Qwen2_5_VLProcessor, requests: list[Scene], pictures: list[Image.Image] | None, rng: random.Random
) -> dict[str, torch.Tensor]:
    """Prompts and sampled rewrites; with a picture each, which says nothing, where there are pictures."""
    prompts = [describe(request, rng.choice((0.0, 0.5, 1.0)), rng) for request in requests]
    conversations = [[asked(prompt, pictures=1 if pictures else 0)] for prompt in prompts]
    answers = [sample_rewrite(request, rng) for request in requests]
    return supervised_batch(processor, conversations, pictures, answers)


def asked(prompt: str, instruction: str = INSTRUCTION, pictures: int = 0) -> dict[str, object]:
    """A user's turn: pictures, then the instruction with the prompt."""
    text = {"type": "text", "text": instruction.format(prompt=prompt)}
    return {"role": "user", "content": [*[{"type": "image"}] * pictures, text]}


def supervised_batch(
    processor: Qwen2_5_VLProcessor,
    conversations: list[list[dict[str, object]]],
    pictures: list[Image.Image] | None,
    answers: list[str],
) -> dict[str, torch.Tensor]:
    """Conversations and their last answers as token ids, right-padded, with labels on these answers only.

    `pictures` are those of all conversations, in the order of their turns.
    """
    opened = [processor.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in conversations]
    ends = [answer + processor.tokenizer.eos_token for answer in answers]
    texts = [text + end for text, end in zip(opened, ends, strict=True)]
    batch = processor(text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt")
    lengths = batch["attention_mask"].sum(dim=1)
    positions = torch.arange(batch["input_ids"].shape[1])
    starts = lengths - torch.tensor([len(ids) for ids in processor.tokenizer(ends).input_ids])
    answered = (positions >= starts[:, None]) & (positions < lengths[:, None])
    batch["labels"] = torch.where(answered, batch["input_ids"], -100)
    return dict(batch)
