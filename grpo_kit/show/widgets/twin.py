"""A box of widgets that is also a picture: what readers see where nothing runs (GitHub, nbconvert, the HTML report).

A widget is shown as a bundle of forms, of which each reader takes the best that it knows: JupyterLab the live widget,
all others the picture. nbconvert prefers the live widget too, as long as the notebook holds its state, and the picture
otherwise; the committed notebooks and the report hold no state.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import ipywidgets
from PIL import Image

from grpo_kit.show.style import PAPER, Drawing, plain_text

BUDGET = 110_000  # bytes of a picture, 147 kB as base64: a notebook with several widgets stays small
QUALITIES = (90, 80, 70, 60, 50, 40, 30)


class TwinBox(ipywidgets.VBox):
    """A column of widgets with a static twin; a subclass says what the twin shows."""

    def figures(self) -> list[Drawing]:
        """Return the twin's figures for the present state, from top to bottom."""
        raise NotImplementedError

    def summary(self) -> str:
        """Return the present state in a line: what a terminal or a screen reader gets."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, object]:
        kind, content = encode(self.figures())
        bundle = super()._repr_mimebundle_(**kwargs)
        return bundle | {"text/plain": plain_text(self.summary()), kind: base64.b64encode(content).decode("ascii")}


def encode(figures: Sequence[Drawing]) -> tuple[str, bytes]:
    """Return figures, one below the other, as (MIME type, bytes): the sharpest form that `BUDGET` allows.

    That is PNG, then PNG with 256 colours, which keeps text and flat colours sharp, then JPEG for photographs.
    """
    picture = _stacked([Image.open(io.BytesIO(figure.to_png())).convert("RGB") for figure in figures])
    for exact in (picture, picture.quantize(256, method=Image.Quantize.FASTOCTREE)):
        content = _bytes(exact, "PNG", optimize=True)
        if len(content) <= BUDGET:
            return "image/png", content
    for quality in QUALITIES:
        content = _bytes(picture, "JPEG", quality=quality, subsampling=0)
        if len(content) <= BUDGET:
            break
    return "image/jpeg", content


def _stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    size = max(picture.width for picture in pictures), sum(picture.height for picture in pictures)
    sheet, top = Image.new("RGB", size, PAPER), 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def _bytes(picture: Image.Image, kind: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **settings)
    return stream.getvalue()
