"""HTML pages that need no network and run nothing: the templates, images as data URIs, executed notebooks made safe.

A notebook's outputs may hold anything, so its page is made safe three times: only image and text outputs are kept, the
HTML is cleaned with a list of allowed tags (bleach), and the page's own content security policy forbids scripts and
every request.
(nbconvert's own `sanitize_html` is not used: its list lacks headings, paragraphs and lists.)
"""

import base64
import re
from dataclasses import dataclass
from pathlib import Path

import bleach
import jinja2
import nbformat
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from pygments.formatters import HtmlFormatter

from grpo_kit.runs.durable import replace_file
from grpo_kit.show.style import Drawing

SHOWN_OUTPUTS = ("text/plain", "text/html", "text/markdown", "image/png", "image/jpeg")
UNSHOWN = "colab"  # tag of cells that say nothing to a reader
TAGS = frozenset(
    "a abbr b blockquote br caption code col colgroup dd details div dl dt em figcaption figure h1 h2 h3 h4 h5 "
    "h6 hr i img li ol p pre s small span strong sub summary sup table tbody td tfoot th thead tr u ul".split()
)
IMAGE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]+\Z")
LINK = re.compile(r"(https?://|mailto:|#|[\w./-]+\Z)")
IMAGE_KINDS = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}


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
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("grpo_kit.show"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
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
        pages.append(NotebookPage(path.with_suffix(".html"), title, minutes, _error(notebook)))
        body = clean_html(_notebook_html(notebook, path))
        write_page(pages[-1].file, "notebook.html.j2", page=pages[-1], body=body, highlighting=styles)
    return pages


def _error(notebook: nbformat.NotebookNode) -> str | None:
    """Return what stopped the notebook: what `grpo_kit.runs` noted, such as a time-out, or `NameError: …`."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    raised = next((f"{o.ename}: {o.evalue}" for o in outputs if o.output_type == "error"), None)
    return notebook.metadata.get("grpo_kit", {}).get("stopped") or raised


def _notebook_html(notebook: nbformat.NotebookNode, path: Path) -> str:
    """Return the notebook's cells as HTML, still to be cleaned."""
    notebook.metadata.pop("widgets", None)
    notebook.cells = [cell for cell in notebook.cells if UNSHOWN not in cell.metadata.get("tags", [])]
    for output in [output for cell in notebook.cells for output in cell.get("outputs", [])]:
        if "data" in output:
            output.data = {kind: value for kind, value in output.data.items() if kind in SHOWN_OUTPUTS}
    exporter = HTMLExporter(template_name="basic", embed_images=True, exclude_anchor_links=True)
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)  # a progress bar's last state only
    body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"path": str(path.parent)}})
    return re.sub(r'href="([\w./-]+)\.ipynb"', r'href="\1.html"', body)


def clean_html(body: str) -> str:
    """Return `body` with nothing in it that could run or be fetched: unknown tags become text, images must be data."""
    without_code = re.sub(r"<(script|style)\b.*?</\1\s*>", "", body, flags=re.IGNORECASE | re.DOTALL)
    return bleach.clean(
        without_code, tags=TAGS, attributes=_allowed, protocols={"http", "https", "mailto", "data"}, strip=True
    )


def _allowed(tag: str, name: str, value: str) -> bool:
    if tag == "img" and name == "src":
        return IMAGE.match(value) is not None
    if tag == "a" and name == "href":
        return LINK.match(value) is not None
    if tag in ("td", "th") and name in ("colspan", "rowspan"):
        return value.isdigit()
    return name in ("class", "alt", "title") or (name == "id" and re.match(r"h[1-6]$", tag) is not None)
