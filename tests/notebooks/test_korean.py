"""The Korean edition says what the English says: its numbers, code, links, formulas and shape; its code is the same."""

from __future__ import annotations

import nbformat
import polib
import pytest

from tools import korean

NAMES = list(korean.sources())
ENGLISH = "**So** `x` is 3: [here](a.ipynb), $r_i$ <br>"
KOREAN = "**그래서** `x`는 3입니다. [여기](a.ipynb), $r_i$ <br>"
BROKEN = [
    ("3", "4"),
    ("`x`", "x"),
    ("a.ipynb", "b.ipynb"),
    ("r_i", "r_j"),
    ("<br>", ""),
    ("그래서** ", "(그래서)**는 "),
]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_translated_lost_nothing_and_is_not_fuzzy(name: str) -> None:
    catalogue = korean.read(name)
    assert all(entry.msgstr for entry in catalogue) and not list(korean.problems(name, catalogue))


@pytest.mark.parametrize("name", [name for name in NAMES if name != korean.README])
def test_a_built_notebook_has_the_code_ids_and_tags_of_the_english_and_no_outputs(name: str) -> None:
    english = nbformat.read(korean.sources()[name], as_version=4)
    built = nbformat.reads(korean.built(name, korean.read(name))[1], as_version=4)
    nbformat.validate(built)
    kept = ("id", "cell_type", "metadata")
    assert [[cell[k] for k in kept] for cell in built.cells] == [[cell[k] for k in kept] for cell in english.cells]
    for cell, source in zip(built.cells, english.cells, strict=True):
        assert cell.cell_type != "code" or (cell.source == source.source and not cell.outputs)


@pytest.mark.parametrize(("right", "wrong"), BROKEN)
def test_a_translation_that_lost_something_is_caught(right: str, wrong: str) -> None:
    assert not list(korean.lost(ENGLISH, KOREAN))
    assert list(korean.lost(ENGLISH, KOREAN.replace(right, wrong)))


def test_large_numbers_are_the_same_number_in_words_of_either_language() -> None:
    assert not list(korean.lost("only 1 of 3.75 billion, 0.8 million", "37억 5천만, 80만의 1뿐"))
    assert list(korean.lost("3.75 billion weights", "가중치 37억 5만 개"))


def test_a_fuzzy_message_is_caught() -> None:
    catalogue = polib.POFile()
    catalogue.append(polib.POEntry(msgid=ENGLISH, msgstr=KOREAN, flags=["fuzzy"], occurrences=[("cell", "")]))
    assert [line.endswith(": fuzzy") for line in korean.problems("x", catalogue)] == [True]
