"""Writes the embedded world's user prompts: training and held-out ones mention different (colour, shape) pairs."""

import json
import random
from dataclasses import replace
from pathlib import Path

from grpo_kit.shapeworld.captions import describe
from grpo_kit.shapeworld.scene import BACKGROUNDS, PLACES, SIZES, Scene, random_scene, validation_pairs

CATEGORIES = ("single", "count", "size", "place", "background", "two-objects", "dialect")
_USER_WORDS = {"single": 0.35, "dialect": 1.0}  # share of the users' words; elsewhere 0.6


def make_prompts(per_category: int, seed: int, held_out: bool) -> list[dict[str, str]]:
    """`per_category` different prompts of each category, interleaved, so that any beginning is balanced."""
    rng = random.Random(seed)
    taken: set[str] = set()
    columns = [[_new_prompt(category, rng, held_out, taken) for _ in range(per_category)] for category in CATEGORIES]
    return [record for row in zip(*columns, strict=True) for record in row]


def write_prompts(folder: Path) -> None:
    """Write `shapeworld_train.jsonl` (420 prompts) and `shapeworld_val.jsonl` (161)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, per_category, seed, held_out in (("train", 60, 10, False), ("val", 23, 11, True)):
        lines = [json.dumps(record) for record in make_prompts(per_category, seed, held_out)]
        (folder / f"shapeworld_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _new_prompt(category: str, rng: random.Random, held_out: bool, taken: set[str]) -> dict[str, str]:
    while True:
        request = _request(category, rng)
        if request is None or any((thing in validation_pairs()) != held_out for thing in request.things):
            continue
        text = describe(request, _USER_WORDS.get(category, 0.6), rng)
        if text not in taken:
            taken.add(text)
            return {"user_prompt": text, "category": category, "difficulty": _difficulty(request)}


def _request(category: str, rng: random.Random) -> Scene | None:
    """What a prompt of a category asks for, or None where the drawn scene is of another kind."""
    kinds = {"count": "counted", "two-objects": "pair"}
    scene = random_scene(rng)
    if scene.kind != kinds.get(category, "single"):
        return None
    request = replace(scene, size=None, place=None, background=None, style=None)
    if category == "dialect":
        chosen = rng.sample(("size", "place", "background"), 1)
        return replace(request, **{name: getattr(scene, name) for name in chosen})
    if category in ("size", "place", "background"):
        values = {"size": SIZES, "place": PLACES, "background": tuple(BACKGROUNDS)}
        return replace(request, **{category: rng.choice(values[category])})
    if category in kinds and rng.random() < 0.3:
        return replace(request, background=scene.background)
    return request


def _difficulty(request: Scene) -> str:
    """By how much is asked for at once."""
    asked = len(request.stated()) - (1 if request.count == 1 else 0)
    return "easy" if asked <= 2 else "medium" if asked == 3 else "hard"
