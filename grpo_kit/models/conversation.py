"""What a policy is asked: a user's prompt with its pictures, and what earlier turns wrote and what came of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from grpo_kit.config.hub import ModelError
from grpo_kit.config.media import Sound, Video, Views, thumbnail

KEEP = "keep it"  # the answer of a later turn that draws nothing: the picture of the turn before stands
LookAt = Literal["own", "other", "grey", "words", "nothing"]
_GREY = (127, 127, 127)


@dataclass(frozen=True)
class Turn:
    """An earlier turn: what the policy wrote, and what it is shown of that."""

    rewrite: str
    image: Image.Image | None = None  # None: it came out unusable, or is not shown
    words: str = ""  # what is said of the picture in its place

    def __post_init__(self) -> None:
        if isinstance(self.image, Video | Sound | Views):  # the policy sees the picture that stands for it
            object.__setattr__(self, "image", thumbnail(self.image))


@dataclass(frozen=True)
class Conversation:
    """A user's prompt as a policy reads it in some turn."""

    prompt: str
    images: tuple[Image.Image, ...] = ()  # those that belong to the prompt
    turns: tuple[Turn, ...] = ()  # those before, oldest first

    @property
    def pictures(self) -> list[Image.Image]:
        """All its pictures, in the order in which they stand in it."""
        return [*self.images, *(turn.image for turn in self.turns if turn.image is not None)]


def conversations(
    prompts: Sequence[str | Conversation], images: Sequence[Image.Image] | None = None
) -> list[Conversation]:
    """Prompts (with one picture each) as conversations that begin; those that are conversations stay as they are."""
    if images is not None:
        return [Conversation(str(prompt), (image,)) for prompt, image in zip(prompts, images, strict=True)]
    return [one if isinstance(one, Conversation) else Conversation(str(one)) for one in prompts]


def is_kept(text: str) -> bool:
    """Whether a later turn's answer leaves the picture as it is."""
    return text.strip(" .\n").lower() == KEEP


def shown(asked: Sequence[Conversation], look_at: LookAt, step: int = 1) -> list[Conversation]:
    """The conversations with other pictures, to find out what looking at the right ones is worth.

    Args:
        look_at: "own" changes nothing; "other" gives each the pictures of the one that stands `step` places further;
            "grey" hides what they show; "nothing" and "words" leave them out ("words": what is said of them stays).
        step: how many belong to the same prompt; a `ModelError` where there is no other prompt.
    """
    if look_at == "other" and len(asked) <= step:
        raise ModelError("look_at: found other, but there is one prompt alone; give several")
    others = [asked[(place + step) % len(asked)] for place in range(len(asked))]
    return [_shown(one, other, look_at) for one, other in zip(asked, others, strict=True)]


def _shown(one: Conversation, other: Conversation, look_at: LookAt) -> Conversation:
    def turn(number: int) -> Turn:
        own = one.turns[number]
        if look_at == "other" and own.image is not None:
            return replace(own, image=other.turns[number].image, words="")
        if look_at == "grey" and own.image is not None:
            return replace(own, image=grey(own.image), words="")
        return own if look_at == "words" else replace(own, words="")

    if look_at in ("nothing", "words"):
        one = replace(one, images=(), turns=tuple(replace(own, image=None) for own in one.turns))
    elif look_at != "own":
        one = replace(one, images=other.images if look_at == "other" else tuple(map(grey, one.images)))
    return replace(one, turns=tuple(map(turn, range(len(one.turns)))))


def require_words(look_at: LookAt, generator: object) -> None:
    """A `ModelError` where a policy shall read the check's words on what is no picture: it has none for that."""
    medium = getattr(generator, "medium", "image")
    if look_at == "words" and medium != "image":
        allowed = "allowed for media that are no pictures: own, other, grey, nothing"
        raise ModelError(f"look_at: found words with a generator of {medium}, {allowed}. Choose one of them")


def grey(image: Image.Image) -> Image.Image:
    """A grey picture of the same size."""
    return Image.new("RGB", image.size, _GREY)


def within_pixels(image: Image.Image, fewest: int | None, most: int | None) -> Image.Image:
    """A picture made larger or smaller, in its proportions, so that it has at least and at most so many pixels."""
    pixels = image.width * image.height
    wanted = min(max(pixels, fewest or 0), most or math.inf)
    if wanted == pixels:
        return image
    scale = math.sqrt(wanted / pixels)
    round_off = math.floor if wanted < pixels else math.ceil
    size = (max(1, round_off(image.width * scale)), max(1, round_off(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)
