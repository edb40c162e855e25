"""The words of the site in both languages: those of its pages' HTML and those that tools/site.py writes.

They stand in `_("…")`, in Python and in the templates of docs/site/playgrounds. The paragraphs of its markdown are
messages as everywhere else (tools/korean.py); the Korean of all of them is in docs/locale/ko/site.po.
"""

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import polib
from jinja2 import Environment

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "site"
KOREAN = ROOT / "docs" / "locale" / "ko" / "site.po"
WRITER = Path(__file__).with_name("site.py")
THEME = ("Search", "Previous", "Next", "On this page", "Made with ")  # what the theme says on every page


@cache
def in_korean() -> dict[str, str]:
    """Message → its Korean; what has none yet, or is marked fuzzy, is left out."""
    return {entry.msgid: entry.msgstr for entry in polib.pofile(str(KOREAN)) if entry.msgstr and not entry.fuzzy}


def speaker(language: str) -> Callable[[str], str]:
    """Return what says a text in "en" or "ko"; what has no Korean yet is said in English."""
    return (lambda text: in_korean().get(text, text)) if language == "ko" else str


def rendered(template: Path, language: str, **values: Any) -> str:
    """Return a piece of HTML with its words in that language, and with these values."""
    environment = _environment()
    _ = speaker(language)
    environment.install_gettext_callables(_, lambda one, more, count: _(one if count == 1 else more))  # type: ignore[attr-defined]
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)


def site_words() -> Iterator[tuple[str, str]]:
    """Yield each text in `_("…")` with the name of its file."""
    for path in sorted((PAGES / "playgrounds").glob("*.html")):
        found = _environment().extract_translations(path.read_text(encoding="utf-8"))  # type: ignore[attr-defined]
        yield from ((path.name, text) for _, _, text in found if isinstance(text, str))
    for node in ast.walk(ast.parse(WRITER.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_":
            yield WRITER.name, ast.literal_eval(node.args[0])
    yield from (("theme", text) for text in THEME)


def _environment() -> Environment:
    environment = Environment(autoescape=True, extensions=["jinja2.ext.i18n"], keep_trailing_newline=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # unsorted: as written
    return environment
