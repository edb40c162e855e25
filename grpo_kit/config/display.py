"""How the kit's objects show themselves: one line of text, and in a notebook HTML, a table or a few pictures.

The HTML runs nothing, fetches nothing and needs no widget state. Every text in it is escaped and cut, pictures are
small JPEG files inside it, and rows beyond the first are counted.
"""

import base64
import dataclasses
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence

from grpo_kit.config.errors import printable

LINE = 200  # characters of a repr, and of a cell
ROWS = 40  # of a table; what comes after them is counted
GROUPS, _SAMPLES = 4, 8  # groups of a rollout, samples of a group
_JOINERS = "\u200c\u200d"  # inside words of Persian and Hindi, and inside emoji
_SIDE = 128  # pixels of a picture's longer side, and how wide a smaller one is shown
_CELL = 'style="text-align:left;vertical-align:top;padding:3px 10px 3px 0;max-width:32em;overflow-wrap:break-word"'


class Html(str):
    """Text that is HTML already."""


def brief(value: object) -> str:
    """A value in a few characters: a text as it is, a number with 4 digits, a collection by its size."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping) and 0 < len(value) < 4:
        return ", ".join(f"{name}: {brief(one)}" for name, one in value.items())
    if isinstance(value, Mapping | Sequence | set) and not isinstance(value, str | bytes):
        return ", ".join(map(brief, value)) if 0 < len(value) < 4 else f"{len(value):,} items"
    if hasattr(value, "iloc"):  # a data frame
        return f"{len(value):,} rows"
    return cut(str(value))


def cut(text: str, limit: int = LINE) -> str:
    """`text` on one line that only shows, at most `limit` characters of it."""
    text = "".join(c if c in _JOINERS else printable(c) for c in text[: limit + 1].replace("\n", " "))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def line(name: str, parts: Mapping[str, object]) -> str:
    """`Name(part=value, …)` in at most `LINE` characters."""
    return cut(f"{name}({', '.join(f'{part}={brief(value)}' for part, value in parts.items())}", LINE - 1) + ")"


class Shown:
    """An object that shows itself in one line, and in a notebook as a table; `_shown` says with what."""

    def _shown(self) -> Mapping[str, object]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.repr}

    def __repr__(self) -> str:
        return line(type(self).__name__, self._shown())

    def _repr_html_(self) -> str:
        return table(type(self).__name__, self._shown().items())


def cell(value: object, limit: int = LINE) -> Html:
    """A value as HTML that shows exactly this text; what is HTML already stays."""
    return value if isinstance(value, Html) else Html(html.escape(cut(brief(value), limit), quote=True))


def table(
    title: object, rows: Iterable[Sequence[object]], header: Sequence[object] = (), note: object = "", most: int = ROWS
) -> Html:
    """A table below its title, with at most `most` rows; a note below it."""
    rows = list(rows)
    left = f"and {len(rows) - most:,} more" if len(rows) > most else ""
    head = f"<tr>{''.join(f'<th {_CELL}>{cell(name)}</th>' for name in header)}</tr>" if header else ""
    body = "".join(f"<tr>{''.join(f'<td {_CELL}>{cell(value)}</td>' for value in row)}</tr>" for row in rows[:most])
    below = "".join(f"<div>{cell(text)}</div>" for text in (left, note) if text)
    return Html(
        f'<div style="overflow-x:auto"><div><b>{cell(title)}</b></div>'
        f'<table style="border-collapse:collapse">{head}{body}</table>{below}</div>'
    )


def picture(image: object, edge: str = "none") -> Html:
    """A picture as a small JPEG inside the page, with an edge such as "3px solid #0072b2"; what is none is said.

    What is no picture but shows itself, a film or a sound, does so.
    """
    if isinstance(image, Shown):
        return Html(f'<div style="width:{_SIDE}px;border:{edge}">{image._repr_html_()}</div>')
    try:
        small = image.convert("RGB")
        small.thumbnail((_SIDE, _SIDE))
        small.save(stream := io.BytesIO(), "JPEG", quality=80)
    except (AttributeError, OSError, ValueError):  # None, or what a generator of one's own gives
        return cell("no picture")
    content = base64.b64encode(stream.getvalue()).decode("ascii")
    size = max(1, _SIDE * small.width // max(small.size)), max(1, _SIDE * small.height // max(small.size))
    look = f"max-width:none;border:{edge}" + ";image-rendering:pixelated" * (max(image.size) < _SIDE)
    inner = f'width="{size[0]}" height="{size[1]}" style="{look}" src="data:image/jpeg;base64,{content}"'
    return Html(f'<img alt="" {inner}>')


def group_table(
    prompt: str, samples: Iterable[tuple[object, str]], rewards: Iterable[float], advantages: Iterable[float]
) -> Html:
    """A group, best reward first: each sample's picture, framed as its advantage says, its numbers and its text."""
    rows = zip(samples, map(float, rewards), map(float, advantages), strict=True)
    order = sorted(rows, key=lambda row: -math.inf if math.isnan(row[1]) else row[1], reverse=True)
    some = order if len(order) <= _SAMPLES else order[: _SAMPLES // 2] + order[-_SAMPLES // 2 :]
    left = f"the best and the worst {_SAMPLES // 2} of {len(order):,}" if len(some) < len(order) else ""
    cells = []
    for (image, text), reward, advantage in some:
        edge = "3px solid #0072b2" if advantage > 0 else "3px dashed #d55e00" if advantage < 0 else "1px solid #6a737d"
        numbers = f"reward {reward:.3f}, advantage {advantage:+.2f}".replace("-", "−")
        cells.append((picture(image, edge), "no reward" if math.isnan(reward) else numbers, cell(text, 120)))
    columns = 4 if len(cells) % 4 == 0 else 6
    parts = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    return table(f"“{cut(prompt, 120)}”", [row for part in parts for row in zip(*part, strict=True)], note=left)
