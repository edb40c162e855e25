"""How controls stand on a page."""

from __future__ import annotations

from collections.abc import Iterable

import ipywidgets


def side_by_side(children: Iterable[ipywidgets.Widget], **layout: str) -> ipywidgets.HBox:
    """Return widgets in a row, with room between them, that goes on in the next line where the page is narrow."""
    spaced = ipywidgets.Layout(flex_flow="row wrap", grid_gap="4px 14px", **layout)
    return ipywidgets.HBox(list(children), layout=spaced)


def wide(pixels: int) -> ipywidgets.Layout:
    """Return a layout of a fixed width."""
    return ipywidgets.Layout(width=f"{pixels}px")
