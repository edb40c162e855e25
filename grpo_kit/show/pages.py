"""HTML pages that need no network and run nothing: templates, data URIs, notebooks made safe, a small copy to send.

A notebook's outputs may hold anything, so its page is made safe three times: only image and text outputs are kept, the
HTML is cleaned with a list of allowed tags (bleach; the list of nbconvert's own `sanitize_html` lacks headings and
paragraphs), and the page's own content security policy forbids scripts and every request.
"""

import base64
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import bleach
import jinja2
import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from PIL import Image
from pygments.formatters import HtmlFormatter

from grpo_kit.config import PROJECT_ROOT, KitError
from grpo_kit.runs.durable import replace_file
from grpo_kit.show.style import Drawing, image_bytes

SHOWN_OUTPUTS = ("text/plain", "text/html", "text/markdown", "image/png", "image/jpeg")
UNSHOWN = "colab"  # tag of cells that say nothing to a reader
TAGS = frozenset(
    "a abbr audio b blockquote br caption code col colgroup dd details div dl dt em figcaption figure h1 h2 h3 h4 h5 "
    "h6 hr i img li ol p pre s small span strong sub summary sup table tbody td tfoot th thead tr u ul".split()
)
# of formulas, which are cleaned apart: nothing else of a page may hold them
FORMULA_TAGS = frozenset(
    "math mfrac mi mn mo mover mrow mspace msqrt mstyle msub msubsup msup mtable mtd mtext mtr munder "
    "munderover".split()
)
FORMULA_ATTRIBUTES = (
    "accent display displaystyle fence form mathvariant maxsize minsize scriptlevel stretchy width".split()
)
PLACE = "\ue000{}\ue001"  # of the numbered formula, in characters that no text has
MATH = re.compile(  # of prose; in code, which comes first, nothing is one
    r"(`+|~~~+).*?\1|(?<!\\)\$\$(?P<block>.+?)\$\$|(?<![\\$])\$(?P<inline>([^$\n]|\n(?!\s*\n))+)\$", re.DOTALL
)
IMAGE_FILE = re.compile(r"""(<img\b[^>]*?\bsrc=)(["'])([^"':]+)\2""")
IMAGE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]+\Z")
SOUND = re.compile(r"data:audio/wav;base64,[A-Za-z0-9+/=\s]+\Z")
LINK = re.compile(r"(https?://|mailto:|#|[\w./-]+\Z)")
IMAGE_KINDS = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}
# of the small copy
PICTURE = re.compile(r"data:image/(png|jpeg|svg\+xml);base64,([A-Za-z0-9+/=\s]+)")
LONG_NUMBER = re.compile(rb"\d+\.\d{3,}")
# in a drawing, whose letters are paths and not text
UNSEEN = re.compile(rb"<!--.*?-->|<metadata>.*?</metadata>|(?<=>)\s+(?=<)", re.DOTALL)
NOTEBOOK_LINK = re.compile(r' ·\s*<a href="[\w.-]+\.ipynb">the notebook itself</a>')
QUALITY = 70  # of WebP
WIDEST = 1400  # pixels


@dataclass(frozen=True)
class NotebookPage:
    """An executed notebook as a page: its file name, title, minutes, and the error that stopped it, if one did."""

    file: Path
    title: str
    minutes: float | None
    error: str | None


def write_page(path: Path, template: str, **context: object) -> Path:
    """Fill one of the kit's templates, write it as `path` and return the path.

    Every value is escaped, and one that the template lacks is an error; half a character becomes a question mark.
    """
    loader, strict = jinja2.PackageLoader("grpo_kit.show"), jinja2.StrictUndefined
    spaces = dict(trim_blocks=True, lstrip_blocks=True)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=strict, **spaces)
    page = environment.get_template(template).render(**context)
    replace_file(path, page.encode("utf-8", errors="replace"))
    return path


