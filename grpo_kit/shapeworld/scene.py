"""What a picture of the embedded world can show: scenes, and how to draw one at random.

A scene has one thing, one thing counted two or three times, or two different things in a relation. Every attribute may
be left open (None): then the scene is a *request*, and whoever draws it picks what is missing.
"""

import random
import zlib
from dataclasses import dataclass, fields, replace

COLOURS = {
    "red": (218, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (45, 160, 70),
    "cyan": (70, 205, 220),
    "blue": (45, 80, 215),
    "purple": (130, 50, 175),
    "pink": (250, 135, 195),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
BACKGROUNDS = {"white": (245, 245, 245), "gray": (135, 135, 135), "black": (20, 20, 20)}
SIZES = ("small", "large")
PLACES = ("center", "left", "right", "top", "bottom")
RELATIONS = ("left of", "above")
STYLES = ("clean", "dreamy", "vintage", "glitch")  # only the first is a good picture

Pair = tuple[str, str]  # (colour, shape)


@dataclass(frozen=True)
class Scene:
    """One picture's content. Which attributes apply depends on the kind; the others stay None.

    `size` and `place` belong to a single thing, `relation` and the second thing to a pair, `count` to all.
    """

    colour: str | None = None
    shape: str | None = None
    count: int | None = 1
    size: str | None = None
    place: str | None = None
    second_colour: str | None = None
    second_shape: str | None = None
    relation: str | None = None
    background: str | None = None
    style: str | None = None

    @property
    def kind(self) -> str:
        """ "single", "counted" or "pair"."""
        if self.second_shape is not None:
            return "pair"
        return "counted" if (self.count or 1) > 1 else "single"

    @property
    def things(self) -> tuple[Pair, ...]:
        """The (colour, shape) of the first thing and, in a pair, of the second."""
        first = (self.colour, self.shape)
        return (first, (self.second_colour, self.second_shape)) if self.kind == "pair" else (first,)

    def stated(self) -> dict[str, object]:
        """The attributes that are not left open, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def random_scene(rng: random.Random, style: str | None = None) -> Scene:
    """A complete scene: half single things, one in five counted, the rest pairs."""
    kind = rng.choices(("single", "counted", "pair"), (0.5, 0.2, 0.3))[0]
    scene = Scene(
        colour=rng.choice(list(COLOURS)),
        shape=rng.choice(SHAPES),
        background=rng.choice(list(BACKGROUNDS)),
        style=style or rng.choice(STYLES),
    )
    if kind == "single":
        return replace(scene, size=rng.choice(SIZES), place=rng.choice(PLACES))
    if kind == "counted":
        return replace(scene, count=rng.choice((2, 3)))
    colour, shape = rng.choice([(c, s) for c in COLOURS for s in SHAPES if (c, s) != (scene.colour, scene.shape)])
    return replace(scene, second_colour=colour, second_shape=shape, relation=rng.choice(RELATIONS))


def is_held_out(scene: Scene) -> bool:
    """Whether generator and reward model never see this scene in training (one in ten, whatever its style)."""
    return zlib.crc32(repr(replace(scene, style=None)).encode()) % 10 == 0


def random_scenes(count: int, seed: int, held_out: bool = False, style: str | None = None) -> list[Scene]:
    """`count` complete scenes from the training part of the world, or from its held-out part."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng, style)
        if is_held_out(scene) == held_out:
            scenes.append(scene)
    return scenes


def validation_pairs() -> frozenset[Pair]:
    """The (colour, shape) pairs that only held-out prompts mention: each colour once, the shapes spread evenly."""
    return frozenset((colour, SHAPES[(2 * i) % len(SHAPES)]) for i, colour in enumerate(COLOURS))
