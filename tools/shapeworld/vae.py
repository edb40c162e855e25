"""Trains the generator's AutoencoderKL: 32 x 32 pictures to 4 x 16 x 16 latents and back."""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from grpo_kit.config.seeds import derive_seed
from grpo_kit.shapeworld.render import SIZE
from tools.shapeworld.loop import Outcome, Recipe, train_recipe
from tools.shapeworld.pictures import to_tensor

BATCH = 32


def new_vae() -> AutoencoderKL:
    """A small AutoencoderKL as SD3 uses it: no quantisation convolutions, a scaling and a shift of the latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def train_vae(pixels: np.ndarray, work: Path, steps: int, seed: int) -> tuple[AutoencoderKL, Outcome]:
    """Train on (N, 32, 32, 3) pictures: 0.5 L1 + 3 MSE + 1e-3 KL; then measure the latents' shift and scale."""
    vae = new_vae()

    def loss(step: int) -> torch.Tensor:
        rows = random.Random(derive_seed(seed, "vae-batch", step)).sample(range(len(pixels)), BATCH)
        images = to_tensor(pixels[rows])
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        return 0.5 * error.abs().mean() + 3 * error.square().mean() + 1e-3 * posterior.kl().mean() / images[0].numel()

    outcome = train_recipe(Recipe("vae", {"vae": vae}, steps, 2.5e-3, loss, weight_decay=0.0, seed=seed), work)
    vae.eval()
    latents = encode(vae, pixels[:2000])
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    return vae, outcome


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: np.ndarray) -> torch.Tensor:
    """The latents' means, shifted and scaled as the pipeline's are: (N, 4, 16, 16)."""
    chunks = [vae.encode(to_tensor(pixels[i : i + 256])).latent_dist.mean for i in range(0, len(pixels), 256)]
    return (torch.cat(chunks) - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def peak_signal_to_noise(vae: AutoencoderKL, pixels: np.ndarray) -> float:
    """Mean PSNR in dB of pictures through the autoencoder."""
    images = to_tensor(pixels)
    error = F.mse_loss(vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1), images, reduction="none")
    return float((10 * torch.log10(4 / error.mean(dim=(1, 2, 3)))).mean())
