"""Makes the generator's autoencoder without training: a lapped cosine transform, written into Oobleck's convolutions.

A trained one needs hours for what the transform does exactly: 34 of 100 coefficients a hop, the band below 1.4 kHz,
in which this world sounds (MDCT with a sine window; Princen and Bradley 1986). Strided convolutions gather 100
samples in 100 channels, one more takes the coefficients; the decoder goes the same way back. Snakes and residual units
are there, and leave what they are given.
"""

import numpy as np
import torch
from diffusers import AutoencoderOobleck
from torch import nn

from grpo_kit.shapeworld.tones import RATE

HOP, CHANNELS = 100, 34
_STRIDES = (10, 10)
_STILL = -8.0  # log of a snake's frequency at which it passes its input on


def cosines() -> np.ndarray:
    """(34, 200): the coefficients' waves, orthonormal with those of the frames beside them."""
    n, m = np.arange(2 * HOP), np.arange(CHANNELS)[:, None]
    window = np.sin(np.pi / (2 * HOP) * (n + 0.5))
    return np.sqrt(2 / HOP) * window * np.cos(np.pi / HOP * (n + 0.5 + HOP / 2) * (m + 0.5))


@torch.no_grad()
def new_vae(sounds: torch.Tensor) -> AutoencoderOobleck:
    """The autoencoder; each latent channel is scaled so that on (N, 1, 8000) `sounds` its deviation is 1."""
    vae = AutoencoderOobleck(
        encoder_hidden_size=2 * CHANNELS, decoder_input_channels=CHANNELS, decoder_channels=CHANNELS,
        downsampling_ratios=list(_STRIDES), channel_multiples=[1, 2], audio_channels=1, sampling_rate=RATE,
    ).eval()  # fmt: skip
    for name, parameter in vae.named_parameters():
        if name.endswith("alpha"):
            parameter.fill_(_STILL)
        if name.endswith("bias"):
            parameter.zero_()
    for module in vae.modules():
        if hasattr(module, "snake2"):
            _write(module.conv2, torch.zeros_like(module.conv2.weight_v))
    _write_encoder(vae, torch.ones(CHANNELS))
    gains = 1 / vae.encode(sounds).latent_dist.mean.std(dim=(0, 2))
    _write_encoder(vae, gains)
    _write_decoder(vae, 1 / gains)
    return vae


def _write_encoder(vae: AutoencoderOobleck, gains: torch.Tensor) -> None:
    first = torch.zeros(2 * CHANNELS, 1, 7)
    first[0, 0, 3] = 1
    _write(vae.encoder.conv1, first)
    gathered = 1
    for block, stride in zip(vae.encoder.block, _STRIDES, strict=True):
        weight = torch.zeros_like(block.conv1.weight_v)
        for at in range(stride):
            for channel in range(gathered):
                weight[at * gathered + channel, channel, at + stride // 2] = 1
        _write(block.conv1, weight)
        gathered *= stride
    waves = torch.from_numpy(cosines()).float() * gains[:, None]
    last = torch.zeros_like(vae.encoder.conv2.weight_v)
    last[:CHANNELS, :HOP, 1], last[:CHANNELS, :HOP, 2] = waves[:, :HOP], waves[:, HOP:]
    _write(vae.encoder.conv2, last)
    vae.encoder.conv2.bias[CHANNELS:] = -6.0  # the posterior's spread: next to none


def _write_decoder(vae: AutoencoderOobleck, gains: torch.Tensor) -> None:
    first = torch.zeros(2 * CHANNELS, CHANNELS, 7)
    for channel in range(CHANNELS):
        first[channel, channel, 3] = first[CHANNELS + channel, channel, 2] = 1  # this frame, and the one before
    _write(vae.decoder.conv1, first)
    waves = torch.from_numpy(cosines()).float() * gains[:, None]
    left = torch.cat([waves[:, :HOP], waves[:, HOP:]])  # (68, 100): what each adds to this hop
    for block, stride in zip(vae.decoder.block, _STRIDES[::-1], strict=True):
        weight = torch.zeros_like(block.conv_t1.weight_v)
        size = left.shape[1] // stride
        for at in range(stride):
            weight[: len(left), :size, at + stride // 2] = left[:, at * size : (at + 1) * size]
        _write(block.conv_t1, weight)
        left = torch.eye(size)
    last = torch.zeros(1, CHANNELS, 7)
    last[0, 0, 3] = 1
    _write(vae.decoder.conv2, last)


def _write(convolution: nn.Module, weight: torch.Tensor) -> None:
    """Set the weight of a convolution that is normalised: its rows' lengths and directions."""
    lengths = weight.flatten(1).norm(dim=1)[:, None, None]
    convolution.weight_v.copy_(torch.where(lengths > 0, weight, torch.ones_like(weight)))
    convolution.weight_g.copy_(lengths)
