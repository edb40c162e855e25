"""What a user can ask for beside a picture: the same again, or the same with one thing changed.

the same · the same, but blue · the same, but tiny · the same, but on the left · the same, at night · one more
"""

import random
from dataclasses import dataclass, replace

from grpo_kit.shapeworld.captions import PLACE_WORDS, USER_WORDS
from grpo_kit.shapeworld.scene import BACKGROUNDS, COLOURS, PLACES, SIZES, Scene

REDRAW = "the same"
MOST = 3  # things that a picture shows
_VALUES = {"colour": tuple(COLOURS), "size": SIZES, "place": PLACES, "background": tuple(BACKGROUNDS)}
EDITS = (*_VALUES, "count")


@dataclass(frozen=True)
class Edit:
    """One attribute and its new value; of "count" the value is the new number."""

    attribute: str
    value: str | int

    def instruction(self, dialect: str | float = "generator", rng: random.Random | None = None) -> str:
        """The edit in words; `dialect` as for `captions.describe`. "one more" is said in both dialects."""
        if self.attribute == "count":
            return "one more"
        word = {
            "place": PLACE_WORDS.get(self.value, ""),
            "background": f"{self.value} background",
        }.get(self.attribute, self.value)
        users = dialect == "user" if isinstance(dialect, str) else rng.random() < dialect
        said = USER_WORDS[word] if users else word
        return f"{REDRAW}, {said}" if self.attribute == "background" else f"{REDRAW}, but {said}"

    def apply(self, scene: Scene) -> Scene:
        """The scene that is meant. Counted things have no size and no place of their own."""
        several = {"size": None, "place": None} if self.attribute == "count" else {}
        return replace(scene, **{self.attribute: self.value}, **several)


def possible_edits(scene: Scene, attribute: str | None = None) -> list[Edit]:
    """All that can be asked of a complete scene (of one attribute); two different things only change their ground."""
    names = {"single": EDITS, "counted": ("colour", "background", "count"), "pair": ("background",)}[scene.kind]
    edits = [
        Edit(name, value)
        for name in names
        if name != "count"
        for value in _VALUES[name]
        if value != getattr(scene, name)
    ]
    if "count" in names and scene.count < MOST:
        edits.append(Edit("count", scene.count + 1))
    return [edit for edit in edits if attribute in (None, edit.attribute)]


def sample_edit(scene: Scene, rng: random.Random, attribute: str | None = None) -> Edit | None:
    """One of the possible edits, each attribute equally likely; None where the attribute can't change."""
    edits = possible_edits(scene, attribute)
    if not edits:
        return None
    chosen = rng.choice(sorted({edit.attribute for edit in edits}))
    return rng.choice([edit for edit in edits if edit.attribute == chosen])