def data_uri(content: bytes, kind: str) -> str:
    """Return image bytes as an address that needs no file; `kind` is the part after `image/`."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def figure_uri(figure: Drawing) -> str:
    """Return a figure as an address that needs no file."""
    return data_uri(figure.to_svg(), "svg+xml")


def image_uri(path: Path) -> str | None:
    """Return an image file as a data URI; None where it is absent or not an image that pages show."""
    kind = IMAGE_KINDS.get(path.suffix.lower())
    return data_uri(path.read_bytes(), kind) if kind and path.is_file() else None


def write_notebook_pages(folder: Path) -> list[NotebookPage]:
    """Write each executed notebook of `folder` as an HTML page beside it and return the pages in order."""
    pages = []
    styles = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    for path in sorted(folder.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        headings = (re.match(r"#\s+(.+)", cell.source) for cell in notebook.cells if cell.cell_type == "markdown")
        title = next((heading[1].strip() for heading in headings if heading), path.stem)
        seconds = notebook.metadata.get("papermill", {}).get("duration")
        minutes = None if seconds is None else seconds / 60
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        raised = next((f"{o.ename}: {o.evalue}" for o in outputs if o.output_type == "error"), None)
        error = notebook.metadata.get("grpo_kit", {}).get("stopped") or raised  # a time-out, say; or `NameError: …`
        pages.append(NotebookPage(path.with_suffix(".html"), title, minutes, error))
        body = _notebook_html(notebook, path)
        write_page(pages[-1].file, "notebook.html.j2", page=pages[-1], body=body, highlighting=styles)
    return pages


def _notebook_html(notebook: nbformat.NotebookNode, path: Path) -> str:
    """Return the notebook's cells as HTML that runs nothing."""
    formulas: list[str] = []

    def placed(found: re.Match) -> str:
        """A place for the formula, which the cleaning would not leave as it is."""
        latex = found["block"] or found["inline"]
        if latex and (formula := _formula(latex, "block" if found["block"] else "inline")):
            formulas.append(formula)
            return PLACE.format(len(formulas) - 1)
        return found[0]

    def embedded(found: re.Match) -> str:
        return f'{found[1]}"{image_uri(path.parent / unquote(found[3])) or ""}"'

    notebook.metadata.pop("widgets", None)
    notebook.cells = [cell for cell in notebook.cells if UNSHOWN not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = MATH.sub(placed, cell.source)
    for output in [output for cell in notebook.cells for output in cell.get("outputs", [])]:
        if "data" in output:
            output.data = {kind: value for kind, value in output.data.items() if kind in SHOWN_OUTPUTS}
    exporter = HTMLExporter(template_name="basic", exclude_anchor_links=True)
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)  # a progress bar's last state only
    body = IMAGE_FILE.sub(embedded, exporter.from_notebook_node(notebook)[0])
    body = clean_html(re.sub(r'href="([\w./-]+)\.ipynb"', r'href="\1.html"', body))
    for number, formula in enumerate(formulas):
        body = body.replace(PLACE.format(number), formula)
    return body


def _formula(latex: str, display: str) -> str:
    """A formula as MathML; "" where the library cannot read it, so that it is shown as written."""
    try:
        return bleach.clean(convert(latex, display=display), FORMULA_TAGS, FORMULA_ATTRIBUTES, strip=True)
    except Exception:  # its errors have no class in common
        return ""


def clean_html(body: str) -> str:
    """Return `body` with nothing in it that could run or be fetched: unknown tags become text, images must be data."""
    without_code = re.sub(r"<(script|style)\b.*?</\1\s*>", "", body, flags=re.IGNORECASE | re.DOTALL)
    return bleach.clean(
        without_code, tags=TAGS, attributes=_allowed, protocols={"http", "https", "mailto", "data"}, strip=True
    )


def _allowed(tag: str, name: str, value: str) -> bool:
    if tag == "img" and name == "src":
        return IMAGE.match(value) is not None
    if tag == "audio" and name in ("controls", "preload", "src"):
        return name != "src" or SOUND.match(value) is not None
    if tag == "a" and name == "href":
        return LINK.match(value) is not None
    if tag in ("td", "th") and name in ("colspan", "rowspan"):
        return value.isdigit()
    return name in ("class", "alt", "title") or (name == "id" and re.match(r"h[1-6]$", tag) is not None)


def share_pages(run_dir: Path, folder: Path) -> list[Path]:
    """Copy a run's `index.html` and the pages of its notebooks, and return what was written.

    Pictures become WebP where that is smaller, drawings are rounded to a hundredth of a point. The text stays, but for
    the places of run and project on this machine, which concern nobody else. Pages that are in `folder` are replaced; a
    `KitError` where it is the run's own, or the run has no report.
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
    with Image.open(io.BytesIO(content)) as image:
        small = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    small.thumbnail((WIDEST, 10 * WIDEST))
    smaller = image_bytes(small, "WEBP", quality=QUALITY, method=6)
    return data_uri(smaller, "webp") if len(smaller) < len(content) else match[0]


def _rounded(number: re.Match) -> bytes:
    """Two decimals where the number is a place; more where it may be a scale, such as that of the letters."""
    value = float(number[0])
    return b"%.2f" % value if value >= 10 else b"%.4f" % value
