"""What the models of tones can do: the figures on their cards."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from diffusers import AutoencoderOobleck
from transformers import ClapModel, ClapProcessor

from grpo_kit.config.media import Sound
from grpo_kit.models.policy import Policy
from grpo_kit.shapeworld.captions import keeps_request
from grpo_kit.shapeworld.tones import (
    RATE,
    SAMPLES,
    STYLE_WORDS,
    Tone,
    check,
    describe,
    oracle_caption,
    parse,
)
from tools.tones.clap import features
from tools.tones.generator import encode
from tools.tones.sounds import random_tone, synthesise
from tools.tones.words import VALUES, leave_open

Draw = Callable[[list[str]], Sequence[np.ndarray]]  # captions → waveforms (8000,)


def sounds(count: int, seed: int, style: str | None = None) -> tuple[list[Tone], np.ndarray]:
    """Complete tones and their waveforms (count, 8000)."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    tones = [random_tone(rng, style) for _ in range(count)]
    return tones, np.stack([synthesise(tone, noise) for tone in tones])


def attribute_rates(waves: Sequence[np.ndarray], tones: Sequence[Tone]) -> dict[str, float]:
    """Share of sounds on which each stated attribute holds, and "everything"."""
    held: dict[str, list[bool]] = defaultdict(list)
    for wave, tone in zip(waves, tones, strict=True):
        result = check(Sound(np.asarray(wave)[None], RATE), tone)
        for name, holds in (result | {"everything": all(result.values())}).items():
            held[name].append(holds)
    return {name: float(np.mean(values)) for name, values in held.items()}


@torch.no_grad()
def through(vae: AutoencoderOobleck, waves: np.ndarray) -> np.ndarray:
    """Waveforms through the autoencoder: (N, 8000)."""
    return torch.cat([vae.decode(part).sample[:, 0] for part in encode(vae, waves).split(50)])[:, :SAMPLES].numpy()


def check_accuracy(count: int = 2000, seed: int = 20) -> dict[str, dict[str, float]]:
    """How often the check reads each attribute right, by style; "clean" counts as right when denied."""
    table = {}
    for style in STYLE_WORDS:
        tones, waves = sounds(count, seed, style)
        table[style] = attribute_rates(waves, [replace(tone, style=None) for tone in tones])
        if style != "clean":
            table[style]["clean"] = 1 - table[style]["clean"]
            del table[style]["everything"]
    return table


def obedience(draw: Draw, count: int = 300, seed: int = 21) -> dict[str, float]:
    """`attribute_rates` of sounds drawn from complete tones' own best captions."""
    tones = [replace(tone, style=None) for tone in sounds(count, seed, "clean")[0]]
    return attribute_rates(draw([oracle_caption(tone) for tone in tones]), tones)


@torch.no_grad()
def discernment(model: ClapModel, processor: ClapProcessor, count: int = 1000, seed: int = 30) -> dict[str, float]:
    """Share of pairs in which a sound scores above one that is wrong in that attribute, against the same prompt."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    tones, right = sounds(count, seed, "clean")
    texts = [describe(tone, rng.choice((0.0, 1.0)), rng) for tone in tones]
    said = processor.tokenizer(texts, padding="max_length", return_tensors="pt")
    text = torch.nn.functional.normalize(model.get_text_features(**said).pooler_output)

    def score(waves: np.ndarray) -> torch.Tensor:
        return (
            torch.nn.functional.normalize(model.get_audio_features(features(processor, waves)).pooler_output) * text
        ).sum(1)

    own, result = score(right), {}
    for name, values in (VALUES | {"style": tuple(STYLE_WORDS)}).items():
        wrong = [replace(tone, **{name: rng.choice([v for v in values if v != getattr(tone, name)])}) for tone in tones]
        others = score(np.stack([synthesise(tone, noise) for tone in wrong]))
        result["spoiled" if name == "style" else name] = float((own > others).float().mean())
    return result


def manners(policy: Policy, count: int = 200, seed: int = 40) -> dict[str, float]:
    """Of the initial policy: share of sampled rewrites that are grammatical, and that keep the request."""
    rng = random.Random(seed)
    requests = [leave_open(random_tone(rng), 0.5, rng) for _ in range(count)]
    sampled = policy.sample([describe(request, 0.5, rng) for request in requests], 4, seed=seed)
    read = [parse(text) for text in sampled.texts]
    kept = [rewrite is not None and keeps_request(requests[i // 4], rewrite) for i, rewrite in enumerate(read)]
    return {"grammatical": float(np.mean([one is not None for one in read])), "keeps_request": float(np.mean(kept))}
