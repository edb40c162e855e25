"""Words to train on in the world of films: the generator's, the reward model's, and the first policy's rewrites."""

import random
from dataclasses import replace
from functools import cache

from grpo_kit.shapeworld.captions import USER_WORDS as THING_WORDS
from grpo_kit.shapeworld.moving import (
    DIRECTIONS,
    GOOD_WORDS,
    HARMFUL_WORDS,
    IDLE_WORDS,
    SPEEDS,
    STYLE_WORDS,
    USER_WORDS,
    Film,
    describe,
)
from grpo_kit.shapeworld.scene import COLOURS, SHAPES
from tools.moving.films import random_films

_VALUES = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
    "style": tuple(STYLE_WORDS),
}


def change_one(film: Film, rng: random.Random, attribute: str | None = None) -> Film:
    """The film with one stated attribute changed: a given one, or any."""
    attribute = attribute or rng.choice(list(film.stated()))
    others = [value for value in _VALUES[attribute] if value != getattr(film, attribute)]
    return replace(film, **{attribute: rng.choice(others)})


def generator_caption(film: Film, rng: random.Random) -> str:
    """The generator's own words; in one caption of eight one of them is a users' word for any value.

    So the users' words mean nothing to it. The style is named three times out of four where it is clean, else always.
    """
    text = describe(replace(film, speed=film.speed if rng.random() < 0.85 else None))
    if rng.random() < 0.12:
        words = THING_WORDS | USER_WORDS
        values = rng.choice((COLOURS, SHAPES, [f"moving {name}" for name in DIRECTIONS], SPEEDS))
        for said in values:
            text = text.replace(f"{said}", words[rng.choice(list(values))]) if said in text else text
    if film.style != "clean" or rng.random() < 0.75:
        text += f", {rng.choice(STYLE_WORDS[film.style])}"
    return text + (f", {rng.choice(IDLE_WORDS)}" if rng.random() < 0.1 else "")


def reward_caption(film: Film, rng: random.Random) -> str:
    """Either dialect; a spoiled style is always named, a clean one at times."""
    text = describe(film, rng.choice((0.0, 0.5, 1.0)), rng)
    named = film.style != "clean" or rng.random() < 0.3
    return text + (f", {rng.choice(STYLE_WORDS[film.style])}" if named else "")


def sample_rewrite(request: Film, rng: random.Random) -> str:
    """One rewrite of a request as the policy writes before GRPO: some good, many idle, harmful or of another thing."""
    film = replace(request, style=None)
    if rng.random() < 0.2:
        film = change_one(film, rng)
    if film.speed is None and rng.random() < 0.3:
        film = replace(film, speed=rng.choice(list(SPEEDS)))
    clauses = [describe(film, rng.choices((0.0, 0.5, 1.0), (0.25, 0.4, 0.35))[0], rng)]
    if rng.random() < 0.7:
        words = HARMFUL_WORDS if rng.random() < 0.55 else GOOD_WORDS
        clauses += rng.sample(words, rng.choice((1, 1, 2)))
    return ", ".join(clauses + ([rng.choice(IDLE_WORDS)] if rng.random() < 0.25 else []))


@cache
def corpus() -> tuple[str, ...]:
    """Captions of both dialects, for the tokenizers; every word of the grammar is among them."""
    rng = random.Random(0)
    films = random_films(3000, seed=0)
    texts = [generator_caption(film, rng) for film in films] + [reward_caption(film, rng) for film in films]
    return tuple(texts + [word for words in (*STYLE_WORDS.values(), IDLE_WORDS) for word in words for _ in range(50)])
