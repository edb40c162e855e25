"""A figure that follows a slider: its frame is drawn once, and then only what moves.

Drawing a whole figure takes some hundred milliseconds, too slow to drag by; its moving parts alone take a tenth.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from grpo_kit.show.style import STYLE, Drawing

DPI = 150  # sharp on a projector


class LiveFigure:
    """A figure and its moving artists, which must lie inside its axes.

    Args:
        figure: drawn, with fixed limits; its layout is not arranged again.
        moving: what changes between two pictures.
    """

    def __init__(self, figure: Drawing, moving: Iterable[Artist]) -> None:
        self.figure = figure
        self._moving = list(moving)
        for artist in self._moving:
            artist.set_animated(True)  # left out of the frame, but not out of a saved figure
        self._canvas = FigureCanvasAgg(figure)
        figure.set_dpi(DPI)
        with mpl.rc_context(STYLE):
            self._canvas.draw()
        self._frame = self._canvas.copy_from_bbox(figure.bbox)

    def png(self) -> bytes:
        """Return the figure with its moving artists where they are now."""
        self._canvas.restore_region(self._frame)
        with mpl.rc_context(STYLE):
            for artist in self._moving:
                self.figure.draw_artist(artist)
        pixels, stream = np.asarray(self._canvas.buffer_rgba())[..., :3], io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
        return stream.getvalue()
