"""One look for every figure: colours, markers, names for people, and a figure that shows itself in a notebook.

The colours are Okabe and Ito's (distinct for colour-blind readers); each variant also has its own marker and lightness,
so that a black-and-white print stays readable. Figures are built with matplotlib's object interface and never enter
pyplot's registry: nothing leaks over a long session, and no backend has to be chosen.
"""

import io
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from PIL import Image

from grpo_kit.evaluation.table import format_metric, number_text
from grpo_kit.show.fonts import drawable, use_fonts

STYLE = mpl.rc_params_from_file(Path(__file__).with_name("figures.mplstyle"), use_default_template=False)
INK, GREY, FAINT, PAPER = (STYLE[key] for key in ("text.color", "axes.edgecolor", "grid.color", "figure.facecolor"))
BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8f4e8b"
HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps a label readable on a line
DASHED = (0, (4, 2))
_SERIES = tuple(zip((BLUE, VERMILION, GREEN, PURPLE, ORANGE, INK), "oD^svP", strict=True))  # colours and markers
_LINES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MOST_SERIES = len(_SERIES) * len(_LINES)
VARIANT_COLOURS = {"raw": GREY, "initial": ORANGE, "trained": BLUE, "oracle": GREEN}
_VARIANT_MARKERS = {"raw": "o", "initial": "s", "trained": "D", "oracle": "^"}
FULL = 2.0  # the advantage from which a frame no longer grows

# Runs a drawing function under the kit's style; the caller's own matplotlib settings stay as they are.
styled = mpl.rc_context(STYLE)


class Drawing(Figure):
    """A matplotlib figure that a notebook shows by itself, whatever the backend, and that saves in the kit's style.

    What `alt` says stands in a page in the place of the picture, for those who cannot see it.
    """

    alt: str = ""

    @styled
    def savefig(self, fname: object, **kwargs: object) -> None:
        """Save as matplotlib does, under the kit's style (ticks are made as late as here)."""
        own = findfont(FontProperties())
        for axis in (axis for axes in self.axes for axis in (axes.xaxis, axes.yaxis)):
            names = [name.get_text() for name in axis.get_ticklabels()]
            kept = [drawable(name, own) for name in names]
            if kept != names:
                axis.set_ticks(axis.get_ticklocs(), labels=kept)
        use_fonts(self.findobj(Text))
        super().savefig(fname, **kwargs)

    def to_png(self, dpi: int = 100) -> bytes:
        """Return the figure as PNG bytes."""
        return self._encode("png", dpi=dpi)

    def to_svg(self) -> bytes:
        """Return the figure as SVG bytes, without a date, so that equal figures are equal bytes."""
        return self._encode("svg", metadata={"Date": None})

    def save(self, path: Path, dpi: int = 160) -> Path:
        """Write the figure to `path` (the ending decides the format) and return the path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.savefig(path, dpi=dpi)
        return path

    def _encode(self, kind: str, **kwargs: object) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format=kind, **kwargs)
        return stream.getvalue()

    def _repr_png_(self) -> bytes | tuple[bytes, dict[str, str]]:
        return (self.to_png(), {"alt": self.alt}) if self.alt else self.to_png()


def image_bytes(image: Image.Image, kind: str, **settings: object) -> bytes:
    """Return a picture as the bytes of a file of that kind; `settings` are those of Pillow."""
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


# --- parts of figures -------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Drawing:
    """Return an empty figure of that many inches whose parts arrange themselves."""
    return Drawing(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.07))


def panel_grid(figure: Drawing, count: int, columns: int = 0, **kwargs: object) -> list[Axes]:
    """Return `count` panels, `columns` in a row (0: all of them); further arguments as of `Figure.subplots`."""
    columns = min(columns, count) or count
    panels = list(figure.subplots(-(-count // columns), columns, squeeze=False, **kwargs).flatten())
    for unused in panels[count:]:
        unused.set_visible(False)
    return panels[:count]


def bare(axes: Axes) -> Axes:
    """Take ticks, grid and frame from `axes` and return it."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return axes


def label(axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **kwargs: object) -> None:
    """Write `text` at a point of the data, `offset` printer's points away from it."""
    axes.annotate(text, point, xytext=offset, textcoords="offset points", path_effects=HALO, **kwargs)


