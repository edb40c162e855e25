"""Trains the generator: a Stable Diffusion 3 transformer with its three text encoders, by rectified flow."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from grpo_kit.config.seeds import derive_seed
from grpo_kit.shapeworld.scene import Scene
from tools.shapeworld.captions import generator_caption
from tools.shapeworld.loop import Outcome, Recipe, train_recipe
from tools.shapeworld.vae import encode
from tools.shapeworld.vocabulary import TEXT_LENGTH, clip_tokenizer, t5_tokenizer

BATCH = 64
_CAPTION_DROPOUT = 0.1
_T5_LENGTHS = (
    (0, 0.7),
    (48, 0.22),
    (256, 0.08),
)  # in the last part of the training; SD3 too is trained to do without T5
_HIGH_NOISE_FROM = 0.4  # share of the steps
_T5_FROM = 0.85  # share of the steps after which T5 joins


@dataclass(frozen=True)
class Encoders:
    """The text side of the pipeline; `t5` may be left out when drawing."""

    first: CLIPTextModelWithProjection
    second: CLIPTextModelWithProjection
    t5: T5EncoderModel
    clip_tokens: object
    t5_tokens: object

    def __call__(self, texts: list[str], t5_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 24 + t5_length, 128) embeddings and (B, 128) pooled ones, as the pipeline computes them."""
        ids = self.clip_tokens(
            texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (self.first, self.second)]
        embeddings = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        if t5_length:
            ids = self.t5_tokens(
                texts, padding="max_length", max_length=t5_length, truncation=True, return_tensors="pt"
            ).input_ids
            embeddings = torch.cat([embeddings, self.t5(ids)[0]], dim=1)
        return embeddings, pooled


def new_encoders() -> Encoders:
    """Two CLIP text encoders 64 wide and a T5 encoder 128 wide, untrained."""
    clip_tokens, t5_tokens = clip_tokenizer(), t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokens),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=clip_tokens.bos_token_id,
        eos_token_id=clip_tokens.eos_token_id,
        pad_token_id=clip_tokens.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(t5_tokens), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    first, second = CLIPTextModelWithProjection(clip), CLIPTextModelWithProjection(clip)
    return Encoders(first, second, T5EncoderModel(t5), clip_tokens, t5_tokens)


def new_transformer(vae: AutoencoderKL) -> SD3Transformer2DModel:
    """An SD3 transformer of 4 joint blocks, 160 wide, on 16 x 16 latents in patches of 2."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=40,
        joint_attention_dim=128,
        caption_projection_dim=160,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def train_generator(
    vae: AutoencoderKL, scenes: list[Scene], pixels: np.ndarray, work: Path, steps: int, seed: int
) -> tuple[StableDiffusion3Pipeline, Outcome]:
    """Rectified flow on the latents, logit-normal times; all text encoders learn along with the transformer."""
    latents = encode(vae, pixels)
    encoders, transformer = new_encoders(), new_transformer(vae)
    denoise = torch.compile(transformer, dynamic=False)

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(derive_seed(seed, "generator-batch", step))
        rows = rng.sample(range(len(scenes)), BATCH)
        captions = ["" if rng.random() < _CAPTION_DROPOUT else generator_caption(scenes[row], rng) for row in rows]
        embeddings, pooled = encoders(captions, _t5_length(step / steps, rng))
        clean = latents[rows]
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(_noise_level(step / steps) + torch.randn(BATCH))
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        predicted = denoise(
            hidden_states=noisy,
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
            timestep=sigma * 1000,
            return_dict=False,
        )[0]
        return (predicted - (noise - clean)).square().mean()

    parts: dict[str, nn.Module] = {"transformer": transformer, "first": encoders.first, "second": encoders.second}
    parts["t5"] = encoders.t5
    outcome = train_recipe(Recipe("generator", parts, steps, 2e-3, loss, warmup=0.05, ema_decay=0.999, seed=seed), work)
    return assemble(vae, transformer, encoders), outcome


def _noise_level(progress: float) -> float:
    """Mean of the logit-normal noise levels: SD3's 0 at first, later higher.

    In a picture this small the shapes show through moderate noise, so only at high noise do captions decide them.
    """
    return 0.0 if progress < _HIGH_NOISE_FROM else 0.8


def _t5_length(progress: float, rng: random.Random) -> int:
    """How many T5 tokens a batch carries: none at first, later usually none, so that drawing works with and without."""
    if progress < _T5_FROM:
        return 0
    lengths, weights = zip(*_T5_LENGTHS, strict=True)
    return rng.choices(lengths, weights)[0]


def assemble(vae: AutoencoderKL, transformer: SD3Transformer2DModel, encoders: Encoders) -> StableDiffusion3Pipeline:
    """The trained parts as a pipeline that `save_pretrained` writes and `DiffusionPipeline` loads."""
    parts = (vae, transformer, encoders.first, encoders.second, encoders.t5)
    for part in parts:
        part.eval().requires_grad_(False)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=encoders.first,
        tokenizer=encoders.clip_tokens,
        text_encoder_2=encoders.second,
        tokenizer_2=encoders.clip_tokens,
        text_encoder_3=encoders.t5,
        tokenizer_3=encoders.t5_tokens,
    )
