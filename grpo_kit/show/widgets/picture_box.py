"""A widget that is also a picture: what readers see where nothing runs (GitHub, nbconvert, the HTML report).

A notebook shows a widget in several forms, of which each reader takes the best that it knows: JupyterLab the live
widget (nbconvert too, where the notebook holds its state; ours hold none), all others the static twin: the same
pictures. At the end of this file stand the controls, each with the width and the label that it has everywhere.
"""

import base64
import html
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import ipywidgets
import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from grpo_kit.show.fonts import use_fonts
from grpo_kit.show.style import INK, PAPER, STYLE, Drawing, image_bytes, plain_text, styled

DPI = 150  # of a live picture: sharp on a projector; its twin has 100
BUDGET = 110_000  # bytes of a static twin, 147 kB as base64: a notebook with several widgets stays small
QUALITIES = (90, 80, 70, 60, 50, 40, 30)
MOST_WORDS = 2000  # characters of a paragraph and of an alt text
PAGE = dict(width="100%", max_width="1140px")  # of what is as wide as the page
DRAWING = threading.RLock()  # matplotlib's settings are shared by all threads


class LiveFigure:
    """A figure with fixed limits that follows a slider: what stays is drawn once, the rest again by `redrawn`.

    Drawing a whole figure takes some hundred milliseconds, too slow to drag by; what changes alone takes a tenth.
    """

    @styled
    def __init__(self, figure: Drawing) -> None:
        self.figure = figure
        self._changing: list[Artist] = []
        self._canvas = FigureCanvasAgg(figure)
        figure.set_dpi(DPI)
        use_fonts(figure.findobj(Text))
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
        use_fonts(artist for artist in drawn if isinstance(artist, Text))
        self._changing = sorted(drawn, key=lambda artist: artist.zorder)

    @styled
    def to_png(self, dpi: int = 100) -> bytes:
        """Return the figure as PNG bytes; quick at `DPI`, drawn whole at any other."""
        if dpi != DPI:
            return self.figure.to_png(dpi)
        self._canvas.restore_region(self._frame)
        for artist in self._changing:
            self.figure.draw_artist(artist)
        pixels = np.asarray(self._canvas.buffer_rgba())[..., :3]
        return image_bytes(Image.fromarray(pixels), "PNG", compress_level=1)


class PictureBox(ipywidgets.VBox):
    """Controls, a number of pictures that they change, and below them what the pictures show in words.

    A subclass says what is drawn (`figures`) and what that shows (`reading`), and calls `redraw` after a change.
    JupyterLab may call a widget from two threads at once, one of which draws while the other waits.
    """

    _on_hold = True  # until the pictures are made

    def __init__(self, controls: Sequence[ipywidgets.Widget] = (), pictures: int = 1) -> None:
        self.pictures = [ipywidgets.Image(format="png", layout=PAGE) for _ in range(pictures)]
        self.words = ipywidgets.HTML(layout=dict(min_height="46px"))
        self._whole = ipywidgets.HTML(layout=dict(max_height="400px"))
        self.folded = ipywidgets.Accordion([self._whole], titles=["as text"], layout=PAGE)
        super().__init__([*controls, *self.pictures, self.words, self.folded])
        self._on_hold = False
        self.redraw()

    def figures(self) -> Sequence[Drawing | LiveFigure]:
        """Return one figure a picture for the present state."""
        raise NotImplementedError

    def reading(self) -> list[str]:
        """Return what the pictures show in words, a text a paragraph; all but the first are folded away."""
        raise NotImplementedError

    def redraw(self) -> None:
        """Show the present state."""
        if not self._on_hold:
            with DRAWING:
                self.draw()

    def draw(self) -> None:
        """Draw the pictures and write the words for the present state."""
        for picture, figure in zip(self.pictures, self.figures(), strict=True):
            picture.value = figure.to_png(DPI)
        self.write(self.reading())

    def write(self, texts: Sequence[str]) -> None:
        """Write these words below the pictures, all but the first folded away."""
        self.words.value, self._whole.value = paragraphs(texts[:1]), paragraphs(texts[1:])
        self.folded.layout.display = None if len(texts) > 1 else "none"

    @contextmanager
    def drawn_once(self) -> Iterator[None]:
        """Change several controls, then draw once."""
        held, self._on_hold = self._on_hold, True
        try:
            yield
        finally:
            self._on_hold = held
        self.redraw()

    def _repr_mimebundle_(self, **kwargs: object) -> tuple[dict[str, object], dict[str, object]]:
        """Return the live widget, its static twin and its words, and the twin's alt text as metadata."""
        boxes = [self, *(child for child in self.children if isinstance(child, PictureBox))]
        with DRAWING:
            kind, content = encode([figure for box in boxes for figure in box.figures()])
        readings = [box.reading() for box in boxes]
        line = f"{type(self).__name__}: {' '.join(first for first, *_ in readings)}"
        alt = " · ".join(text for texts in readings for text in texts)
        forms = super()._repr_mimebundle_(**kwargs)
        forms |= {"text/plain": plain_text(line), kind: base64.b64encode(content).decode("ascii")}
        return forms, {kind: {"alt": plain_text(alt, MOST_WORDS)}}


