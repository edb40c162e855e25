"""Fonts for texts in any script: what matplotlib's own font lacks is drawn in an installed one, found by its glyphs."""

import logging
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from functools import cache, lru_cache

from matplotlib import font_manager
from matplotlib.font_manager import FontEntry
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

logger = logging.getLogger(__name__)
_EAST_ASIAN = ("CJK", "HANGUL", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "FULLWIDTH", "BOPOMOFO")  # as names begin
_families: dict[str, str | None] = {}  # character → the installed family that has it
_told: set[str] = set()  # packages of fonts that were named


def use_fonts(texts: Iterable[Text]) -> None:
    """Let texts be drawn in fonts that have their characters; one that no font here has becomes "?", said once."""
    for text in texts:
        if not text.get_text().isascii():
            own = font_manager.findfont(text.get_fontproperties())
            text.set_text(drawable(text.get_text(), own))
            found = dict.fromkeys(family for c in text.get_text() if (family := _families.get(c)) and not _has(own, c))
            text.set_fontfamily([*dict.fromkeys([*text.get_fontfamily(), *found])])
            if not all(_has_bold(_installed()[family]) for family in found):
                text.set_fontweight("normal")  # matplotlib would tell of every weight that it does not find


def drawable(text: str, own: str) -> str:
    """`text` without what shows nothing by itself (joiners, variation selectors), "?" for what no font has."""
    kept = [c for c in text if not (unicodedata.category(c) == "Cf" or "\ufe00" <= c <= "\ufe0f")]
    lacking = {c for c in kept if c != "\n" and not _has(own, c)}
    _search(lacking - _families.keys())
    return "".join("?" if c in lacking and _families[c] is None else c for c in kept)


def _search(lacking: set[str]) -> None:
    """Find a family for each of some characters; those that are in use come first."""
    used = set(_families.values())
    for family, faces in sorted(_installed().items(), key=lambda one: one[0] not in used) if lacking else ():
        has = {c for c in lacking if _has(faces[0].fname, c)}
        _families.update(dict.fromkeys(has, family))
        lacking = lacking - has
    _families.update(dict.fromkeys(lacking))
    for package in {_package(c) for c in lacking} - _told:
        _told.add(package)
        some = "".join(sorted(c for c in lacking if _package(c) == package)[:8])
        advice = f"Install one (Debian, Ubuntu, Colab: apt-get install {package})"
        logger.warning("figures: no installed font has %s; such characters are drawn as ?. %s", some, advice)


def _package(character: str) -> str:
    if unicodedata.name(character, "").startswith(_EAST_ASIAN):
        return "fonts-noto-cjk"
    return "fonts-symbola" if unicodedata.category(character).startswith("S") else "fonts-noto-core"


@cache
def _installed() -> dict[str, list[FontEntry]]:
    """The faces of each installed family, the upright regular one first; families that have a bold face come first."""
    manager = font_manager.fontManager
    known = {entry.fname for entry in manager.ttflist}
    for path in set(font_manager.findSystemFonts()) - known:  # installed after matplotlib made its list
        with suppress(OSError, RuntimeError):  # no font that matplotlib reads
            manager.addfont(path)
    families: dict[str, list[FontEntry]] = {}
    for face in sorted(manager.ttflist, key=lambda face: (face.style != "normal", face.weight != 400, face.name)):
        if "Last Resort" not in face.name:
            families.setdefault(face.name, []).append(face)
    return dict(sorted(families.items(), key=lambda family: not _has_bold(family[1])))


def _has_bold(faces: list[FontEntry]) -> bool:
    return any(face.weight == 700 for face in faces)


@cache
def _has(path: str, character: str) -> bool:
    """Whether a font has a glyph that matplotlib can draw; coloured emoji are none."""
    try:
        font, code = _opened(path), ord(character)
        return bool(font.get_char_index(code)) and font.load_char(code) is not None
    except (OSError, RuntimeError):
        return False


@lru_cache(8)  # each holds its file open
def _opened(path: str) -> FT2Font:
    font = FT2Font(path)
    font.set_size(10, 72)
    return font
