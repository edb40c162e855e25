"""Films of the small world, drawn by chance."""

import random
from dataclasses import replace

from grpo_kit.shapeworld.moving import DIRECTIONS, SPEEDS, STYLE_WORDS, Film
from grpo_kit.shapeworld.scene import COLOURS, SHAPES


def random_films(count: int, seed: int, style: str | None = None) -> list[Film]:
    """`count` complete films; half of them clean where no style is named."""
    rng = random.Random(seed)
    choices = (tuple(COLOURS), SHAPES, tuple(DIRECTIONS), tuple(SPEEDS), ("clean", *STYLE_WORDS, "clean"))
    films = [Film(*map(rng.choice, choices)) for _ in range(count)]
    return [replace(film, style=style) for film in films] if style else films
