"""Trains the policy that looks: the shipped policy goes on, with pictures that a user gave or that it caused itself.

Batches take turns: words alone, "the same" beside a picture, an edit beside a picture, and a second answer after the
picture that a painter made of the first. Reading a picture comes first; then most batches are second answers.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from grpo_kit.config import load_config
from grpo_kit.config.seeds import derive_seed
from grpo_kit.models.conversation import KEEP
from grpo_kit.shapeworld.captions import PLACE_WORDS, describe, keeps_request, parse
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, STYLES, Scene, is_held_out
from tools.shapeworld.captions import leave_open
from tools.shapeworld.edits import REDRAW, sample_edit
from tools.shapeworld.loop import Outcome, Recipe, train_recipe
from tools.shapeworld.policy import asked, rewriting_batch, supervised_batch
from tools.shapeworld.rewrites import RewriteMix, sample_rewrite

BATCH = 48
_REFINE = load_config("tiny_refine").model_settings
LOOK = _REFINE.look_instruction
READING = ("words", "redraw", "edit", "refine")  # the tasks of the batches, in turn
LOOKING = ("words", "redraw", "edit", *["refine"] * 5)
Painter = Mapping[str, str]  # word → the word that it draws instead
PAINTERS: Sequence[Painter] = _REFINE.painters
SKILFUL = RewriteMix(wrong_thing=0, wrong_count=0, harmful_style=0, no_style=0, user_words=((0.0, 1.0),))
_KNOWING = RewriteMix(wrong_thing=0, wrong_count=0, user_words=((0.0, 1.0),))  # right words, the usual styles


@dataclass(frozen=True)
class Look:
    """A second turn: what was asked, what the policy wrote, what came of it, and what it needs of this painter."""

    request: Scene
    prompt: str
    rewrite: str
    shown: Scene
    painter: Painter

    @property
    def is_right(self) -> bool:
        """Whether the picture shows all that was asked for, unspoiled."""
        return self.shown.style == "clean" and keeps_request(self.request, self.shown)

    @property
    def needed(self) -> Scene:
        """What has to be written so that this painter draws what was asked for."""
        return painted(self.request, self.painter)

    def messages(self) -> list[dict[str, object]]:
        """The conversation up to the second answer."""
        first = {"role": "assistant", "content": [{"type": "text", "text": self.rewrite}]}
        return [asked(self.prompt), first, asked(self.prompt, LOOK, pictures=1)]


def painted(scene: Scene, painter: Painter) -> Scene:
    """The scene with the painter's swaps; twice is the scene itself."""
    names = ("colour", "shape", "second_colour", "second_shape")
    return replace(scene, **{name: painter.get(getattr(scene, name), getattr(scene, name)) for name in names})


def drawn_from(rewrite: str, painter: Painter, rng: random.Random) -> Scene:
    """What a painter draws: generator's words as it understands them, all else (users' words too) at random."""
    stated = parse(rewrite)
    values = {"background": tuple(BACKGROUNDS), "style": STYLES, "colour": tuple(COLOURS), "shape": SHAPES}
    if stated.kind == "pair":
        values |= {"second_colour": tuple(COLOURS), "second_shape": SHAPES, "relation": RELATIONS}
    else:
        values |= {"size": SIZES, "place": PLACES} if stated.kind == "single" else {"count": (2, 3)}
    unknown = [name for name in values if not _understood(stated, name, rewrite)]
    return replace(painted(stated, painter), **{name: rng.choice(values[name]) for name in unknown})


def _understood(stated: Scene, name: str, rewrite: str) -> bool:
    """Whether a rewrite states an attribute in the generator's own word."""
    value = getattr(stated, name)
    if value is None or name == "style":
        return value is not None
    said = {
        "place": PLACE_WORDS.get(value),
        "background": f"{value} background",
        "count": {2: "two", 3: "three"}.get(value),
    }
    return (said.get(name) or value) in rewrite


