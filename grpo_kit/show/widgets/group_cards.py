"""A group as HTML: each sample a card with its framed picture, scores, tinted rewrite and reward parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from grpo_kit.runs.record import RunRecord
from grpo_kit.show.frame import frame_of, signed
from grpo_kit.show.style import FAINT, GREY, INK, format_metric
from grpo_kit.show.widgets.groups import open_image, parts_text
from grpo_kit.show.widgets.markup import escape, grid, picture
from grpo_kit.show.widgets.tokens import DEEPEST, MEASURES, VERMILION_RGB, Token, ends_of_scale, tinted

SIDE = 190  # pixels of a picture
CARD_HEIGHT = 380  # pixels, the gap below included
MAX_TOKENS = 400


def group_cards(
    record: RunRecord, group: pd.DataFrame, measure: str | None, clip: tuple[float, float], columns: int = 4
) -> str:
    """Return the samples of a group as a grid of cards, in the rows' order.

    Args:
        record: the run, which has the pictures.
        group: rows of one of its rollouts.
        measure: what tints the tokens; None shows the rewrites untinted.
        clip: the lowest and highest ratio that is not clipped.
        columns: cards in a row.
    """
    rewrites = [escape(text) for text in group["enhanced_prompt"]]
    if measure is not None:
        rows, _ = tinted(group, measure, clip)
        drawn = zip(rows, group["enhanced_prompt"], strict=True)
        rewrites = [token_spans(tokens) + _told_apart(tokens, text) for tokens, text in drawn]
    mean = group["reward"].mean()
    samples = zip(group.to_dict("records"), rewrites, strict=True)
    return grid([_card(record, row, mean, rewrite) for row, rewrite in samples], columns)


def _card(record: RunRecord, row: Mapping[str, object], mean: float, rewrite: str) -> str:
    frame = frame_of(row["advantage"])
    image = picture(open_image(record, row["thumbnail"]), row["enhanced_prompt"], SIDE, frame)
    colour = frame.colour if row["advantage"] else INK
    advantage = f'<b style="color:{colour};font-size:18px">{signed(row["advantage"])}</b>'
    distance = signed(row["reward"] - mean, 3) if row["reward"] == row["reward"] else "not scored"
    scores = f'<span style="font-size:13px">reward <b>{format_metric("reward", row["reward"])}</b> ({distance})</span>'
    quiet = f"color:{GREY};font-size:12px"
    return (
        f'<div style="height:{CARD_HEIGHT - 18}px;overflow:hidden">{image}'
        f'<div style="margin-top:4px;white-space:nowrap">{advantage} &nbsp;{scores}</div>'
        f'<div style="height:82px;overflow-y:auto;margin:3px 0;line-height:1.5">{rewrite}</div>'
        f'<div style="{quiet};line-height:1.35">{escape(parts_text(row))}</div></div>'
    )


def token_spans(tokens: Sequence[Token]) -> str:
    """Return tokens as text whose background and underline show their tints; each shows its value when pointed at."""
    spans = [_span(token) for token in tokens[:MAX_TOKENS]]
    return f'<span style="white-space:pre-wrap">{"".join(spans)}</span>' + ("…" if len(tokens) > MAX_TOKENS else "")


def _span(token: Token) -> str:
    colour = ",".join(map(str, token.rgb))
    line = "dashed" if token.tint < 0 else "solid"
    edge = f"outline:1.5px solid {INK};" if token.clipped else ""
    style = f"background:rgba({colour},{token.opacity:.2f});border-bottom:2px {line} rgba({colour},{_edge(token):.2f})"
    text = escape(token.text) or "&nbsp;"
    return f'<span title="{token.value:+.4f}" style="{edge}{style}">{text}</span>'


def _edge(token: Token) -> float:
    return min(1.0, 1.6 * abs(token.tint))


def _told_apart(tokens: Sequence[Token], drawn: str) -> str:
    """Return what the generator got, where the tokens do not say it already."""
    if escape(drawn).strip() in escape("".join(token.text for token in tokens), 10_000):
        return ""
    return f'<div style="color:{GREY}">drawn: {escape(drawn)}</div>'


def tint_legend(group: pd.DataFrame, measure: str, clip: tuple[float, float]) -> str:
    """Return how to read the tints: the scale with its ends, and what the underlines and outlines mean."""
    rows, full = tinted(group, measure, clip)
    low, middle, high = ends_of_scale(measure, full)
    above, clear = ",".join(map(str, MEASURES[measure].above)), "rgba(255,255,255,0)"
    start = f"rgba({','.join(map(str, VERMILION_RGB))},{DEEPEST}),{clear}" if low else clear
    scale = f"linear-gradient(to right,{start},rgba({above},{DEEPEST}))"
    box = f"display:inline-block;width:180px;height:14px;vertical-align:-2px;border:1px solid {FAINT}"
    words = "darker: further from the reference"
    if low:
        words = "dashed underline: less likely than before; solid: likelier"
    if measure == "ratio":
        outside = sum(token.clipped for row in rows for token in row)
        words += f"; outlined: outside {clip[0]:g} to {clip[1]:g} ({outside} token{'' if outside == 1 else 's'})"
    return (
        f'<div style="margin-top:6px"><b>{escape(MEASURES[measure].name)}</b> &nbsp;{low or middle} '
        f'<span style="{box};background:{scale}"></span> {high} &nbsp;<span style="color:{GREY}">{words}</span></div>'
    )