def explain(axes: Axes, title: str, note: str) -> None:
    """Write a panel's title, and below it in grey how to read the panel."""
    axes.set_title(title, pad=18)
    look = dict(color=GREY, fontsize=8.5)
    axes.annotate(note, (0, 1), xytext=(0, 5), xycoords="axes fraction", textcoords="offset points", **look)


def series_look(number: int) -> dict[str, object]:
    """Return colour, marker and line of a series by its number from 0; the first `MOST_SERIES` all differ."""
    colour, marker = _SERIES[number % len(_SERIES)]
    line = _LINES[(number + number // len(_SERIES)) % len(_LINES)]
    return {"color": colour, "marker": marker, "linestyle": line}


def variant_look(variant: str) -> dict[str, str]:
    """Return colour and marker of a variant; saved runs, which have no look of their own, share one."""
    return {"color": VARIANT_COLOURS.get(variant, INK), "marker": _VARIANT_MARKERS.get(variant, "o")}


def frame_of(advantage: float | None) -> dict[str, object]:
    """Return how a picture's frame is drawn: its sign can be told in colour and in black and white, its size by width.

    Blue and solid above 0, orange and dashed below, grey at 0 (and NaN), faint where there is no advantage.
    """
    width = 1.2 + 4.4 * min(abs(advantage or 0.0), FULL) / FULL
    if advantage is None:
        colour, width, line = FAINT, 1.0, "-"
    elif advantage > 0:
        colour, line = BLUE, "-"
    elif advantage < 0:
        colour, line = VERMILION, (0, (2.2, 0.9))
    else:
        colour, width, line = GREY, 1.2, "-"
    return {"edgecolor": colour, "linewidth": width, "linestyle": line, "capstyle": "butt"}


def legend_above(figure: Drawing, looks: Mapping[str, Mapping[str, object]], columns: int) -> None:
    """Write above the panels what the looks of lines or points stand for."""
    handles = [Line2D([], [], label=plain_text(name, 60), ms=7, **look) for name, look in looks.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False)


# --- texts ------------------------------------------------------------------------------------------------------------


def plain_text(text: object, limit: int = 400) -> str:
    """Return `text` as any font can lay it out: no control characters, no half ones, at most `limit` cells wide."""
    one_line = str(text)[: limit + 1].replace("\n", " ").replace("\t", " ")
    unprintable = {c for c in one_line if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn")}
    clean = "".join("\N{REPLACEMENT CHARACTER}" if c in unprintable else c for c in one_line)
    return clean if cells(clean) <= limit else _ended(clean, limit)


def cells(text: str) -> int:
    """Return how many columns of a terminal, or letters of a figure, a text takes: East Asian ones and emoji two."""
    return len(text) + sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def _ended(text: str, width: int) -> str:
    """What of a text leaves a cell of `width` for the ellipsis."""
    ends = accumulate(map(cells, text))
    return text[: sum(end < width for end in ends)].rstrip() + "…"


def wrap(text: object, width: int, lines: int) -> str:
    """Return `text` broken to `lines` lines of at most `width` cells, the rest cut with an ellipsis."""
    wide = ["".join(c + "\0" * (cells(c) - 1) for c in plain_text(line)) for line in str(text).split("\n")]
    broken = [part.replace("\0", "") for line in wide for part in textwrap.wrap(line, width) or [""]]
    if len(broken) > lines:
        broken = [*broken[: lines - 1], _ended(broken[lines - 1], width)]
    return "\n".join(broken)


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign, a true minus included: `+1.09`, `−0.31`; none where the digits say 0."""
    return number_text(value, f"+.{digits}f") if round(value, digits) else f"{abs(value):.{digits}f}"


def score_text(row: Mapping[str, float]) -> str:
    """Return one picture's scores, short: `reward 0.301 · gold 25 %`."""
    scores = [f"reward {format_metric('reward', row['reward'])}"]
    if row.get("gold") is not None and row["gold"] == row["gold"]:
        scores.append(f"gold {100 * row['gold']:.0f}\N{NO-BREAK SPACE}%")
    return " · ".join(scores)


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table of texts, each column as wide as its widest cell."""
    widths = [max(map(cells, column)) for column in zip(*table, strict=True)]
    padded = [[cell + " " * (width - cells(cell)) for cell, width in zip(row, widths, strict=True)] for row in table]
    return ["  ".join(row).rstrip() for row in padded]
