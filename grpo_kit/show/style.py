"""One look for every figure: colours, markers, names for people, and a figure that shows itself in a notebook.

The colours are Okabe and Ito's (distinct for colour-blind readers); each variant also has its own marker and lightness,
so that a black-and-white print stays readable. Figures are built with matplotlib's object interface and never enter
pyplot's registry: nothing leaks over a long session, and no backend has to be chosen.
"""

from __future__ import annotations

import functools
import io
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ParamSpec, TypeVar

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, GREY, FAINT, PAPER = "#1b1f24", "#6a737d", "#d5dae0", "#ffffff"
BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8f4e8b"

VARIANTS = ("raw", "initial", "trained", "oracle")
VARIANT_NAMES = {
    "raw": "raw prompt",
    "initial": "initial policy",
    "trained": "trained policy",
    "oracle": "oracle rewrite",
}
VARIANT_COLOURS = {"raw": GREY, "initial": ORANGE, "trained": BLUE, "oracle": GREEN}
VARIANT_MARKERS = {"raw": "o", "initial": "s", "trained": "D", "oracle": "^"}

METRIC_NAMES = {
    "reward": "reward",
    "gold": "gold check",
    "keeps_objects": "keeps the objects",
    "grammatical": "grammatical",
    "clip_similarity": "CLIP similarity",
    "gain": "gain over the raw prompt",
    "consistency": "agrees with its rewrite",
    "image_quality": "image quality",
    "meaning_kept": "keeps the meaning",
    "jpeg_size": "JPEG size",
}
SHARES = frozenset({"gold", "keeps_objects", "grammatical"})  # metrics in 0..1 that people read as per cent

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture on every machine
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a user's "$\frac{$" is text
    "text.usetex": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": PAPER,
    "figure.dpi": 110,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",
    "svg.hashsalt": "grpo_kit",  # equal data give equal bytes
}

P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function under the kit's style; the caller's own matplotlib settings stay as they are."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


class Drawing(Figure):
    """A matplotlib figure that a notebook shows by itself, whatever the backend, and that saves in the kit's style."""

    def savefig(self, fname: object, **kwargs: object) -> None:
        """Save as matplotlib does, under the kit's style (ticks are made as late as here)."""
        with mpl.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing")  # drawn as a box: that says it
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

    def _repr_png_(self) -> bytes:
        return self.to_png()


def new_figure(width: float, height: float) -> Drawing:
    """Return an empty figure of that many inches whose parts arrange themselves."""
    return Drawing(figsize=(width, height), layout="constrained")


def plain_text(text: object, limit: int = 400) -> str:
    """Return `text` as any font can lay it out: no control characters or lone surrogates, at most `limit` long."""
    clean = "".join(_printable(character) for character in str(text)[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 1].rstrip() + "…"


def _printable(character: str) -> str:
    category = unicodedata.category(character)
    if character in "\n\t":
        return " "
    return "\N{REPLACEMENT CHARACTER}" if category in ("Cc", "Cs", "Co", "Cn") else character


def metric_name(metric: str) -> str:
    """Return what people call a metric."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def format_metric(metric: str, value: float | None, signed: bool = False) -> str:
    """Return a value as people read it: shares as per cent (differences as points), the rest with 3 digits."""
    if value is None or value != value:
        return "–"
    sign = "+" if signed else ""
    if metric in SHARES:
        return f"{100 * value:{sign}.1f}".replace("-", "−") + ("" if signed else " %")
    return f"{value:{sign}.3f}".replace("-", "−")


def score_text(row: Mapping[str, float]) -> str:
    """Return one picture's scores, short: `reward 0.301 · gold 25 %`."""
    scores = [f"reward {format_metric('reward', row['reward'])}"]
    if row.get("gold") is not None and row["gold"] == row["gold"]:
        scores.append(f"gold {100 * row['gold']:.0f}\N{NO-BREAK SPACE}%")
    return " · ".join(scores)


def bare(axes: Axes) -> Axes:
    """Take ticks, grid and frame from `axes` and return it."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes
