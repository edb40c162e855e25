"""The full profile's models with random weights, built from their published configurations, and the same ones small.

The configurations of the policy and the pipeline are those of the planner's table, which names its sources; T5 is
dropped, as the profile does. They give the parameters that are published: 3,754,622,976 (the model's safetensors),
2,987,080,931 with the table of positions (KerasHub's preset stable_diffusion_3_medium), 427,616,513 (open_clip's model
profile).

Prompts are words of a tokenizer with one token a word, and no token that can be sampled ends a completion: all lengths
are exact.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from benchmarks.speed.text_policy import Shape, word_tokenizer
from grpo_kit.config import LoraSettings
from grpo_kit.models.generator import Generator
from grpo_kit.models.loading import add_lora
from grpo_kit.models.policy import Policy
from grpo_kit.preflight.plan.architectures import published_models
from grpo_kit.rewards.clip import ClipSimilarity

CLIP_WORDS = 49408
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Size:
    """Configurations of all models, and how much work an iteration is."""

    text: dict[str, object]
    vision: dict[str, object]
    transformer: dict[str, object]
    autoencoder: dict[str, object]
    encoders: tuple[dict[str, object], dict[str, object]]
    clip: dict[str, object]
    shape: Shape
    steps: int  # of denoising
    guidance: float
    pixels: int  # a side
    images_a_call: int

    @property
    def rows(self) -> int:
        """Completions, and so images, of an iteration."""
        return self.shape.prompts * self.shape.group


ROPE = {"rope_type": "default", "rope_theta": 1e6}
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
LATENTS = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}

POLICY = published_models()["policies"]["Qwen/Qwen2.5-VL-3B-Instruct"]["config"]
PIPELINE = published_models()["generators"]["stabilityai/stable-diffusion-3-medium-diffusers"]["components"]

FULL = Size(
    text=POLICY["text_config"],
    vision=POLICY["vision_config"],
    transformer=PIPELINE["transformer"][2],
    autoencoder=PIPELINE["vae"][2],
    encoders=(PIPELINE["text_encoder"][2], PIPELINE["text_encoder_2"][2]),
    clip=open_clip.get_model_config("ViT-L-14-quickgelu"),
    shape=Shape(prompts=8, group=8, prompt_tokens=128, completion_tokens=96),
    steps=20,
    guidance=5.0,
    pixels=512,
    images_a_call=16,
)  # fmt: skip

TINY = Size(
    text={
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4096, "rope_parameters": ROPE | {"mrope_section": [2, 3, 3]},
    },
    vision={
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1],
    },
    transformer={
        "sample_size": 16, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2,
        "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 128,
        "caption_projection_dim": 64, "pooled_projection_dim": 64, "pos_embed_max_size": 16,
    },
    autoencoder={
        "block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "sample_size": 64, "norm_num_groups": 8,
        **BLOCKS, **LATENTS, **NO_QUANT,
    },
    encoders=(
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "projection_dim": 32, "hidden_act": "quick_gelu"},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "projection_dim": 32, "hidden_act": "gelu"},
    ),
    clip={
        "embed_dim": 32, "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": CLIP_WORDS, "width": 32, "heads": 2, "layers": 2},
    },
    shape=Shape(prompts=2, group=4, prompt_tokens=24, completion_tokens=8),
    steps=2,
    guidance=5.0,
    pixels=64,
    images_a_call=4,
)  # fmt: skip

SIZES = {"full": FULL, "tiny": TINY}


def build_policy(size: Size, device: str, dtype: torch.dtype) -> Policy:
    """Qwen2.5-VL with the full profile's adapter; it reads words alone."""
    text = size.text | NO_ENDS | {"tie_word_embeddings": True}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=size.vision, tie_word_embeddings=True)
    with _made_with(device, dtype):
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return Policy(
        add_lora(model, LoraSettings(), seed=0),
        word_tokenizer(size.text["vocab_size"]),
        instruction="{prompt}",
        max_new_tokens=size.shape.completion_tokens,
    )


def build_generator(size: Size, device: str, dtype: torch.dtype) -> Generator:
    """The Stable Diffusion 3 pipeline without T5."""
    with _made_with(device, dtype):
        transformer = SD3Transformer2DModel(**size.transformer)
        autoencoder = AutoencoderKL(**size.autoencoder)
        encoders = [
            CLIPTextModelWithProjection(CLIPTextConfig(**({"vocab_size": CLIP_WORDS} | settings)))
            for settings in size.encoders
        ]
    tokenizer = word_tokenizer(CLIP_WORDS - 1)
    tokenizer.model_max_length = CLIP_TOKENS
    for part in (transformer, autoencoder, *encoders):
        part.eval().requires_grad_(False)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return Generator(
        pipeline,
        num_inference_steps=size.steps,
        guidance_scale=size.guidance,
        height=size.pixels,
        width=size.pixels,
        batch_size=size.images_a_call,
    )


def build_clip(size: Size, device: str) -> ClipSimilarity:
    """The reward, in float32 as the kit loads it."""
    with _made_with(device, torch.float32):
        model = open_clip.CLIP(**size.clip)
    side = size.clip["vision_cfg"]["image_size"]
    tokenizer = open_clip.SimpleTokenizer(context_length=CLIP_TOKENS)
    return ClipSimilarity(model, open_clip.image_transform(side, is_train=False), tokenizer, torch.device(device))


def parameters(*modules: torch.nn.Module) -> int:
    """How many parameters, shared ones once, an adapter's left out."""
    named = {id(p): p.numel() for module in modules for n, p in module.named_parameters() if "lora_" not in n}
    return sum(named.values())


def parts_of(generator: Generator) -> Sequence[torch.nn.Module]:
    """The pipeline's models."""
    pipeline = generator.pipeline
    return pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2


@contextmanager
def _made_with(device: str, dtype: torch.dtype) -> Iterator[None]:
    """New weights lie on a device and have a dtype from the start; the same ones each time."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
