"""Rendered scenes as arrays, ready to train on: drawn once, captioned afresh at every step."""

import random
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, STYLES, Scene

_VALUES = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": SIZES,
    "place": PLACES,
    "second_colour": tuple(COLOURS),
    "second_shape": SHAPES,
    "relation": RELATIONS,
    "background": tuple(BACKGROUNDS),
    "style": STYLES,
}


def draw_all(scenes: list[Scene], seed: int) -> np.ndarray:
    """The scenes drawn with jitter: (N, 32, 32, 3) uint8."""
    rng = random.Random(seed)
    return np.stack([np.asarray(render(scene, rng)) for scene in tqdm(scenes, desc="drawing", mininterval=5)])


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 → (N, 3, H, W) float in [-1, 1], as a VAE takes it."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def change_one(scene: Scene, rng: random.Random, attribute: str | None = None) -> Scene:
    """The scene with one attribute changed (a given one or any), still complete."""
    attribute = attribute or rng.choice([name for name in scene.stated() if name != "count" or scene.kind != "pair"])
    if attribute == "count":
        return _change_count(scene, rng)
    others = [value for value in _VALUES[attribute] if value != getattr(scene, attribute)]
    changed = replace(scene, **{attribute: rng.choice(others)})
    if changed.kind == "pair" and changed.things[0] == changed.things[1]:
        return change_one(scene, rng, attribute)
    return changed


def _change_count(scene: Scene, rng: random.Random) -> Scene:
    count = rng.choice([n for n in (1, 2, 3) if n != scene.count])
    if count == 1:
        return replace(scene, count=1, size=rng.choice(SIZES), place=rng.choice(PLACES))
    return replace(scene, count=count, size=None, place=None)
