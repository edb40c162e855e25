"""A figure that follows a slider: its frame is drawn once, and then only what changes.

Drawing a whole figure takes some hundred milliseconds, too slow to drag by; what changes alone takes a tenth.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from grpo_kit.show.style import STYLE, Drawing

DPI = 150  # of a live picture: sharp on a projector


class LiveFigure:
    """A figure whose axes stay as they are given, and whose content is drawn again and again by `redrawn`.

    Args:
        figure: with fixed limits, and everything that stays.
    """

    def __init__(self, figure: Drawing) -> None:
        self.figure = figure
        self._changing: list[Artist] = []
        self._canvas = FigureCanvasAgg(figure)
        figure.set_dpi(DPI)
        with mpl.rc_context(STYLE):
            self._canvas.draw()
        self._frame = self._canvas.copy_from_bbox(figure.bbox)

    @contextmanager
    def redrawn(self) -> Iterator[Sequence[Axes]]:
        """Take away what was drawn the last time, and hand over the axes to be drawn into, within their limits."""
        for artist in self._changing:
            artist.remove()
        staying = {artist for axes in self.figure.axes for artist in axes.get_children()}
        with mpl.rc_context(STYLE):
            yield self.figure.axes
        drawn = [artist for axes in self.figure.axes for artist in axes.get_children() if artist not in staying]
        self._changing = sorted(drawn, key=lambda artist: artist.zorder)

    def to_png(self, dpi: int = 100) -> bytes:
        """Return the figure as PNG bytes; quick at `DPI`, drawn whole at any other."""
        if dpi != DPI:
            return self.figure.to_png(dpi)
        self._canvas.restore_region(self._frame)
        with mpl.rc_context(STYLE):
            for artist in self._changing:
                self.figure.draw_artist(artist)
        pixels, stream = np.asarray(self._canvas.buffer_rgba())[..., :3], io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
        return stream.getvalue()
