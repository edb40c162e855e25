"""What the site's pages need beyond Sphinx: formulas as MathML, texts of pictures, the language of a page."""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

from tools.site_words import speaker

LOGGER = logging.getLogger(__name__)
ALTS = "alts.json"  # beside the sources: page → a picture's file name → its text
NAMED = re.compile(r"(?<!<msub>)(?<!<msup>)<mi>(log|exp)</mi>(?!<mo[^>]*>&#x00028;)")  # before no parenthesis
IN_HTML = re.compile(r"\$([^$<>]+)\$")


def formula(latex: str, display: str, where: nodes.Node | None = None) -> str:
    """Return a formula as MathML; as it is written, with a warning, where the library cannot read it."""
    try:
        found = convert(latex.strip(), display=display)
    except Exception as error:  # its errors have no class in common
        LOGGER.warning("formula %r: %r", latex, error, location=where)
        return f"<code>{escape(latex)}</code>"
    return NAMED.sub(r'<mi>\1</mi><mspace width="0.17em" />', found)


def visit_math(self: Any, node: nodes.math) -> None:
    """Write a formula in a line."""
    self.body.append(formula(node.astext(), "inline", node))
    raise nodes.SkipNode


def visit_math_block(self: Any, node: nodes.math_block) -> None:
    """Write a formula on lines of its own; a wide one is scrolled by itself."""
    self.body.append(f'<div class="formula">{formula(node.astext(), "block", node)}</div>')
    raise nodes.SkipNode


def finish(app: Sphinx, doctree: nodes.document) -> None:
    """Give each picture its text, and load it when it comes into sight; write the formulas in pieces of HTML."""
    path = Path(app.srcdir) / ALTS
    alts = json.loads(path.read_text(encoding="utf-8")).get(app.env.docname, {}) if path.is_file() else {}
    for image in doctree.findall(nodes.image):
        image["alt"] = image.get("alt") or alts.get(Path(image["uri"]).name, "")
        image["loading"] = "lazy"
    for raw in doctree.findall(nodes.raw):
        if raw.get("format") == "html" and "<script" not in raw.astext() and not in_output(raw):
            text = IN_HTML.sub(lambda found: formula(found[1], "inline"), raw.astext())
            raw.children = [nodes.Text(text)]


def in_output(node: nodes.Node) -> bool:
    """Whether it is what a cell printed, which stays as it is."""
    while (node := node.parent) is not None:
        if "cell_output" in node.get("classes", []):
            return True
    return False


def set_language(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """Say of a Korean page that it is one: its contents begin with the Korean pages, the theme speaks Korean."""
    if "ko" in page.split("/") or page.endswith((".ko", "_ko")):
        context |= {"language": "ko", "gettext": speaker("ko")}
        first, *parts = re.split(r'(?=<p class="caption")', context["furo_navigation_tree"])
        context["furo_navigation_tree"] = first + "".join(sorted(parts, key=lambda part: ">한국어<" not in part))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register all of it."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("doctree-read", finish, priority=900)
    app.connect("html-page-context", set_language, priority=900)  # after the theme, which writes the contents
    return {"parallel_read_safe": True, "parallel_write_safe": True}
