"""Words to train on: captions of generator and reward model, the policy's first rewrites, and the users' prompts."""

import json
import random
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

from grpo_kit.shapeworld.tones import (
    GOOD_WORDS,
    HARMFUL_WORDS,
    IDLE_WORDS,
    KINDS,
    LENGTHS,
    LOUDNESSES,
    PITCHES,
    STYLE_WORDS,
    USER_WORDS,
    Tone,
    describe,
)
from tools.shapeworld.rewrites import RewriteMix
from tools.tones.sounds import is_held_out, random_tone

MIX = RewriteMix()  # as in the world of pictures
CATEGORIES = ("plain", "loudness", "length", "everything")
VALUES = {"kind": KINDS, "pitch": tuple(PITCHES), "loudness": tuple(LOUDNESSES), "length": tuple(LENGTHS)}


def leave_open(tone: Tone, keep: float, rng: random.Random) -> Tone:
    """The same tone with loudness and length each stated only with probability `keep`, and without style."""
    open_ones = {name: None for name in ("loudness", "length") if rng.random() >= keep}
    return replace(tone, **open_ones, style=None)


def generator_caption(tone: Tone, rng: random.Random) -> str:
    """In the generator's words; in one of eight a word is any one of the users', so that these mean nothing to it."""
    words = describe(leave_open(tone, 0.75, rng)).split(" ")
    if rng.random() < 0.12:
        words[rng.randrange(1, len(words))] = rng.choice(tuple(USER_WORDS.values()))
    style = f", {rng.choice(STYLE_WORDS[tone.style])}" if rng.random() < 0.65 else ""
    return " ".join(words) + style + _idle(rng, 0.1)


def reward_caption(tone: Tone, rng: random.Random) -> str:
    """In either dialect; a spoiled style is always named, a clean one at times."""
    text = describe(leave_open(tone, 0.8, rng), rng.choice((0.0, 0.5, 1.0)), rng)
    named = tone.style != "clean" or rng.random() < 0.3
    return text + (f", {rng.choice(STYLE_WORDS[tone.style])}" if named else "") + _idle(rng, 0.1)


def _idle(rng: random.Random, share: float) -> str:
    return f", {rng.choice(IDLE_WORDS)}" if rng.random() < share else ""


def sample_rewrite(request: Tone, rng: random.Random, mix: RewriteMix = MIX) -> str:
    """One rewrite as the initial policy makes them: good, idle, harmful, or of another sound."""
    tone = request
    if rng.random() < mix.wrong_thing:
        name = rng.choice(("kind", "pitch"))
        tone = replace(tone, **{name: rng.choice([v for v in VALUES[name] if v != getattr(tone, name)])})
    for name in ("loudness", "length"):
        if getattr(tone, name) is None and rng.random() < mix.fill:
            tone = replace(tone, **{name: rng.choice(VALUES[name])})
    shares, weights = zip(*mix.user_words, strict=True)
    text = describe(tone, rng.choices(shares, weights)[0], rng)
    if rng.random() >= mix.no_style:
        text += f", {rng.choice(HARMFUL_WORDS if rng.random() < mix.harmful_style else GOOD_WORDS)}"
    return text + _idle(rng, mix.idle)


@cache
def corpus() -> list[str]:
    """Captions of both dialects, for the tokenizers."""
    rng = random.Random(0)
    tones = [random_tone(rng) for _ in range(3000)]
    words = [word for words in (*STYLE_WORDS.values(), IDLE_WORDS, USER_WORDS.values()) for word in words]
    return [text(tone, rng) for tone in tones for text in (generator_caption, reward_caption)] + words * 50


def make_prompts(per_category: int, seed: int, held_out: bool) -> list[dict[str, str]]:
    """`per_category` different prompts of each category, interleaved, so that any beginning is balanced."""
    rng, taken = random.Random(seed), set()
    columns = [[_prompt(category, rng, held_out, taken) for _ in range(per_category)] for category in CATEGORIES]
    return [record for row in zip(*columns, strict=True) for record in row]


def _prompt(category: str, rng: random.Random, held_out: bool, taken: set[str]) -> dict[str, str]:
    asked = {"plain": (), "everything": ("loudness", "length")}.get(category, (category,))
    while True:
        tone = random_tone(rng)
        open_ones = [f.name for f in fields(Tone) if f.name not in ("kind", "pitch", *asked)]
        text = describe(replace(tone, **dict.fromkeys(open_ones)), 0.6, rng)
        if is_held_out(tone) == held_out and text not in taken:
            taken.add(text)
            difficulty = {0: "easy", 1: "medium", 2: "hard"}[len(asked)]
            return {"user_prompt": text, "category": category, "difficulty": difficulty}


def write_prompts(folder: Path) -> None:
    """Write `tones_train.jsonl` (160 prompts) and `tones_val.jsonl` (80)."""
    for name, per_category, seed, held_out in (("train", 40, 10, False), ("val", 20, 11, True)):
        lines = [json.dumps(record) for record in make_prompts(per_category, seed, held_out)]
        (folder / f"tones_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
