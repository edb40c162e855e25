"""A small copy of a run's pages, to send or to commit: the same pages, smaller pictures, without the run's data."""

import base64
import io
import os
import re
from pathlib import Path

from PIL import Image

from grpo_kit.config import PROJECT_ROOT, KitError
from grpo_kit.runs.durable import replace_file
from grpo_kit.show.pages import data_uri

PICTURE = re.compile(r"data:image/(png|jpeg|svg\+xml);base64,([A-Za-z0-9+/=\s]+)")
LONG_NUMBER = re.compile(rb"\d+\.\d{3,}")
# in a drawing, whose letters are paths and not text
UNSEEN = re.compile(rb"<!--.*?-->|<metadata>.*?</metadata>|(?<=>)\s+(?=<)", re.DOTALL)
NOTEBOOK_LINK = re.compile(r' ·\s*<a href="[\w.-]+\.ipynb">the notebook itself</a>')
QUALITY = 70  # of WebP
WIDEST = 1400  # pixels


def share_pages(run_dir: Path, folder: Path) -> list[Path]:
    """Copy a run's `index.html` and the pages of its notebooks, and return what was written.

    Pictures become WebP where that is smaller, drawings are rounded to a hundredth of a point. The text stays, but for
    the places of run and project on this machine, which concern nobody else.

    Args:
        run_dir: the run's folder, whose report is written.
        folder: where the copies go; pages that are there are replaced.

    Raises:
        KitError: the run has no report, or `folder` is the run's own.
    """
    run_dir, folder = Path(run_dir), Path(folder)
    if not (run_dir / "index.html").is_file():
        raise KitError(f"run {run_dir}: no index.html in it. Write it: grpo-kit report {run_dir}")
    if folder.resolve() == run_dir.resolve():
        raise KitError(f"share folder {folder}: the run's own folder. Choose another one")
    for stale in folder.glob("notebooks/*.html"):
        stale.unlink()
    copies = []
    for page in [run_dir / "index.html", *sorted((run_dir / "notebooks").glob("*.html"))]:
        text = NOTEBOOK_LINK.sub("", PICTURE.sub(_smaller, page.read_text(encoding="utf-8")))
        copies.append(folder / page.relative_to(run_dir))
        replace_file(copies[-1], without_places(text, run_dir.resolve()).encode("utf-8"))
    return copies


def without_places(text: str, run_dir: Path) -> str:
    """Paths under the project count from there, the run's folder elsewhere is its name."""
    return text.replace(f"{PROJECT_ROOT}{os.sep}", "").replace(str(run_dir), run_dir.name)


def _smaller(match: re.Match) -> str:
    kind, content = match[1], base64.b64decode(match[2])
    if kind == "svg+xml":
        short = LONG_NUMBER.sub(_rounded, UNSEEN.sub(b"", content))
        return data_uri(re.sub(rb"\s+", b" ", short), kind)
    stream = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        small = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    small.thumbnail((WIDEST, 10 * WIDEST))
    small.save(stream, "WEBP", quality=QUALITY, method=6)
    smaller = stream.getvalue()
    return data_uri(smaller, "webp") if len(smaller) < len(content) else match[0]


def _rounded(number: re.Match) -> bytes:
    """Two decimals where the number is a place; more where it may be a scale, such as that of the letters."""
    value = float(number[0])
    return b"%.2f" % value if value >= 10 else b"%.4f" % value
