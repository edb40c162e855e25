"""How a picture is framed: the sign and size of its advantage, readable in colour and in black and white."""

from typing import NamedTuple

from grpo_kit.evaluation.table import number_text
from grpo_kit.show.style import BLUE, GREY, VERMILION

FULL = 2.0  # the advantage from which a frame no longer grows
DASHES = (0, (2.2, 0.9))


class Frame(NamedTuple):
    """A frame's colour, its width in points and matplotlib's line style."""

    colour: str
    width: float
    line: str | tuple


def frame_of(advantage: float) -> Frame:
    """Return blue and solid above 0, orange and dashed below, grey at 0 (and NaN); the wider, the further from it."""
    if advantage == 0 or advantage != advantage:
        return Frame(GREY, 1.2, "-")
    width = 1.2 + 4.4 * min(abs(advantage), FULL) / FULL
    return Frame(BLUE, width, "-") if advantage > 0 else Frame(VERMILION, width, DASHES)


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign, a true minus included: `+1.09`, `−0.31`; none where the digits say 0."""
    return number_text(value, f"+.{digits}f") if round(value, digits) else f"{abs(value):.{digits}f}"
