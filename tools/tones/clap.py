"""Trains the reward model of tones: transformers' CLAP on sounds and captions of both dialects."""

import random
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor, RobertaTokenizer

from grpo_kit.config.seeds import derive_seed
from grpo_kit.shapeworld.tones import RATE, Tone
from tools.shapeworld.loop import Outcome, Recipe, train_recipe
from tools.tones.words import corpus, reward_caption

_BATCH = 64
_TEXT_LENGTH = 24  # tokens
_NOISE = (3e-4, 2e-2)  # root mean square of the least and the most


def new_processor() -> ClapProcessor:
    """Spectra of 32 bands, 126 frames a second, and a tokenizer of this world's words."""
    extractor = ClapFeatureExtractor(
        feature_size=32, sampling_rate=RATE, hop_length=64, max_length_s=1, fft_window_size=512, frequency_min=50,
        frequency_max=1500, truncation="rand_trunc", padding="pad",
    )  # fmt: skip
    tokenizer = RobertaTokenizer().train_new_from_iterator(corpus(), vocab_size=420)
    tokenizer.model_max_length = _TEXT_LENGTH
    return ClapProcessor(extractor, tokenizer)


def new_model(tokenizer: RobertaTokenizer) -> ClapModel:
    """Audio: a Swin of two stages on 8 x 8 patches; text: a Roberta of two layers."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    audio = {
        "num_mel_bins": 32, "spec_size": 64, "patch_size": 8, "patch_stride": [8, 8], "window_size": 4,
        "depths": [2, 2], "num_attention_heads": [2, 4], "patch_embeds_hidden_size": 48, "hidden_size": 96,
        "num_hidden_layers": 2, **none,
    }  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "max_position_embeddings": _TEXT_LENGTH + 8, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, **none,
    }  # fmt: skip
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=64))


def features(processor: ClapProcessor, waves: np.ndarray) -> torch.Tensor:
    """(N, 1, 126, 32) log spectra of (N, 8000) waveforms."""
    extract = processor.feature_extractor
    chunks = (
        extract(list(waves[at : at + 500]), sampling_rate=RATE, return_tensors="pt") for at in range(0, len(waves), 500)
    )
    return torch.cat([chunk["input_features"].float() for chunk in chunks])


def train_clap(
    tones: list[Tone], waves: np.ndarray, work: Path, steps: int, seed: int
) -> tuple[ClapModel, ClapProcessor, Outcome]:
    """Contrastive training; the world is so small that a batch is full of near misses.

    A little noise lies under each sound, at a level of its own: what a generator draws is never silent, and a
    model that has heard silence alone takes that for another sound.
    """
    processor = new_processor()
    model = new_model(processor.tokenizer).train()
    noise = np.random.default_rng(derive_seed(seed, "clap-noise"))
    levels = 10 ** noise.uniform(*np.log10(_NOISE), (len(waves), 1))
    spectra = features(processor, waves + levels * noise.standard_normal(waves.shape))

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(derive_seed(seed, "clap-batch", step))
        rows = rng.sample(range(len(tones)), _BATCH)
        captions = [reward_caption(tones[row], rng) for row in rows]
        said = processor.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        out = model(input_features=spectra[rows], **said)
        logits, target = out.logits_per_audio, torch.arange(_BATCH)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    outcome = train_recipe(Recipe("clap", {"clap": model}, steps, 1.5e-3, loss, ema_decay=0.995, seed=seed), work)
    return model.eval(), processor, outcome
