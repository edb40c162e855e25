"""`python -m benchmarks.size.dials`: the memory that each dial saves, and the time that it costs.

The architectures are those of real models, between tiny and full: an SD3 pipeline with a T5, an SD 1.5 U-Net, and a
Qwen3 policy, all with random weights in float32. Each case runs in a process of its own and reports the most memory
that it held beyond the loaded weights, so that what one case leaves behind changes no other. The seconds say roughly
what a dial costs; they are of one run.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import typer
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from benchmarks.speed import measure, text_policy
from benchmarks.speed.peer import make_optimizer
from benchmarks.speed.policy_iteration import Kit
from benchmarks.speed.text_policy import Shape
from grpo_kit.config import LoraSettings, load_config
from grpo_kit.models.generator import Generator
from grpo_kit.models.loading import add_lora
from grpo_kit.models.pipeline import save_memory
from grpo_kit.models.policy import Policy
from grpo_kit.training.step import grpo_step
from tools.shapeworld.vocabulary import clip_tokenizer, t5_tokenizer

IMAGES, SIZE, TILE, STEPS = 4, 256, 128, 1
SHAPE = Shape(prompts=4, group=8, prompt_tokens=96, completion_tokens=32)


@dataclass(frozen=True)
class Case:
    """A dial in one position."""

    dial: str
    part: Callable[..., Callable[[], object]]
    options: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What a case took: MB of weights, MB at its peak beyond them, seconds."""

    weights: float
    peak: float
    seconds: float


# --- the generator ----------------------------------------------------------------------------------------------------


def _clip(kind: type) -> torch.nn.Module:
    tokenizer = clip_tokenizer()
    size = {"hidden_size": 256, "intermediate_size": 1024, "projection_dim": 256, "max_position_embeddings": 77}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return kind(CLIPTextConfig(vocab_size=len(tokenizer), num_hidden_layers=4, num_attention_heads=4, **size, **ends))


def _vae(channels: int) -> AutoencoderKL:
    """The autoencoder of SD3 and SD 1.5 at half its width, two layers a block."""
    return AutoencoderKL(
        latent_channels=channels, block_out_channels=(64, 128, 256, 256), layers_per_block=2, sample_size=TILE,
        shift_factor=0.0, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def _sd3(with_t5: bool) -> DiffusionPipeline:
    tokenizer, pieces = clip_tokenizer(), t5_tokenizer()
    tokenizer.model_max_length = 77
    transformer = SD3Transformer2DModel(
        sample_size=64, patch_size=2, in_channels=16, out_channels=16, num_layers=4, num_attention_heads=8,
        attention_head_dim=64, joint_attention_dim=512, caption_projection_dim=512, pooled_projection_dim=512,
        pos_embed_max_size=64, qk_norm="rms_norm",
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(pieces), d_model=512, d_kv=64, d_ff=2048, num_layers=12, num_heads=8, is_encoder_decoder=False,
        use_cache=False, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), _vae(16), _clip(CLIPTextModelWithProjection),
        tokenizer, _clip(CLIPTextModelWithProjection), tokenizer, T5EncoderModel(t5) if with_t5 else None,
        pieces if with_t5 else None,
    )  # fmt: skip