def escape(text: object, limit: int = MOST_WORDS) -> str:
    """Return `text` as HTML that shows exactly these characters; control characters and the rest beyond `limit` go.

    A widget's HTML is not cleaned by Jupyter: a prompt that reached it as it is could run code on the reader's machine.
    """
    return html.escape(plain_text(text, limit), quote=True)


def paragraphs(texts: Sequence[str]) -> str:
    """Return plain texts as HTML, one below the other, on white paper as the figures are."""
    style = f"font-size:15px;line-height:1.4;color:{INK};background:{PAPER};padding:4px 8px"
    return "".join(f'<div style="{style}">{escape(text)}</div>' for text in texts)


def encode(figures: Sequence[Drawing | LiveFigure]) -> tuple[str, bytes]:
    """Return figures, one below the other, as (MIME type, bytes): the sharpest form that `BUDGET` allows.

    That is PNG, then PNG with 256 colours, which keeps text and flat colours sharp, then JPEG for photographs.
    """
    pictures = [Image.open(io.BytesIO(figure.to_png())).convert("RGB") for figure in figures]
    size = max(picture.width for picture in pictures), sum(picture.height for picture in pictures)
    stacked, top = Image.new("RGB", size, PAPER), 0
    for picture in pictures:
        stacked.paste(picture, (0, top))
        top += picture.height
    flat = stacked.quantize(256, method=Image.Quantize.FASTOCTREE)
    forms = [(picture, "PNG", dict(optimize=True)) for picture in (stacked, flat)]
    forms += [(stacked, "JPEG", dict(quality=quality, subsampling=0)) for quality in QUALITIES]
    for picture, kind, settings in forms:
        content = image_bytes(picture, kind, **settings)
        if len(content) <= BUDGET:
            break
    return f"image/{kind.lower()}", content


def look(name: str, width: str) -> dict[str, object]:
    """Return what gives a control its whole label and its width."""
    return dict(description=name, style={"description_width": "initial"}, layout=dict(width=width))


def row(children: Iterable[ipywidgets.Widget]) -> ipywidgets.HBox:
    """Return widgets in a row, with room between them, that goes on in the next line where the page is narrow."""
    return ipywidgets.HBox(list(children), layout=dict(flex_flow="row wrap", grid_gap="4px 14px"))


def button(text: str, action: Callable[[], object], width: str = "auto") -> ipywidgets.Button:
    """Return a button that calls `action`."""
    made = ipywidgets.Button(description=text, layout=dict(width=width, margin="2px 1%"))
    made.on_click(lambda _: action())
    return made


def steps(step: Callable[[int], object], *between: ipywidgets.Widget) -> ipywidgets.HBox:
    """Return a row of controls between buttons that call `step` with −1 and 1."""
    return row([button("‹ previous", lambda: step(-1)), *between, button("next ›", lambda: step(1))])


def dropdown(name: str, options: Sequence, value: object, pixels: int) -> ipywidgets.Dropdown:
    """Return a list to choose from."""
    return ipywidgets.Dropdown(options=options, value=value, **look(name, f"{pixels}px"))


def slider(name: str, value: float, low: float, high: float, **settings: object) -> ipywidgets.FloatSlider:
    """Return a slider in steps of 0.01; `settings` are those of ipywidgets."""
    return ipywidgets.FloatSlider(value=value, min=low, max=high, **{"step": 0.01} | look(name, "300px") | settings)


def on_change(controls: Iterable[ipywidgets.Widget], action: Callable[[], object]) -> None:
    """Call `action` whenever the value of one of the controls changes."""
    for control in controls:
        control.observe(lambda _: action(), names="value")
