"""How a picture is framed: the sign and size of its advantage, readable in colour and in black and white."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_kit.show.style import BLUE, GREY, VERMILION

FULL = 2.0  # the advantage from which a frame no longer grows


@dataclass(frozen=True)
class Frame:
    """A frame's colour, whether it is dashed, and its strength from 0 to 1."""

    colour: str
    dashed: bool
    strength: float

    @property
    def pixels(self) -> int:
        """The frame's width on a page."""
        return round(2 + 8 * self.strength)

    @property
    def points(self) -> float:
        """The frame's width in a figure."""
        return 1.2 + 4.4 * self.strength

    @property
    def line(self) -> str:
        """The frame's line, in CSS's words."""
        return "dashed" if self.dashed else "solid"


def frame_of(advantage: float) -> Frame:
    """Return blue and solid above 0, orange and dashed below, grey at 0 (and NaN); the thicker, the further from it."""
    strength = min(abs(advantage), FULL) / FULL
    if advantage == 0 or advantage != advantage:
        return Frame(GREY, False, 0.0)
    return Frame(BLUE, False, strength) if advantage > 0 else Frame(VERMILION, True, strength)


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign, a true minus included: `+1.09`, `−0.31`; none where the digits say 0."""
    sign = "" if round(value, digits) == 0 else "+"
    return f"{abs(value) if not sign else value:{sign}.{digits}f}".replace("-", "\N{MINUS SIGN}")
