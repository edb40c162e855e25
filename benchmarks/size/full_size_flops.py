"""Floating-point operations of each part of an iteration, counted by running the models' shapes without their numbers.

The models lie on the meta device and the inputs are fake tensors, so a 3 B policy needs no memory. Torch's counter sees
matrix products, convolutions and attention (a multiplication and addition are 2), nothing that goes element by element.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.size.architectures import (
    CLIP_TOKENS,
    Size,
    build_clip,
    build_generator,
    build_policy,
    parameters,
    parts_of,
)
from benchmarks.speed import text_policy
from grpo_kit.models.generator import Generator
from grpo_kit.models.policy import Policy, _lanes
from grpo_kit.models.shared_prefix import Packing, continued_groups, run_prompts
from grpo_kit.models.text_embeddings import TEXTS_AT_ONCE
from grpo_kit.rewards.clip import ClipSimilarity


@dataclass(frozen=True)
class Part:
    """A part of an iteration: its models' parameters, and the operations of one iteration."""

    name: str
    parameters: int
    flops: float


def count(size: Size) -> list[Part]:
    """All parts of one iteration."""
    policy = build_policy(size, "meta", torch.bfloat16)
    generator, clip = build_generator(size, "meta", torch.bfloat16), build_clip(size, "meta")
    prompts, packing = text_policy.prompts(size.shape), packed(size)  # of numbers, so outside of what has none
    with FakeTensorMode(allow_non_fake_inputs=True):
        return [
            Part("sampling", parameters(policy.model), sampling(policy, prompts, size)),
            *images(generator, size),
            Part("reward", parameters(clip.model), reward(clip, size)),
            *scoring(policy, prompts, packing, size),
            Part("optimizer step", sum(p.numel() for p in policy.trainable_parameters()), 0.0),
        ]


def counted(work: Callable[[], object]) -> float:
    """Operations of a call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


@torch.no_grad()
def sampling(policy: Policy, texts: Sequence[str], size: Size) -> float:
    """The prompts once, then a token of every completion at a time: each step's attention is larger by the same."""
    shape = size.shape
    inputs = policy.encode(texts).on(policy.device)
    found: list = []
    prompts = counted(lambda: found.append(run_prompts(policy.model, inputs)))
    step = continued_groups(policy.model, found[0], shape.group, shape.completion_tokens)
    ids = torch.zeros(size.rows, dtype=torch.int64, device="meta")
    first, second = (counted(lambda number=number: step(ids, number)) for number in (0, 1))
    steps = shape.completion_tokens - 1  # the last token is never fed
    return prompts + steps * first + steps * (steps - 1) / 2 * (second - first)


@torch.no_grad()
def images(generator: Generator, size: Size) -> list[Part]:
    """Every rewrite is another text; guidance doubles the denoiser's rows."""
    pipeline, calls = generator.pipeline, size.rows / size.images_a_call
    transformer, autoencoder, *encoders = parts_of(generator)
    texts = ["w1"] * TEXTS_AT_ONCE
    encoding = counted(
        lambda: pipeline.encode_prompt(texts, None, None, do_classifier_free_guidance=False, max_sequence_length=0)
    )
    times = -(-size.rows // TEXTS_AT_ONCE) + 2  # guidance encodes an empty text, and the branch beside it
    rows, side = 2 * size.images_a_call, size.pixels // pipeline.vae_scale_factor
    shapes = {
        "hidden_states": (rows, transformer.config.in_channels, side, side),
        "encoder_hidden_states": (rows, CLIP_TOKENS, transformer.config.joint_attention_dim),
        "pooled_projections": (rows, transformer.config.pooled_projection_dim),
        "timestep": (rows,),
    }
    inputs = {name: torch.zeros(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    denoising = counted(lambda: transformer(**inputs))
    latents = inputs["hidden_states"][: size.images_a_call]
    decoding = counted(lambda: autoencoder.decode(latents))
    return [
        Part("images: texts", parameters(*encoders), times * encoding),
        Part("images: denoising", parameters(transformer), calls * size.steps * denoising),
        Part("images: decoding", parameters(autoencoder), calls * decoding),
    ]


@torch.no_grad()
def reward(clip: ClipSimilarity, size: Size) -> float:
    """Each image, and each user's prompt."""
    side = size.clip["vision_cfg"]["image_size"]
    pixels = torch.zeros(size.rows, 3, side, side, device="meta")
    texts = torch.zeros(size.shape.prompts, CLIP_TOKENS, dtype=torch.int64, device="meta")
    return counted(lambda: (clip.model.encode_image(pixels), clip.model.encode_text(texts)))


def packed(size: Size) -> Packing:
    """How scoring lays out completions that all have the longest length."""
    shape = size.shape
    mask = torch.ones(size.rows, shape.completion_tokens, dtype=torch.bool)
    groups = torch.arange(shape.prompts).repeat_interleave(shape.group)
    return Packing.of(mask, groups, shape.prompts, _lanes(mask, shape.prompts, shape.prompt_tokens))


def scoring(policy: Policy, texts: Sequence[str], packing: Packing, size: Size) -> list[Part]:
    """The pass without gradients (the reference's costs the same), and forward and backward of the update."""
    inputs = policy.encode(texts).on(policy.device)
    lanes = packing.shape[0] // size.shape.prompts
    ids = torch.zeros(packing.shape, dtype=torch.int64, device="meta")
    sees = torch.ones(*packing.shape, packing.shape[1], dtype=torch.bool, device="meta")

    def total() -> torch.Tensor:
        prefix = run_prompts(policy.model, inputs)
        logits = prefix.in_lanes(lanes).extend(policy.model, ids, ids, sees)
        return logits.float().sum() + prefix.last_logits.float().sum()

    with torch.no_grad():
        forward = counted(total)
    both = counted(lambda: total().backward())
    size_of = parameters(policy.model)
    return [Part("scoring pass", size_of, forward), Part("backward, with its forward", size_of, both)]


def as_table(parts: list[Part]) -> str:
    """Parts, millions of parameters, 10¹² operations, and their shares."""
    whole = sum(part.flops for part in parts)
    lines = [f"{'part':28}{'parameters, M':>15}{'TFLOP':>12}{'share':>8}"]
    lines += [
        f"{part.name:28}{part.parameters / 1e6:15,.1f}{part.flops / 1e12:12,.4g}{part.flops / whole:8.1%}"
        for part in parts
    ]
    return "\n".join([*lines, f"{'one iteration':28}{'':15}{whole / 1e12:12,.4g}{1:8.1%}"])
