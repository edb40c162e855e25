"""Checks of the exercises of 12_other_media: how much a film moves, and how loud a sound is."""

from collections.abc import Callable

import numpy as np

from grpo_kit.course.exercise import exercise, expect


@exercise("12.1", "How much does a film move?", minutes=10, difficulty=2)
def check_motion(motion: Callable) -> None:
    """Films that brighten, darken, come back to where they began, or have one frame."""
    rng = np.random.default_rng(0)
    steps = {
        "a film that becomes darker": [200, 120, 10],
        "a film whose last frame is its first again": [10, 90, 10],
        "a still film": [77, 77, 77, 77],
        "a film of two frames": [0, 255],
    }
    films = {name: np.tile(np.reshape(levels, (-1, 1, 1, 1)), (1, 4, 6, 3)) for name, levels in steps.items()}
    films |= {"a film of noise": rng.integers(0, 256, (5, 8, 6, 3)), "a film of one frame": films["a still film"][:1]}
    for given, values in films.items():
        frames = values.astype(np.uint8)
        changes = np.diff(values, axis=0) / 255
        right = float(np.abs(changes).mean()) if len(values) > 1 else 0.0
        ends, beside = values[-1] - values[0], np.diff(values, axis=1)
        wrong = {
            "the values run from 0 to 255, the answer from 0 to 1": 255 * right,
            "below 0 a uint8 begins again at 255: convert the frames to float first": _mean(
                np.diff(frames, axis=0) / 255
            ),
            "changes in both directions cancel each other: take their absolute values": _mean(changes),
            "this compares the first frame with the last one alone": np.abs(ends).mean() / 255,
            "this compares neighbours in a picture, not frames: use axis 0": np.abs(beside).mean() / 255,
            "a film of one frame does not move: 0": np.nan,
        }
        expect(motion(frames), right, given, wrong=wrong)


@exercise("12.2", "How loud is a sound?", minutes=10, difficulty=2)
def check_loudness(loudness: Callable) -> None:
    """Sines, a click, two channels against each other, and silence."""
    time = np.arange(800) / 8000
    sine = np.sin(2 * np.pi * 400 * time)
    sounds = {
        "a sine of full scale": sine[None],
        "a sine of a tenth of it": 0.1 * sine[None],
        "one click in silence": np.eye(1, 800, 5),
        "two channels, one of them silent": np.stack([sine, 0 * sine]),
        "two channels, one the other upside down": np.stack([0.5 * sine, -0.5 * sine]),
        "silence": np.zeros((1, 800)),
    }
    for given, samples in sounds.items():
        power, mixed = (float(np.square(one).mean()) for one in (samples, samples.mean(axis=0)))
        sizes = np.abs(samples)
        wrong = {
            "a ratio of powers takes 10, a ratio of amplitudes 20 times the logarithm": _decibels(power) / 2,
            "this is the power itself, not its logarithm": power,
            "this is the natural logarithm": _decibels(power) * np.log(10),
            "this is the loudest sample: one click would be loud": _decibels(sizes.max() ** 2),
            "the mean of the channels comes after the square: else they cancel each other": _decibels(mixed),
            "the root of the mean square, not the mean size": _decibels(sizes.mean() ** 2),
            "the logarithm of 0 is no number that a mean can hold: take 1e-6 at least": -np.inf,
        }
        expect(loudness(samples.astype(np.float32)), _decibels(power), given, wrong=wrong, tolerance=1e-4)


def _decibels(power: float) -> float:
    """dB of full scale; silence is -120."""
    return float(10 * np.log10(max(power, 1e-12)))


def _mean(values: np.ndarray) -> float:
    """The mean, 0 of nothing."""
    return float(values.mean()) if values.size else 0.0