def _sd15() -> DiffusionPipeline:
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 77
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(64, 128, 256, 256), cross_attention_dim=256, norm_num_groups=32,
        attention_head_dim=8,
    )  # fmt: skip
    return StableDiffusionPipeline(
        _vae(4), _clip(CLIPTextModel), tokenizer, unet, PNDMScheduler(skip_prk_steps=True), None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def draw(family: str = "sd3", with_t5: bool = True, batch: int = IMAGES, **dials: bool) -> Callable[[], object]:
    """Drawing four images with a pipeline; `dials` are settings of `model_settings`."""
    pipeline = _sd3(with_t5) if family == "sd3" else _sd15()
    config = load_config("tiny", {f"model_settings.{name}": on for name, on in dials.items()})
    save_memory(pipeline, config.model_settings)
    generator = Generator(
        pipeline, num_inference_steps=STEPS, guidance_scale=1.0, height=SIZE, width=SIZE, batch_size=batch
    )
    return lambda: generator.generate_images(["a red circle"] * IMAGES, range(IMAGES))


# --- the policy -------------------------------------------------------------------------------------------------------


def _policy(lora: bool, checkpointing: bool) -> Policy:
    """A Qwen3 of 40 million parameters that reads and writes single words."""
    tokenizer = text_policy.word_tokenizer(text_policy.VOCABULARY)
    config = Qwen3Config(
        vocab_size=text_policy.VOCABULARY, hidden_size=512, intermediate_size=1536, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    return Policy(
        add_lora(model, LoraSettings(), 0) if lora else model,
        tokenizer,
        instruction="{prompt}",
        max_new_tokens=SHAPE.completion_tokens,
        gradient_checkpointing=checkpointing,
    )


def update(
    lora: bool = False, checkpointing: bool = False, micro_batch: int | None = None, shared: bool = True
) -> Callable[[], object]:
    """Two GRPO steps with AdamW on completions of a fixed length: from the second on, its states are there."""
    settings = {"training_settings.micro_batch_size": micro_batch, "training_settings.updates_per_rollout": 1}
    config = load_config("tiny", settings | {"training_settings.group_size": SHAPE.group})
    policy = _policy(lora, checkpointing)
    kit = Kit(policy, make_optimizer(policy.trainable_parameters(), config.training_settings), config)
    rollout = kit.rollout(text_policy.prompts(SHAPE), seed=0)
    if not shared:
        policy.not_shared = "the benchmark asks for it"
    return lambda: [grpo_step(policy, kit.optimizer, rollout, config) for _ in range(2)]


# --- measuring --------------------------------------------------------------------------------------------------------


def measured(case: Case) -> Found:
    """What a case takes in this process: a fresh one."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    before = measure.resident_mb()
    work = case.part(**case.options)
    weights = measure.resident_mb() - before
    started = time.perf_counter()
    peak = measure.peak_growth_mb(work)
    return Found(weights, peak, time.perf_counter() - started)


CASES = [
    Case("SD3: as it is", draw),
    Case("SD3: drop_t5", draw, {"with_t5": False}),
    Case("SD3: vae_slicing", draw, {"vae_slicing": True}),
    Case("SD3: vae_tiling", draw, {"vae_tiling": True}),
    Case("SD3: vae_slicing, vae_tiling", draw, {"vae_slicing": True, "vae_tiling": True}),
    Case("SD3: image_batch_size 2", draw, {"batch": 2}),
    Case("SD3: image_batch_size 1", draw, {"batch": 1}),
    Case("SD 1.5: as it is", draw, {"family": "sd15"}),
    Case("SD 1.5: attention_slicing", draw, {"family": "sd15", "attention_slicing": True}),
    Case("SD 1.5: vae_slicing", draw, {"family": "sd15", "vae_slicing": True}),
    Case("SD 1.5: vae_slicing, attention_slicing", draw,
         {"family": "sd15", "vae_slicing": True, "attention_slicing": True}),
    Case("policy: as it is", update),
    Case("policy: micro_batch_size 8", update, {"micro_batch": 8}),
    Case("policy: micro_batch_size 2", update, {"micro_batch": 2}),
    Case("policy: gradient_checkpointing", update, {"checkpointing": True}),
    Case("policy: each prompt run for each completion", update, {"shared": False}),
    Case("policy: lora", update, {"lora": True}),
    Case("policy: lora, micro_batch_size 2", update, {"lora": True, "micro_batch": 2}),
    Case("policy: lora, gradient_checkpointing", update, {"lora": True, "checkpointing": True}),
    Case("policy: all of them", update, {"lora": True, "checkpointing": True, "micro_batch": 2}),
]  # fmt: skip


def main(only: str = "") -> None:
    """Print a table of the cases whose name contains `only`: weights, peak beyond them and against the plain case."""
    rows, plain = [], 0.0
    for case in tqdm([case for case in CASES if only in case.dial], disable=None):
        found = measure.in_fresh_process(measured, case)
        plain = found.peak if case.dial.endswith("as it is") else plain
        share = f"{found.peak / plain - 1:+.0%}" if plain and found.peak != plain else ""
        rows.append(f"| {case.dial} | {found.weights:.0f} | {found.peak:.0f} | {share} | {found.seconds:.1f} |")
    print(f"{IMAGES} images of {SIZE} x {SIZE}, tiles of {TILE}, {STEPS} step; policy: {SHAPE}; one thread; MB\n")
    print("| dial | weights | peak beyond them | against as it is | seconds |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    typer.run(main)
