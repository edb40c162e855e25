"""Cards: pictures, each with its numbers above and its text below, in rows on one sheet."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from grpo_kit.config.media import Medium, thumbnail
from grpo_kit.show.images import COLUMNS, SMOOTH_FROM
from grpo_kit.show.style import GREY, INK, Drawing, bare, cells, frame_of, plain_text, styled, wrap
from grpo_kit.show.widgets.tokens import Token

WIDTH = 11.4  # inches of a sheet, and below: of its head, a card's title, a line of text, a line of its note
HEAD, TITLE, LINE, NOTE = 0.75, 0.36, 0.2, 0.175
LARGEST = 2.05  # inches of a picture's longer side
GAP = 0.12
LETTER, LETTER_SIZE = 0.08, 9.57  # inches that a letter of a token takes, and its size in points: whole pixels
DEEPEST = 0.55  # opacity of the strongest tint: dark text stays readable on it


@dataclass(frozen=True)
class Card:
    """A picture, or one that stands for a film or a sound (None: there is none), and the plain texts around it.

    `title` stands above on the left, `beside` on the right; `tokens`, or else `text`, below, and then a grey `note`.
    An `advantage` frames the picture and colours the title, which otherwise has `colour`.
    """

    image: Medium | None
    title: str
    beside: str = ""
    text: str = ""
    tokens: Sequence[Token] = ()
    note: str = ""
    advantage: float | None = None
    colour: str = INK


@styled
def card_sheet(
    cards: Sequence[Card],
    columns: int,
    lines: Sequence[int],
    title: str = "",
    note: str = "",
    note_lines: int = 0,
    foot: float = 0.0,
) -> Drawing:
    """Draw cards in rows, from left to right, from top to bottom, below the sheet's title and note.

    The size depends on the other arguments alone, so that sheets can take each other's place.

    Args:
        cards, columns: all cards, and how many stand in a row.
        lines: for each row, how many lines its texts have; the rest of a text is cut with an ellipsis.
        note_lines: lines of each card's note.
        foot: inches that stay free at the bottom; the figure's only axes measure inches from the upper left corner.
    """
    column = WIDTH / columns
    side = min(LARGEST, column - 2 * GAP)
    heights = [TITLE + side + 2 * GAP + LINE * count + NOTE * note_lines for count in lines]
    height = HEAD * bool(title) + sum(heights) + foot + GAP
    figure = Drawing(figsize=(WIDTH, height))
    axes = bare(figure.add_axes((0, 0, 1, 1)))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    if title:
        axes.text(GAP, 0.12, plain_text(title, 100), va="top", fontsize=13, weight="bold")
        axes.text(GAP, 0.42, plain_text(note, 150), va="top", fontsize=10.5, color=GREY)
    for place, card in enumerate(cards[: columns * len(lines)]):
        row = place // columns
        corner = GAP + column * (place % columns), HEAD * bool(title) + sum(heights[:row])
        _draw_card(axes, card, corner, side, column - 1.5 * GAP, lines[row])
    return figure


def _draw_card(axes: Axes, card: Card, corner: tuple[float, float], side: float, width: float, lines: int) -> None:
    left, top = corner
    frame = frame_of(card.advantage)
    colour = frame["edgecolor"] if card.advantage else card.colour
    axes.text(left, top + TITLE - 0.11, plain_text(card.title, 40), fontsize=12.5, weight="bold", color=colour)
    axes.text(left + width, top + TITLE - 0.11, card.beside, ha="right", fontsize=10.5)
    top += TITLE
    size = side, side
    if card.image is None:
        axes.text(left + side / 2, top + side / 2, "no picture", ha="center", va="center", color=GREY)
    else:
        image = thumbnail(card.image, COLUMNS)
        size = [side * pixels / max(image.size) for pixels in image.size]
        smoothing = "nearest" if image.width < SMOOTH_FROM else "antialiased"
        place = (left, left + size[0], top + size[1], top)
        axes.imshow(image, extent=place, aspect="auto", interpolation=smoothing)
    axes.add_patch(Rectangle((left, top), *size, fill=False, **frame))
    top += side + GAP
    if lines and card.tokens:
        _draw_tokens(axes, card.tokens, left, top, int(width / LETTER), lines)
    elif lines:
        text = wrap(card.text, int(width / 0.078), lines)
        axes.text(left, top, text, va="top", fontsize=9.8, linespacing=1.25, clip_on=True)
    note = wrap(card.note, int(width / 0.071), 9)
    axes.text(left, top + LINE * lines, note, va="top", fontsize=9.2, color=GREY, linespacing=1.25)


def _draw_tokens(axes: Axes, tokens: Sequence[Token], left: float, top: float, characters: int, lines: int) -> None:
    """Write tokens in a typewriter face, each on its tint; what does not fit ends with an ellipsis."""
    column, line = 0, 0
    for token in tokens:
        text = token.text[:characters]
        if column + cells(text) > characters:
            column, line = 0, line + 1
            text = text.lstrip() or text
        if line == lines:
            axes.text(left + LETTER * characters, top + LINE * (lines - 0.5), "…", va="center", ha="right")
            return
        x, y, width, depth = left + LETTER * column, top + LINE * line, LETTER * cells(text), abs(token.tint)
        if token.clipped or depth > 0.04:
            edge = INK if token.clipped else "none"
            box = dict(facecolor=(token.colour, DEEPEST * depth), edgecolor=edge, linewidth=0.9)
            axes.add_patch(Rectangle((x, y + 0.02), width, LINE - 0.03, **box))
            stroke = dict(color=token.colour, alpha=min(1.0, 1.6 * depth), linewidth=1.3)
            ends = [x + 0.01, x + width - 0.01], [y + LINE - 0.015] * 2
            axes.plot(*ends, linestyle=(0, (2, 1)) if token.tint < 0 else "-", **stroke)
        axes.text(x, y + LINE / 2, text, fontsize=LETTER_SIZE, family="DejaVu Sans Mono", va="center")
        column += cells(text)
