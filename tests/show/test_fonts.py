"""Figures with texts of any script: an installed font that has the glyphs, else one line; cut and wrapped by width."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.text import Text
from PIL import Image

from grpo_kit.show import comparison, fonts, group_figure, interval_figure, style
from grpo_kit.show.widgets.cards import Card, card_sheet

TEXTS = {"Korean": "빨간 공", "Chinese": "红色的球", "Japanese": "赤いボール", "emoji": "🥎🧊"}
EVERYTHING = sorted(set("".join(TEXTS.values())) - {" "})


def write_font(path: Path, family: str, characters: str) -> Path:
    """A real font in which each of some characters is a black square."""
    pen = TTGlyphPen(None)
    pen.moveTo((50, 0)), pen.lineTo((50, 800)), pen.lineTo((950, 800)), pen.lineTo((950, 0)), pen.closePath()
    characters = sorted(set(characters))
    square, names = pen.glyph(), [f"u{ord(c):05X}" for c in characters]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap({ord(c): name for c, name in zip(characters, names, strict=True)})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), **dict.fromkeys(names, square)})
    builder.setupHorizontalMetrics({name: (1000, 50) for name in [".notdef", *names]})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, sTypoDescender=-100)
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The fonts of a machine beside matplotlib's own: none, until a test appends some; nothing was looked for yet."""
    system: list[Path] = []
    own = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in str(entry.fname)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *_, **__: [str(path) for path in system])
    monkeypatch.setattr(fonts, "_families", {})
    monkeypatch.setattr(fonts, "_told", set())
    fonts._installed.cache_clear()
    yield system
    fonts._installed.cache_clear()


def figures(text: str) -> list[style.Drawing]:
    """A text as title, caption, tick label, and on a card."""
    picture = Image.new("RGB", (16, 16), "red")
    value = {"mean": 0.5, "low": 0.4, "high": 0.6}
    return [
        group_figure([picture] * 2, [text] * 2, [0.1, 0.2], [-1.0, 1.0], text),
        interval_figure({"reward": {"": {text: value}}}),
        card_sheet([Card(picture, text, text=text, note=text)], 1, [2], title=text),
    ]


def drawn(text: str) -> list[bytes]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that is missing
        return [figure.to_png() for figure in figures(text)]


@pytest.mark.field("F13")
@pytest.mark.parametrize("script", TEXTS)
def test_a_font_that_has_the_glyphs_is_used_where_one_is_installed(
    script: str, installed: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    text, family = TEXTS[script], f"Wanted for {script}"  # matplotlib remembers where a family lies
    installed.append(write_font(tmp_path / "latin.ttf", "Aardvark", "abc"))
    installed.append(write_font(tmp_path / "wanted.ttf", family, "".join(EVERYTHING)))
    for figure in figures(text):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.to_svg()
        shown = [one for one in figure.findobj(Text) if text in one.get_text()]
        assert shown and all(family in one.get_fontfamily() for one in shown)
        assert all(family not in one.get_fontfamily() for one in figure.findobj(Text) if one.get_text().isascii())
    assert caplog.text == ""
    ink = np.asarray(Image.open(figures(text)[2].save(tmp_path / "with.png")).convert("L"))
    assert (ink < 80).mean() > 0.002  # black squares


@pytest.mark.field("F13")
@pytest.mark.parametrize("script", TEXTS)
def test_what_no_font_has_is_said_once_and_is_no_box(
    script: str, installed: list[Path], caplog: pytest.LogCaptureFixture
):
    text = TEXTS[script]
    with caplog.at_level(logging.WARNING):
        first, second = drawn(text), drawn(text)
    assert first == second
    package = "fonts-symbola" if script == "emoji" else "fonts-noto-cjk"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and package in lines[0] and text[0] in lines[0]
    for figure in figures(text):
        figure.to_png()
        assert any(set(one.get_text()) & {"?"} for one in figure.findobj(Text))
        assert all(text not in one.get_text() for one in figure.findobj(Text))


def test_what_matplotlibs_own_font_has_is_drawn_as_it_always_was(installed: list[Path], tmp_path: Path):
    text = "naïve → “Größe” 😀 λ ×"  # all in DejaVu Sans
    before = drawn(text)
    installed.append(write_font(tmp_path / "all.ttf", "Other", text.replace(" ", "")))
    fonts._installed.cache_clear()
    assert drawn(text) == before and fonts._families == {}


def test_joiners_and_selectors_leave_no_box(installed: list[Path]):
    own = font_manager.findfont("DejaVu Sans")
    assert fonts.drawable("a\u200db\ufe0f\u202ec", own) == "abc"


def test_a_broken_font_file_is_passed_over(installed: list[Path], tmp_path: Path):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    installed += [tmp_path / "broken.ttf", write_font(tmp_path / "good.ttf", "Good", "한")]
    fonts._search({"한"})
    assert fonts._families == {"한": "Good"}


def test_wide_letters_count_as_two():
    assert style.plain_text("가" * 50, 40) == "가" * 19 + "…" and style.plain_text("a" * 50, 40) == "a" * 39 + "…"
    assert style.plain_text("가" * 20, 40) == "가" * 20
    lines = style.wrap("红色的球在桌子上和房子 a red ball " * 4, 20, 3).split("\n")
    assert len(lines) == 3 and all(style.cells(line) <= 20 for line in lines) and lines[-1].endswith("…")
    assert "\0" not in style.wrap("가나다 라마바", 5, 9)
    table = style.aligned([["빨강", "1"], ["red", "22"]])
    assert {style.cells(line[: line.index(digit)]) for line, digit in zip(table, "12", strict=True)} == {6}
    assert comparison.aligned is style.aligned