def sample_look(scene: Scene, rng: random.Random) -> Look:
    """A second turn about a scene: the first rewrite is sampled, or skilful, now and then for a painter who swaps."""
    request, painter = leave_open(scene, 0.4, rng), rng.choice(PAINTERS)
    prompt = describe(request, rng.choice((0.0, 0.5, 1.0)), rng)
    if rng.random() < 0.2:
        rewrite = sample_rewrite(request, rng)
    else:
        supposed = PAINTERS[0] if rng.random() < 0.85 else rng.choice(PAINTERS)
        rewrite = sample_rewrite(painted(request, supposed), rng, SKILFUL)
    return Look(request, prompt, rewrite, drawn_from(rewrite, painter, rng), painter)


def second_answer(look: Look, rng: random.Random) -> str:
    """Keep a right picture in one case of two; else what the painter needs (70 %), or just another rewrite."""
    if look.is_right and rng.random() < 0.5:
        return KEEP
    return sample_rewrite(look.needed, rng, _KNOWING) if rng.random() < 0.7 else sample_rewrite(look.request, rng)


def train_eyes(
    start: Path, scenes: list[Scene], work: Path, steps: tuple[int, int], seed: int
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, dict[str, Outcome]]:
    """Supervised training from the policy in `start`, on sampled answers: so many steps of reading, then of looking."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(start)
    processor = Qwen2_5_VLProcessor.from_pretrained(start)

    def batches(name: str, tasks: Sequence[str]) -> Callable[[int], torch.Tensor]:
        def loss(step: int) -> torch.Tensor:
            rng = random.Random(derive_seed(seed, f"{name}-batch", step))
            batch = batch_of(tasks[step % len(tasks)], processor, rng.sample(scenes, BATCH), rng)
            return model(**batch, use_cache=False).loss

        return loss

    common = {"learning_rate": 1e-3, "ema_decay": 0.998, "seed": seed}
    reading, looking = steps
    parts, whole = {"policy": model}, round(reading * 4 / 3)  # of which the last quarter is not run
    recipes = [
        Recipe("eyes", parts, whole, loss=batches("eyes", READING), stop=reading, **common),
        Recipe("looks", parts, looking, loss=batches("looks", LOOKING), **common),
    ]
    outcomes = {recipe.name: train_recipe(recipe, work) for recipe in recipes}
    return model.eval(), processor, outcomes


def batch_of(
    task: str, processor: Qwen2_5_VLProcessor, scenes: Sequence[Scene], rng: random.Random
) -> dict[str, torch.Tensor]:
    """One batch of a task about these scenes."""
    if task == "words":
        requests = [leave_open(scene, 0.4, rng) for scene in scenes]
        pictures = [render(scene, rng) for scene in rng.sample(scenes, len(scenes))] if rng.random() < 0.25 else None
        return rewriting_batch(processor, requests, pictures, rng)
    if task == "refine":
        looks = [sample_look(scene, rng) for scene in scenes]
        pictures = [render(look.shown, rng) for look in looks]
        return supervised_batch(
            processor, [look.messages() for look in looks], pictures, [second_answer(look, rng) for look in looks]
        )
    prompts, pictures, answers = [], [], []
    for scene in scenes:
        prompt, target = (REDRAW, scene) if task == "redraw" else edited(scene, rng)
        prompts.append(prompt)
        pictures.append(reference(scene, rng))
        answers.append(sample_rewrite(replace(target, style=None), rng))
    return supervised_batch(processor, [[asked(prompt, pictures=1)] for prompt in prompts], pictures, answers)


def edited(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """An edit's instruction in either dialect and the scene that is meant, which is never a held-out one."""
    for _ in range(20):
        edit = sample_edit(scene, rng)
        if not is_held_out(edit.apply(scene)):
            return edit.instruction(0.5, rng), edit.apply(scene)
    return REDRAW, scene


def reference(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture that a user gives: one of ten is spoiled."""
    return render(replace(scene, style="clean" if rng.random() < 0.9 else rng.choice(STYLES)), rng)
