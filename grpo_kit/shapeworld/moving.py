"""A small world of films: one coloured shape that moves over a dark ground, in words, drawn, and checked by a program.

A film has 9 frames of 32 x 32 pixels, 8 a second. As in the world of pictures there are two dialects, a grammar of
clauses, words that spoil (a film that stands still, a soft one), and idle words:

    generator:  a red circle, moving left, fast, sharp
    users:      a crimson ball, leftwards, quickly
"""

import random
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from PIL import Image

from grpo_kit.shapeworld import captions, verify
from grpo_kit.shapeworld.render import RADIUS, SIZE, Mark, draw_marks
from grpo_kit.shapeworld.scene import BACKGROUNDS, COLOURS

FRAMES, FRAME_RATE = 9, 8.0
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slow": 1.0, "fast": 3.0}  # pixels a frame; what is fast begins and ends partly outside the picture
GROUND = BACKGROUNDS["black"]
MOTION_WORDS = {name: f"moving {name}" for name in DIRECTIONS}
USER_WORDS = {**{f"moving {name}": f"{name}wards" for name in DIRECTIONS}, "slow": "gently", "fast": "quickly"}
STYLE_WORDS = {"clean": ("sharp", "smooth"), "still": ("still", "frozen"), "blurry": ("blurry", "soft")}
GOOD_WORDS, HARMFUL_WORDS = STYLE_WORDS["clean"], STYLE_WORDS["still"] + STYLE_WORDS["blurry"]
IDLE_WORDS = captions.IDLE_WORDS

_FOREGROUND = 50.0  # RGB distance from the ground at which a pixel belongs to the thing
_SMALLEST = 8  # pixels; a frame with fewer shows nothing
_STILL, _FAST = 0.4, 1.9  # pixels a frame: below the first a thing stands still, from the second on it is fast
_ASKEW = 0.5  # the largest share of its movement that may go across its direction


@dataclass(frozen=True)
class Film:
    """What a film shows, or what of it is asked for: then direction, speed and style may be left open (None)."""

    colour: str
    shape: str
    direction: str | None = None
    speed: str | None = None
    style: str | None = None

    def stated(self) -> dict[str, str]:
        """The attributes that are not left open, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


# --- words ------------------------------------------------------------------------------------------------------------


def describe(film: Film, dialect: str | float = "generator", rng: random.Random | None = None) -> str:
    """The caption of what a film states, without its style; `dialect` as in `captions.describe`."""

    def say(word: str) -> str:
        users = dialect == "user" if isinstance(dialect, str) else rng.random() < dialect
        return (USER_WORDS.get(word) or captions.USER_WORDS[word]) if users else word

    colour, shape = say(film.colour), say(film.shape)
    clauses = [f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"]
    clauses += [say(MOTION_WORDS[film.direction])] if film.direction else []
    return ", ".join(clauses + ([say(film.speed)] if film.speed else []))


def oracle_caption(request: Film) -> str:
    """The best prompt for a request: all it states in the generator's words, drawn sharply."""
    return f"{describe(replace(request, speed=request.speed or 'slow'))}, sharp"


_MEANINGS = {
    "direction": {said: name for name, word in MOTION_WORDS.items() for said in (word, USER_WORDS[word])},
    "speed": {said: name for name in SPEEDS for said in (name, USER_WORDS[name])},
    "style": {word: style for style, words in STYLE_WORDS.items() for word in words},
}


def parse(text: str) -> Film | None:
    """The film that a caption of either dialect states; None where the text is not in the grammar.

    The thing comes first. No clause stands twice or contradicts another; a film may be spoiled in two ways at once.
    """
    head, *clauses = (clause.strip() for clause in text.lower().strip(" .").split(","))
    thing = captions.parse(head)
    if thing is None or thing.kind != "single" or thing.size or len(set(clauses)) != len(clauses):
        return None
    film = Film(thing.colour, thing.shape)
    for clause in clauses:
        found = {name: words[clause] for name, words in _MEANINGS.items() if clause in words}
        for name, value in found.items():
            before = getattr(film, name)
            if before not in (None, value) and (name != "style" or "clean" in (before, value)):
                return None
        if not found and clause not in IDLE_WORDS:
            return None
        film = replace(film, **found)
    return film


# --- pictures ---------------------------------------------------------------------------------------------------------


def render(film: Film, rng: random.Random | None = None, jitter: float = 3) -> np.ndarray:
    """(9, 32, 32, 3) uint8 frames of a complete film; with `rng`, jittered in place (pixels), size and colour.

    The thing is in the middle of its way in the middle frame; in a film that is still it stands there.
    """
    dx, dy = DIRECTIONS[film.direction]
    step = 0.0 if film.style == "still" else SPEEDS[film.speed]
    x, y, radius, rgb = SIZE / 2, SIZE / 2, RADIUS["small"], COLOURS[film.colour]
    if rng is not None:
        x, y = x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter)
        radius *= rng.uniform(0.96, 1.04)
        rgb = tuple(min(255, max(0, channel + rng.randint(-5, 5))) for channel in rgb)
    frames = []
    for moved in (step * (frame - FRAMES // 2) for frame in range(FRAMES)):
        mark = Mark(film.shape, (x + dx * moved) / SIZE, (y + dy * moved) / SIZE, radius, rgb)
        frames.append(np.asarray(draw_marks([mark], GROUND, "dreamy" if film.style == "blurry" else "clean")))
    return np.stack(frames)


# --- the check --------------------------------------------------------------------------------------------------------


def track(frames: np.ndarray) -> np.ndarray:
    """(T, 2): the thing's centre (x, y) in pixels in each of (T, 32, 32, 3) frames; NaN where there is none."""
    away = np.linalg.norm(frames.astype(float) - np.median(frames, axis=(0, 1, 2)), axis=-1) > _FOREGROUND
    centres = [np.argwhere(frame).mean(axis=0)[::-1] if frame.sum() >= _SMALLEST else (np.nan,) * 2 for frame in away]
    return np.asarray(centres, float)


def movement(frames: np.ndarray) -> tuple[str, str]:
    """(direction, speed), by the straight line through the track; direction "still" or "none" (lost, or askew)."""
    line = np.polyfit(np.arange(len(frames)), np.nan_to_num(centres := track(frames)), 1)[0]
    if not np.isfinite(centres).all():
        return "none", "none"
    length, across = np.abs(line).max(), np.abs(line).min()
    if length < _STILL:
        return "still", "none"
    axis = tuple(int(np.sign(value)) if abs(value) == length else 0 for value in line)
    direction = next((name for name, way in DIRECTIONS.items() if way == axis), "none")
    return ("none" if across > _ASKEW * length else direction), ("fast" if length >= _FAST else "slow")


def check(video: Any, request: Film) -> dict[str, bool]:
    """Attribute → whether a film (`config.media.Video`, or its frames) shows what a request states.

    The thing's positions give direction and speed; the middle frame, by the check of pictures, the rest: colour, shape,
    and "clean", which is always asked for.
    """
    frames = np.asarray(getattr(video, "frames", video))
    middle = verify.read(Image.fromarray(frames[len(frames) // 2]))
    only = middle.objects[0] if len(middle.objects) == 1 else None
    result = {name: only is not None and getattr(only, name) == getattr(request, name) for name in ("colour", "shape")}
    for name, found in zip(("direction", "speed"), movement(frames), strict=True):
        if getattr(request, name):
            result[name] = found == getattr(request, name)
    return {**result, "clean": middle.style == "clean"}
