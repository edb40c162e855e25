"""Writes the embedded world's prompts that bring a picture: "the same" and edits of it.

Held-out prompts show scenes that no training prompt shows or means.
"""

import io
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_kit.shapeworld.captions import describe
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import Scene, is_held_out, random_scene
from tools.shapeworld.edits import EDITS, REDRAW, sample_edit

_KINDS = {"single": "single", "two-objects": "pair", "count": "counted"}  # category → kind of scene
ROUNDS = {"redraw": ("single", "two-objects", "count", "single", "two-objects"), "edit": EDITS}  # of categories
_DIFFICULTY = {"single": "easy", "counted": "medium", "pair": "hard"}
_SCHEMA = pa.schema(
    {
        **dict.fromkeys(("user_prompt", "category", "difficulty"), pa.string()),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        **dict.fromkeys(("caption", "target"), pa.string()),
    }
)
Taken = set[tuple[Scene, Scene]]  # what a picture shows and what is meant


def make_picture_prompts(task: str, rounds: int, seed: int, held_out: bool) -> list[dict[str, object]]:
    """Rounds of prompts of all categories of a task, "redraw" or "edit"; no two of them mean the same.

    `caption` says what the picture shows and `target` what is meant, both in the generator's words.
    """
    rng, taken = random.Random(seed), set()
    new = _redraw if task == "redraw" else _edit
    return [new(category, rng, held_out, taken) for _ in range(rounds) for category in ROUNDS[task]]


def write_picture_prompts(folder: Path) -> None:
    """Write `shapeworld_{redraw,edit}_train.parquet` (240 prompts each) and `…_val.parquet` (95 each)."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in ROUNDS:
        for name, rounds, seed, held_out in (("train", 48, 12, False), ("val", 19, 13, True)):
            rows = make_picture_prompts(task, rounds, seed, held_out)
            table = pa.Table.from_pylist(rows, schema=_SCHEMA)
            pq.write_table(table, folder / f"shapeworld_{task}_{name}.parquet")


def _redraw(category: str, rng: random.Random, held_out: bool, taken: Taken) -> dict[str, object]:
    while True:
        scene = random_scene(rng, style="clean")
        if scene.kind == _KINDS[category] and is_held_out(scene) == held_out and (scene, scene) not in taken:
            return _row(REDRAW, category, scene, scene, rng, taken)


def _edit(category: str, rng: random.Random, held_out: bool, taken: Taken) -> dict[str, object]:
    while True:
        scene = random_scene(rng, style="clean")
        edit = sample_edit(scene, rng, category)
        if edit is None or is_held_out(scene) != held_out or (not held_out and is_held_out(edit.apply(scene))):
            continue
        if (scene, edit.apply(scene)) not in taken:
            return _row(edit.instruction(0.5, rng), category, scene, edit.apply(scene), rng, taken)


def _row(asked: str, category: str, scene: Scene, target: Scene, rng: random.Random, taken: Taken) -> dict[str, object]:
    taken.add((scene, target))
    file = io.BytesIO()
    render(scene, rng).save(file, "PNG")
    return {
        "user_prompt": asked,
        "category": category,
        "difficulty": _DIFFICULTY[target.kind],
        "image": {"bytes": file.getvalue(), "path": None},
        "caption": describe(scene),
        "target": describe(target),
    }
