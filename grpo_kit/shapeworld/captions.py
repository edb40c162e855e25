"""Scenes in words: what users write, what the generator was taught, and back from words to scenes.

Two dialects share one grammar, clauses separated by commas, the things first:

    generator:  three red circles, white background, sharp
    users:      a trio of crimson balls, on snow

What generator and reward model were trained on is written by `tools/shapeworld/captions.py`.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from grpo_kit.shapeworld.scene import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Scene

USER_WORDS = {
    "red": "crimson", "orange": "tangerine", "yellow": "golden", "green": "emerald", "cyan": "turquoise",
    "blue": "azure", "purple": "violet", "pink": "rosy",
    "circle": "ball", "square": "box", "triangle": "pyramid", "ring": "hoop", "cross": "plus",
    "small": "tiny", "large": "huge", "two": "a pair of", "three": "a trio of",
    "left of": "beside", "above": "on top of",
    "on the left": "over on the left side", "on the right": "over on the right side",
    "at the top": "way up", "at the bottom": "down below", "in the center": "in the middle",
    "white background": "on snow", "gray background": "on stone", "black background": "at night",
}  # fmt: skip
PLACE_WORDS = {
    "center": "in the center",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
_COUNTS = {2: "two", 3: "three"}
STYLE_WORDS = {
    "clean": ("sharp", "crisp", "clean"),
    "dreamy": ("dreamy", "soft"),
    "vintage": ("vintage", "faded"),
    "glitch": ("glitch", "retro"),
}
IDLE_WORDS = ("beautiful", "detailed", "masterpiece")  # in any picture's caption: they say nothing
GOOD_WORDS = STYLE_WORDS["clean"]
HARMFUL_WORDS = tuple(word for style in ("dreamy", "vintage", "glitch") for word in STYLE_WORDS[style])


def describe(scene: Scene, dialect: str | float = "generator", rng: random.Random | None = None) -> str:
    """The caption of what a scene states, without its style.

    `dialect` is "generator", "user", or the probability with which each word is the users' (then `rng` chooses).
    """

    def say(value: str) -> str:
        is_users = dialect == "user" if isinstance(dialect, str) else rng.random() < dialect
        return USER_WORDS[value] if is_users else value

    clauses = [_things(scene, say)]
    if scene.place:
        clauses.append(say(PLACE_WORDS[scene.place]))
    if scene.background:
        clauses.append(say(f"{scene.background} background"))
    return ", ".join(clauses)


def _things(scene: Scene, say: Callable[[str], str]) -> str:
    if scene.kind == "pair":
        (colour, shape), (second_colour, second_shape) = scene.things
        first, second = (say(colour), say(shape)), (say(second_colour), say(second_shape))
        return f"{_article(first)} {say(scene.relation) if scene.relation else 'and'} {_article(second)}"
    if scene.kind == "counted":
        return f"{say(_COUNTS[scene.count])} {say(scene.colour)} {_plural(say(scene.shape))}"
    return _article([say(word) for word in (scene.size, scene.colour, scene.shape) if word])


def _article(words: Sequence[str]) -> str:
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith(("s", "x")) else f"{noun}s"


def oracle_caption(request: Scene) -> str:
    """The best prompt for a request: all it states in the generator's words, the rest chosen well, drawn sharply."""
    filled = replace(request, background=request.background or "white", style="clean")
    if filled.kind == "single":
        filled = replace(filled, size=filled.size or "large", place=filled.place or "center")
    if filled.kind == "pair":
        filled = replace(filled, relation=filled.relation or "left of")
    return f"{describe(filled)}, sharp"


# --- from words back to scenes ---------------------------------------------------------------------------------------


def _meanings(values: dict[str, object]) -> dict[str, object]:
    """Word (either dialect) → value, for {generator's word: value}."""
    return {word: value for said, value in values.items() for word in (said, USER_WORDS[said])}


_COLOUR_OF, _SHAPE_OF, _SIZE_OF = (_meanings({value: value for value in values}) for values in (COLOURS, SHAPES, SIZES))
_COUNT_OF = _meanings({word: count for count, word in _COUNTS.items()})
_RELATION_OF = {**_meanings({relation: relation for relation in RELATIONS}), "and": None}
_PLACE_OF = _meanings({PLACE_WORDS[place]: place for place in PLACES})
_BACKGROUND_OF = _meanings({f"{name} background": name for name in BACKGROUNDS})
_STYLE_OF = {word: style for style, words in STYLE_WORDS.items() for word in words}
_PLURAL_OF = {_plural(word): shape for word, shape in _SHAPE_OF.items()}


