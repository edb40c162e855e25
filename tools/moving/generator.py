"""Trains the generator of films: a Wan pipeline (autoencoder, UMT5 text encoder, transformer), by rectified flow."""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from grpo_kit.config.seeds import derive_seed
from grpo_kit.shapeworld.moving import Film
from tools.moving.captions import corpus, generator_caption
from tools.shapeworld.loop import Outcome, Recipe, train_recipe
from tools.shapeworld.vocabulary import TEXT_LENGTH, word_tokenizer

VAE_BATCH, BATCH = 4, 32
_CAPTION_DROPOUT = 0.05


def new_vae() -> AutoencoderKLWan:
    """A small AutoencoderKLWan: (3, 9, 32, 32) frames to (8, 5, 8, 8) latents, of pixels two by two as Wan 2.2."""
    return AutoencoderKLWan(
        base_dim=16, z_dim=8, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_temporal=2, scale_factor_spatial=4,
        latents_mean=[0.0] * 8, latents_std=[1.0] * 8,
    )  # fmt: skip


def new_pipeline(vae: AutoencoderKLWan) -> WanPipeline:
    """The autoencoder with a transformer of three blocks, 128 wide, and a text encoder of two, 96 wide, untrained."""
    tokenizer = word_tokenizer(corpus())
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=96, d_kv=24, d_ff=192, num_layers=2, num_heads=4, dropout_rate=0.0,
        is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=32, in_channels=8, out_channels=8,
        text_dim=96, freq_dim=64, ffn_dim=256, num_layers=3, rope_max_seq_len=64,
    )  # fmt: skip
    return WanPipeline(tokenizer, UMT5EncoderModel(text), vae, FlowMatchEulerDiscreteScheduler(shift=1.0), transformer)


def to_tensor(films: np.ndarray) -> torch.Tensor:
    """(N, T, H, W, 3) uint8 → (N, 3, T, H, W) float in [-1, 1]."""
    return torch.from_numpy(films).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def train_vae(films: np.ndarray, work: Path, steps: int, seed: int) -> tuple[AutoencoderKLWan, Outcome]:
    """Train on (N, 9, 32, 32, 3) films: 0.5 L1 + 3 MSE + 1e-3 KL; then measure its latents' mean and scale."""
    vae = new_vae()

    def loss(step: int) -> torch.Tensor:
        rows = random.Random(derive_seed(seed, "vae-batch", step)).sample(range(len(films)), VAE_BATCH)
        frames = to_tensor(films[rows])
        posterior = vae.encode(frames).latent_dist
        error = vae.decode(posterior.sample()).sample - frames
        return 0.5 * error.abs().mean() + 3 * error.square().mean() + 1e-3 * posterior.kl().mean() / frames[0].numel()

    outcome = train_recipe(Recipe("vae", {"vae": vae}, steps, 4e-3, loss, weight_decay=0.0, seed=seed), work)
    vae.eval().requires_grad_(False)
    latents = encode(vae, films[:1000])
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae, outcome


def train_decoder(vae: AutoencoderKLWan, films: np.ndarray, work: Path, steps: int, seed: int) -> Outcome:
    """Train the decoder on, from the encoder as it is: the latents, which the transformer learns, stay as they are."""
    latents, decoder = encode(vae, films), vae.decoder.requires_grad_(True).train()
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))

    def loss(step: int) -> torch.Tensor:
        rows = random.Random(derive_seed(seed, "decoder-batch", step)).sample(range(len(films)), VAE_BATCH)
        noisy = latents[rows] + 0.05 * torch.randn_like(latents[rows])
        error = vae.decode(noisy * std + mean).sample - to_tensor(films[rows])
        return 0.5 * error.abs().mean() + 3 * error.square().mean()

    recipe = Recipe("decoder", {"decoder": decoder}, steps, 3e-3, loss, weight_decay=0.0, ema_decay=0.99, seed=seed)
    outcome = train_recipe(recipe, work)
    decoder.eval().requires_grad_(False)
    return outcome


@torch.no_grad()
def encode(vae: AutoencoderKLWan, films: np.ndarray) -> torch.Tensor:
    """The latents' means, shifted and scaled by the autoencoder's configuration as the pipeline does."""
    chunks = [vae.encode(to_tensor(films[i : i + 50])).latent_dist.mean for i in range(0, len(films), 50)]
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    return (torch.cat(chunks) - mean) / std


def train_generator(
    vae: AutoencoderKLWan, scenes: list[Film], films: np.ndarray, work: Path, steps: int, seed: int
) -> tuple[WanPipeline, Outcome]:
    """Rectified flow on the latents, logit-normal times shifted to high noise; the text encoder learns along."""
    latents, pipeline = encode(vae, films), new_pipeline(vae)
    transformer, text_encoder = pipeline.transformer.train(), pipeline.text_encoder.train()
    denoise = torch.compile(transformer, dynamic=False)

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(derive_seed(seed, "generator-batch", step))
        rows = rng.sample(range(len(scenes)), BATCH)
        captions = ["" if rng.random() < _CAPTION_DROPOUT else generator_caption(scenes[row], rng) for row in rows]
        embeddings = pipeline.encode_prompt(
            captions, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH, device=torch.device("cpu")
        )[0]
        clean = latents[rows]
        noise, sigma = torch.randn_like(clean), torch.sigmoid(0.6 + torch.randn(BATCH))
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None, None])
        predicted = denoise(noisy, sigma * 1000, embeddings, return_dict=False)[0]
        return (predicted - (noise - clean)).square().mean()

    parts = {"transformer": transformer, "text_encoder": text_encoder}
    outcome = train_recipe(Recipe("generator", parts, steps, 2e-3, loss, 0.05, ema_decay=0.998, seed=seed), work)
    for part in parts.values():
        part.eval().requires_grad_(False)
    return pipeline, outcome
