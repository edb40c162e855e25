"""Writes the users' prompts of the world of films: those held out mention (colour, shape) pairs of their own."""

import json
import random
from dataclasses import replace
from pathlib import Path

from grpo_kit.shapeworld.moving import describe
from grpo_kit.shapeworld.scene import validation_pairs
from tools.moving.films import random_films

_USER_WORDS = {"direction": 0.5, "speed": 0.5, "dialect": 1.0}  # category → share of the users' words


def make_prompts(per_category: int, seed: int, held_out: bool) -> list[dict[str, str]]:
    """`per_category` different prompts of each category, interleaved."""
    rng, taken, records = random.Random(seed), set(), []
    for film in random_films(20_000, seed):
        if ((film.colour, film.shape) in validation_pairs()) != held_out:
            continue
        category = list(_USER_WORDS)[len(records) % len(_USER_WORDS)]
        request = replace(film, speed=None if category == "direction" else film.speed, style=None)
        text = describe(request, _USER_WORDS[category], rng)
        if text not in taken:
            taken.add(text)
            difficulty = {"direction": "easy", "speed": "medium", "dialect": "hard"}[category]
            records.append({"user_prompt": text, "category": category, "difficulty": difficulty})
        if len(records) == per_category * len(_USER_WORDS):
            break
    return records


def write_prompts(folder: Path) -> None:
    """Write `moving_train.jsonl` (240 prompts) and `moving_val.jsonl` (96)."""
    for name, per_category, seed, held_out in (("train", 80, 10, False), ("val", 32, 11, True)):
        lines = [json.dumps(record) for record in make_prompts(per_category, seed, held_out)]
        (folder / f"moving_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
