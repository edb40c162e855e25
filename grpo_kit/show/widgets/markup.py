"""HTML for widgets. Whatever comes from a user, a model or a file passes `escape`; styles stand at their element.

A widget's HTML is not cleaned by Jupyter: a prompt that reached it as it is could run code on the reader's machine.
"""

from __future__ import annotations

import html
import io

from PIL import Image

from grpo_kit.show.frame import Frame
from grpo_kit.show.pages import data_uri
from grpo_kit.show.style import FAINT, GREY, INK, PAPER, plain_text

LARGEST = 256  # pixels of a picture's longer side
SMOOTH_FROM = 128  # pixels across; smaller pictures show their pixels
FONT = "font-family:var(--jp-content-font-family, system-ui, sans-serif)"


def escape(text: object, limit: int = 400) -> str:
    """Return `text` as HTML that shows exactly these characters; control characters and the rest beyond `limit` go."""
    return html.escape(plain_text(text, limit), quote=True)


def sheet(content: str) -> str:
    """Return `content` (HTML) on white paper, whatever the reader's theme, since figures are white too."""
    return (
        f'<div style="{FONT};font-size:14px;line-height:1.4;color:{INK};background:{PAPER};padding:8px">{content}</div>'
    )


def heading(text: str, note: str = "") -> str:
    """Return a heading with a quieter line below; both are plain text."""
    below = f'<div style="color:{GREY};font-size:13px">{escape(note)}</div>' if note else ""
    return f'<div style="font-size:17px;font-weight:700">{escape(text)}</div>{below}'


def message(text: str) -> str:
    """Return a sentence that a widget says, plain text."""
    return sheet(f'<div style="font-size:15px">{escape(text, 1000)}</div>')


def grid(cells: list[str], columns: int, width: int = 230) -> str:
    """Return cells (HTML) in rows of `columns`."""
    template = f"grid-template-columns:repeat({columns},minmax(0,{width}px))"
    return f'<div style="display:grid;{template};gap:18px 20px;margin-top:10px">{"".join(cells)}</div>'


def picture(image: Image.Image | None, words: str, side: int, frame: Frame | None = None) -> str:
    """Return an image as an `img` of `side` pixels whose bytes stand in the page; `words` describe it.

    Args:
        image: what to show; None says that there is no picture.
        words: the image in words, plain text.
        side: pixels of its width and height on the page, frame included.
        frame: how the image is framed; None draws a faint line.
    """
    border = f"1px solid {FAINT}" if frame is None else f"{frame.pixels}px {frame.line} {frame.colour}"
    box = f"box-sizing:border-box;width:{side}px;height:{side}px;border:{border};border-radius:3px"
    if image is None:
        return f'<div style="{box};color:{GREY};padding-top:{side // 2 - 20}px;text-align:center">no picture</div>'
    crisp = ";image-rendering:pixelated" if image.width < SMOOTH_FROM else ""
    address = data_uri(jpeg(image), "jpeg")
    fit = f"display:block;object-fit:contain;max-width:none{crisp}"
    return f'<img src="{address}" alt="{escape(words, 120)}" style="{box};{fit}">'


def jpeg(image: Image.Image) -> bytes:
    """Return an image as JPEG bytes, at most `LARGEST` pixels wide and high."""
    small, stream = image.convert("RGB"), io.BytesIO()
    small.thumbnail((LARGEST, LARGEST))
    small.save(stream, "JPEG", quality=90, subsampling=0)
    return stream.getvalue()
