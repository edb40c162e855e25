"""A group as a figure: the same cards as in `group_cards`, for readers without a kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from grpo_kit.runs.record import RunRecord
from grpo_kit.show.frame import frame_of, signed
from grpo_kit.show.images import show_image
from grpo_kit.show.style import GREY, INK, Drawing, bare, format_metric, plain_text, styled, wrap
from grpo_kit.show.widgets.groups import open_image, parts_text
from grpo_kit.show.widgets.tokens import MEASURES, Token, ends_of_scale, tinted

COLUMN, PICTURE, CARD = 2.5, 1.75, 3.15  # inches: a column's width, a picture's side, a card's height
LETTER, LETTER_SIZE = 0.06, 7.176  # inches that a letter of this size takes: six whole pixels, so that none drift
HEAD, FOOT = 0.62, 0.34  # inches above and below the cards
CHARACTERS, LINES = 38, 4  # of the tokens' text


@styled
def group_sheet(
    record: RunRecord, group: pd.DataFrame, title: str, note: str, measure: str | None, clip: tuple[float, float]
) -> Drawing:
    """Draw a group's samples in the rows' order, each framed by its advantage, its tokens tinted by `measure`."""
    columns = min(4, len(group))
    rows = -(-len(group) // columns)
    figure = Drawing(figsize=(COLUMN * columns, HEAD + CARD * rows + FOOT))
    _head(figure, title, note)
    tokens, full = tinted(group, measure, clip) if measure is not None else ([[]] * len(group), 0.0)
    for place, (row, texts) in enumerate(zip(group.to_dict("records"), tokens, strict=True)):
        corner = COLUMN * (place % columns), FOOT + CARD * (rows - 1 - place // columns)
        _draw_card(figure, corner, record, row, texts)
    if measure is not None:
        figure.text(0.012, 0.1 / figure.get_figheight(), _reading(measure, full, clip), fontsize=8, color=GREY)
    return figure


def _head(figure: Drawing, title: str, note: str) -> None:
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.1 / height, plain_text(title, 100), va="top", fontsize=11.5, weight="bold")
    figure.text(0.012, 1 - 0.35 / height, plain_text(note, 160), va="top", fontsize=9, color=GREY)


def _axes(figure: Drawing, left: float, bottom: float, width: float, height: float) -> Axes:
    """Return bare axes at a place in inches."""
    across, up = figure.get_size_inches()
    return bare(figure.add_axes((left / across, bottom / up, width / across, height / up)))


def _draw_card(
    figure: Drawing, corner: tuple[float, float], record: RunRecord, row: Mapping[str, object], tokens: Sequence[Token]
) -> None:
    left, bottom = corner
    frame = frame_of(row["advantage"])
    axes = _axes(figure, left + 0.12, bottom + CARD - PICTURE - 0.28, PICTURE, PICTURE)
    show_image(axes, open_image(record, row["thumbnail"]), frame.colour, frame.points)
    for spine in axes.spines.values():
        spine.set_linestyle((0, (2.2, 0.9)) if frame.dashed else "-")
    scores = f"reward {format_metric('reward', row['reward'])}   "
    axes.set_title(scores + signed(row["advantage"]), color=frame.colour if row["advantage"] else INK, pad=6)
    words = _axes(figure, left + 0.1, bottom + 0.05, CHARACTERS * LETTER, CARD - PICTURE - 0.42)
    words.set(xlim=(0, CHARACTERS), ylim=(LINES + 3.0, 0))
    if tokens:
        draw_tokens(words, tokens)
    else:
        words.text(0, 0.1, wrap(row["enhanced_prompt"], CHARACTERS, LINES), va="top", fontsize=8)
    parts = parts_text(row)
    words.text(0, LINES + 0.15, wrap(parts, 46, 3), va="top", fontsize=7, color=GREY, linespacing=1.3)


def draw_tokens(axes: Axes, tokens: Sequence[Token]) -> None:
    """Write tokens in a typewriter face, each on its tint; what does not fit in `LINES` lines ends with an ellipsis."""
    column, line = 0, 0
    for token in tokens:
        text = token.text[:CHARACTERS]
        if column + len(text) > CHARACTERS:
            column, line = 0, line + 1
            text = text.lstrip() or text
        if line == LINES:
            axes.text(CHARACTERS, LINES - 0.5, "…", fontsize=8, va="center")
            return
        _draw_token(axes, token, text, column, line)
        column += len(text)


def _draw_token(axes: Axes, token: Token, text: str, column: int, line: int) -> None:
    colour = tuple(channel / 255 for channel in token.rgb)
    face, edge = (*colour, token.opacity), INK if token.clipped else "none"
    axes.add_patch(Rectangle((column, line + 0.08), len(text), 0.84, facecolor=face, edgecolor=edge, lw=0.8))
    style = (0, (2, 1)) if token.tint < 0 else "-"
    ends = [column + 0.1, column + len(text) - 0.1], [line + 0.92, line + 0.92]
    axes.plot(*ends, color=(*colour, min(1.0, 1.6 * abs(token.tint))), lw=1.1, ls=style)
    axes.text(column, line + 0.5, text, fontsize=LETTER_SIZE, family="DejaVu Sans Mono", va="center")


def _reading(measure: str, full: float, clip: tuple[float, float]) -> str:
    low, _, high = ends_of_scale(measure, full)
    name = MEASURES[measure].name
    if not low:
        return f"Tint: {name}, darkest at {high} and above."
    ends = f"orange, dashed below: less likely, fullest at {low}; blue, solid: likelier, fullest at {high}"
    outline = f"; outlined: outside {clip[0]:g} to {clip[1]:g}" if measure == "ratio" else ""
    return f"Tint: {name}; {ends}{outline}."
