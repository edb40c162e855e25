"""Sounds of the small world: drawn by chance, and as waveforms.

Every frequency is a multiple of 80 Hz, and a chirp goes from one to the next: so each of the generator's frames, 100
samples, begins like all others at that frequency, which a transformer that is trained for minutes can learn.
"""

import random

import numpy as np

from grpo_kit.shapeworld.tones import KINDS, LENGTHS, LOUDNESSES, PITCHES, RATE, SAMPLES, STYLE_WORDS, VALUES, Tone

_STEP = 80  # Hz


def random_tone(rng: random.Random, style: str | None = None) -> Tone:
    """A complete sound; a third of them are spoiled unless `style` says otherwise."""
    values = {name: rng.choice(allowed) for name, allowed in VALUES.items()}
    return Tone(**values, style=style or rng.choices(tuple(STYLE_WORDS), (4, 1, 1))[0])


def is_held_out(tone: Tone) -> bool:
    """Whether no training prompt may ask for this kind at this pitch (5 of the 15 pairs, one of each kind)."""
    return tone.pitch is not None and tuple(PITCHES).index(tone.pitch) == KINDS.index(tone.kind) * 2 % 3


def synthesise(tone: Tone, rng: np.random.Generator) -> np.ndarray:
    """(8000,) float32 in [-1, 1]: a complete tone; its loudness varies by chance, as do noise and crackling."""
    count = round(LENGTHS[tone.length] * RATE)
    body = _carrier(tone.kind, PITCHES[tone.pitch], count, rng)
    fade = np.minimum(1, np.arange(count) / (0.01 * RATE))
    body = body * fade * fade[::-1]
    rms = LOUDNESSES[tone.loudness] * 10 ** (rng.uniform(-1, 1) / 20)
    body = body * (rms / np.sqrt(np.mean(body**2)))
    if tone.style == "crackling":
        clicks = np.convolve((rng.random(count) < 0.02) * rng.choice((-1.0, 1.0), count), np.ones(6) / 6, "same")
        body = body + clicks * rms / np.sqrt(np.mean(clicks**2) + 1e-12)
    if tone.style == "rumbling":
        body = body + rms * np.sqrt(2) * fade * fade[::-1] * np.sin(_phase(np.full(count, _STEP)))
    start = round(0.05 * RATE)
    samples = np.zeros(SAMPLES)
    samples[start : start + count] = body
    return samples.clip(-1, 1).astype(np.float32)


def _phase(hertz: np.ndarray) -> np.ndarray:
    return 2 * np.pi * (np.cumsum(hertz) - hertz[0]) / RATE


def _carrier(kind: str, pitch: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,): a chirp covers 0.9 octaves, beats come 8 times a second, noise is 0.6 of its pitch wide."""
    if kind == "noise":
        spectrum = np.fft.rfft(rng.standard_normal(count))
        far = np.abs(np.fft.rfftfreq(count, 1 / RATE) - pitch) > 0.3 * pitch
        spectrum[far] = 0
        return np.fft.irfft(spectrum, count)
    octaves = {"rising chirp": 0.45, "falling chirp": -0.45}.get(kind, 0.0)
    frames = pitch * 2 ** np.linspace(-octaves, octaves, count * _STEP // RATE)
    carrier = np.sin(_phase(np.repeat(_STEP * np.round(frames / _STEP), RATE // _STEP)))
    return carrier * (np.sin(_phase(np.full(count, 4.0))) if kind == "beats" else 1)
