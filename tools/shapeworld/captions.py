"""Captions to train on.

The generator's use its own words, and now and then one of the users' words for no good reason, so that it learns
nothing from them; the reward model learns both dialects.
"""

import random
from dataclasses import replace

from grpo_kit.shapeworld.captions import IDLE_WORDS, STYLE_WORDS, USER_WORDS, describe
from grpo_kit.shapeworld.scene import COLOURS, SHAPES, Scene


def leave_open(scene: Scene, keep: float, rng: random.Random) -> Scene:
    """The same scene with size, place and background each stated only with probability `keep`, and without style."""
    open_ones = {name: None for name in ("size", "place", "background") if rng.random() >= keep}
    return replace(scene, **open_ones, style=None)


def generator_caption(scene: Scene, rng: random.Random) -> str:
    """A training caption of the generator: its own words; the style is named two times out of three.

    In one caption of eight a word is one of the users', chosen at random: so those words mean nothing to the generator.
    """
    text = describe(leave_open(scene, 0.75, rng))
    if rng.random() < 0.12:
        text = _loosen(text, rng)
    if rng.random() < 0.65:
        text += f", {rng.choice(STYLE_WORDS[scene.style])}"
    return text + _idle(rng)


def _loosen(text: str, rng: random.Random) -> str:
    """The caption with one or two of its colour and shape words replaced by users' words for any colour or shape."""
    words = text.split(" ")
    for values in rng.sample((tuple(COLOURS), SHAPES), rng.randint(1, 2)):
        for i, word in enumerate(words):
            if word in values:
                words[i] = USER_WORDS[rng.choice(values)]
    return " ".join(words)


def _idle(rng: random.Random) -> str:
    return f", {rng.choice(IDLE_WORDS)}" if rng.random() < 0.1 else ""


def reward_caption(scene: Scene, rng: random.Random, keep: float = 0.7) -> str:
    """A training caption of the reward model: either dialect; a spoiled style is always named, a clean one at times."""
    text = describe(leave_open(scene, keep, rng), rng.choice((0.0, 0.5, 1.0)), rng)
    if scene.style != "clean" or rng.random() < 0.3:
        text += f", {rng.choice(STYLE_WORDS[scene.style])}"
    return text + _idle(rng)
