"""Trains the generator of tones: Stable Audio's diffusion transformer with a T5, on the latents of `codec`."""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel

from grpo_kit.config.seeds import derive_seed
from grpo_kit.shapeworld.tones import SAMPLES, Tone
from tools.shapeworld.loop import Outcome, Recipe, train_recipe
from tools.shapeworld.vocabulary import word_tokenizer
from tools.tones.codec import HOP
from tools.tones.words import corpus, generator_caption

WIDTH, HEAD = 96, 32  # of the transformer
TEXT_WIDTH = 64
_BATCH = 32
_CAPTION_DROPOUT = 0.1


def padded(waves: np.ndarray) -> torch.Tensor:
    """(N, 1, samples of whole frames) of (N, 8000) waveforms."""
    return F.pad(torch.from_numpy(waves)[:, None], (0, -SAMPLES % HOP))


@torch.no_grad()
def encode(vae: AutoencoderOobleck, waves: np.ndarray) -> torch.Tensor:
    """The latents' means: (N, 34, 80)."""
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in padded(waves).split(10)])


def new_text_encoder(vocabulary: int) -> T5EncoderModel:
    """A T5 encoder of two layers, untrained."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary, d_model=TEXT_WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        )
    )  # fmt: skip


def new_transformer(frames: int, channels: int) -> StableAudioDiTModel:
    """Three blocks 96 wide."""
    return StableAudioDiTModel(
        sample_size=frames, in_channels=channels, out_channels=channels, num_layers=3, attention_head_dim=HEAD,
        num_attention_heads=WIDTH // HEAD, num_key_value_attention_heads=WIDTH // HEAD, cross_attention_dim=WIDTH,
        time_proj_dim=64, global_states_input_dim=2 * TEXT_WIDTH, cross_attention_input_dim=TEXT_WIDTH,
    )  # fmt: skip


def train_generator(
    vae: AutoencoderOobleck, tones: list[Tone], waves: np.ndarray, work: Path, steps: int, seed: int
) -> tuple[StableAudioPipeline, Outcome]:
    """Denoising in EDM's form (Karras et al. 2022, as the pipeline's scheduler samples); T5 learns along."""
    latents = encode(vae, waves)
    spread = float(latents.std())  # about 1
    tokens = word_tokenizer(corpus())
    text, transformer = new_text_encoder(len(tokens)), new_transformer(latents.shape[2], latents.shape[1])
    projection = StableAudioProjectionModel(TEXT_WIDTH, TEXT_WIDTH, min_value=0, max_value=2)
    rotary = get_1d_rotary_pos_embed(HEAD // 2, latents.shape[2] + 1, use_real=True, repeat_interleave_real=False)
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=0.03 * spread, sigma_max=60 * spread, sigma_data=spread, prediction_type="v_prediction"
    )

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(derive_seed(seed, "generator-batch", step))
        rows = rng.sample(range(len(tones)), _BATCH)
        said = tokens(
            [generator_caption(tones[row], rng) for row in rows],
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        mask = said.attention_mask[..., None].float()
        seconds = projection(text(**said)[0] * mask, start_seconds=torch.zeros(_BATCH), end_seconds=torch.ones(_BATCH))
        ends = [seconds.seconds_start_hidden_states, seconds.seconds_end_hidden_states]
        states = torch.cat([seconds.text_hidden_states * mask, *ends], dim=1)
        states = states * (torch.rand(_BATCH, 1, 1) >= _CAPTION_DROPOUT)
        sigma = spread * torch.exp(0.2 + 1.6 * torch.randn(_BATCH, 1, 1)).clamp(0.02, 80)
        clean = latents[rows]
        noisy = clean + sigma * torch.randn_like(clean)
        total = (sigma**2 + spread**2).sqrt()
        meant = (noisy * spread**2 / total**2 - clean) * total / (sigma * spread)
        found = transformer(
            noisy / total, sigma[:, 0, 0].log() / 4, states, torch.cat(ends, dim=2), rotary, return_dict=False
        )[0]
        return (found - meant).square().mean()

    parts = {"transformer": transformer, "text": text, "projection": projection}
    outcome = train_recipe(Recipe("generator", parts, steps, 2e-3, loss, warmup=0.05, ema_decay=0.999, seed=seed), work)
    for part in (vae, *parts.values()):
        part.eval().requires_grad_(False)
    return StableAudioPipeline(vae, text, projection, tokens, transformer, scheduler), outcome
