"""Draws a complete scene as a 32 x 32 picture, crisply or in one of three bad styles (PIL, supersampled four times)."""

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from grpo_kit.shapeworld.scene import BACKGROUNDS, COLOURS, Scene

SIZE = 32
_SUPERSAMPLING = 4
RADIUS = {"small": 0.20, "large": 0.34, "counted": 0.18, "pair": 0.19}  # of the picture's width
_SHIFT = {"small": 0.22, "large": 0.14}
_DIRECTION = {"center": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
_COUNTED = {2: ((0.27, 0.5), (0.73, 0.5)), 3: ((0.5, 0.26), (0.25, 0.73), (0.75, 0.73))}
_RELATED = {"left of": ((0.26, 0.5), (0.74, 0.5)), "above": ((0.5, 0.26), (0.5, 0.74))}


@dataclass(frozen=True)
class Mark:
    """One shape on the canvas: centre and radius as shares of the picture's width, colour as RGB."""

    shape: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]


def layout(scene: Scene) -> list[Mark]:
    """Where each thing of a complete scene stands, without jitter."""
    if scene.kind == "single":
        dx, dy = _DIRECTION[scene.place]
        spots = [(0.5 + dx * _SHIFT[scene.size], 0.5 + dy * _SHIFT[scene.size])]
        radius = RADIUS[scene.size]
    else:
        spots = _COUNTED[scene.count] if scene.kind == "counted" else _RELATED[scene.relation]
        radius = RADIUS[scene.kind]
    things = scene.things if scene.kind == "pair" else scene.things * len(spots)
    return [Mark(shape, x, y, radius, COLOURS[colour]) for (colour, shape), (x, y) in zip(things, spots, strict=True)]


def draw_shape(canvas: ImageDraw.ImageDraw, mark: Mark, size: int, ground: tuple[int, int, int]) -> None:
    """Draw one mark on a square canvas of `size` pixels; `ground` fills a ring's hole."""
    x, y, r = mark.x * size, mark.y * size, mark.radius * size
    if mark.shape == "square":
        canvas.rectangle((x - 0.86 * r, y - 0.86 * r, x + 0.86 * r, y + 0.86 * r), fill=mark.rgb)
    elif mark.shape == "triangle":
        canvas.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=mark.rgb)
    elif mark.shape == "cross":
        canvas.rectangle((x - r, y - 0.32 * r, x + r, y + 0.32 * r), fill=mark.rgb)
        canvas.rectangle((x - 0.32 * r, y - r, x + 0.32 * r, y + r), fill=mark.rgb)
    else:
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=mark.rgb)
        if mark.shape == "ring":
            hole = 0.52 * r
            canvas.ellipse((x - hole, y - hole, x + hole, y + hole), fill=ground)


def draw_marks(marks: list[Mark], ground: tuple[int, int, int], style: str = "clean") -> Image.Image:
    """Draw marks on a plain ground and apply a style."""
    big = SIZE * _SUPERSAMPLING
    image = Image.new("RGB", (big, big), ground)
    canvas = ImageDraw.Draw(image)
    for mark in marks:
        draw_shape(canvas, mark, big, ground)
    return apply_style(image.resize((SIZE, SIZE), Image.Resampling.BOX), style)


def apply_style(image: Image.Image, style: str) -> Image.Image:
    """Spoil a clean picture, deterministically: dreamy blurs, vintage fades, glitch inverts diagonal stripes."""
    if style == "dreamy":
        return image.filter(ImageFilter.GaussianBlur(2.2))
    if style == "vintage":
        return Image.blend(image, Image.new("RGB", image.size, (158, 146, 126)), 0.65)
    if style == "glitch":
        return Image.composite(ImageChops.invert(image), image, _stripes())
    return image


@cache
def _stripes() -> Image.Image:
    rows, columns = np.indices((SIZE, SIZE))
    return Image.fromarray((rows + columns) // 4 % 2 == 1)


def render(scene: Scene, rng: random.Random | None = None) -> Image.Image:
    """A 32 x 32 RGB picture of a complete scene; with `rng`, slightly jittered in place, size and colour."""
    ground, marks = BACKGROUNDS[scene.background], layout(scene)
    if rng is not None:
        ground = _jitter_colour(ground, rng)
        marks = [_jitter(mark, rng) for mark in marks]
    return draw_marks(marks, ground, scene.style or "clean")


def _jitter(mark: Mark, rng: random.Random) -> Mark:
    x, y = mark.x + rng.uniform(-0.015, 0.015), mark.y + rng.uniform(-0.015, 0.015)
    return Mark(mark.shape, x, y, mark.radius * rng.uniform(0.96, 1.04), _jitter_colour(mark.rgb, rng))


def _jitter_colour(rgb: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    return tuple(min(255, max(0, channel + rng.randint(-5, 5))) for channel in rgb)