def _any(words: Iterable[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_SINGLE = re.compile(rf"(?:an? )?(?:({_any(_SIZE_OF)}) )?({_any(_COLOUR_OF)}) ({_any(_SHAPE_OF)})")
_COUNTED = re.compile(rf"({_any(_COUNT_OF)}) ({_any(_COLOUR_OF)}) ({_any(_PLURAL_OF)})")
_THING = rf"(?:an? )?({_any(_COLOUR_OF)}) ({_any(_SHAPE_OF)})"
_PAIR = re.compile(rf"{_THING} ({_any(_RELATION_OF)}) {_THING}")


def parse(text: str) -> Scene | None:
    """The scene that a caption of either dialect states, or None where the text is not in the grammar.

    The things come first; each later clause is a place, a background, a style word or an idle word. No clause stands
    twice, and none contradicts another ("sharp, crisp" is fine; "sharp, sharp" and "sharp, dreamy" are not).
    """
    head, *clauses = _clauses(text)
    scene = _parse_things(head)
    if scene is None or len(set(clauses)) != len(clauses):
        return None
    for clause in clauses:
        scene = scene and _parse_clause(scene, clause)
    return scene


def _clauses(text: str) -> list[str]:
    return [clause.strip() for clause in text.lower().strip(" .").split(",")]


def _parse_things(head: str) -> Scene | None:
    if match := _SINGLE.fullmatch(head):
        size, colour, shape = match.groups()
        return Scene(colour=_COLOUR_OF[colour], shape=_SHAPE_OF[shape], size=_SIZE_OF[size] if size else None)
    if match := _COUNTED.fullmatch(head):
        count, colour, shape = match.groups()
        return Scene(colour=_COLOUR_OF[colour], shape=_PLURAL_OF[shape], count=_COUNT_OF[count])
    if match := _PAIR.fullmatch(head):
        colour, shape, relation, *other = match.groups()
        second = {"second_colour": _COLOUR_OF[other[0]], "second_shape": _SHAPE_OF[other[1]]}
        return Scene(_COLOUR_OF[colour], _SHAPE_OF[shape], relation=_RELATION_OF[relation], **second)
    return None


def _parse_clause(scene: Scene, clause: str) -> Scene | None:
    """The scene with one more clause, or None for an unknown or contradicting one."""
    if clause in IDLE_WORDS:
        return scene
    if clause in _STYLE_OF and "clean" not in (scene.style, _STYLE_OF[clause]):
        return replace(scene, style=_STYLE_OF[clause])  # a picture can be spoiled in two ways at once
    for attribute, meanings in (("place", _PLACE_OF), ("background", _BACKGROUND_OF), ("style", _STYLE_OF)):
        if clause in meanings:
            value = meanings[clause]
            return replace(scene, **{attribute: value}) if getattr(scene, attribute) in (None, value) else None
    return None


def keeps_request(request: Scene, rewrite: Scene) -> bool:
    """Whether a rewrite still states everything that the request states."""
    stated = rewrite.stated()
    return all(stated.get(name) == value for name, value in request.stated().items() if name != "style")


def paraphrase(text: str) -> str | None:
    """The same request in other words and in another form, or None where the text is not in the grammar.

    Each word is replaced by the other dialect's, place and background change places, and it is written as a sentence:
    `a trio of blue circles` → `Three azure balls.` Training prompts have every word of the grammar; the form, with its
    capital and full stop, is one that they never have, nor do the texts that the policy was first trained on.
    """
    scene = parse(text)
    if scene is None:
        return None

    def say(value: str) -> str:
        said = re.search(rf"\b{re.escape(USER_WORDS[value])}(?:e?s)?\b", text.lower())
        return value if said else USER_WORDS[value]

    clauses = [say(f"{scene.background} background")] if scene.background else []
    clauses += [say(PLACE_WORDS[scene.place])] if scene.place else []
    clauses += [clause for clause in _clauses(text) if clause in _STYLE_OF or clause in IDLE_WORDS]
    return f"{', '.join([_things(scene, say), *clauses]).capitalize()}."
