"""The Korean edition says what the English says: its numbers, code, links, formulas and shape; its code is the same."""

from __future__ import annotations

import re

import nbformat
import polib
import pytest

from tools import korean

NAMES = list(korean.sources())
NOTEBOOKS = [name for name in NAMES if korean.sources()[name].suffix == ".ipynb"]
GLOSSARY = korean.ROOT / "docs" / "glossary_ko.md"
NOT_IN_IT = {"sampling seed", "score (a rewrite)"}  # the Korean texts say in full what is meant
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


@pytest.mark.parametrize("name", NAMES)
def test_the_catalogue_has_what_the_english_says(name: str) -> None:
    assert {entry.msgid for entry in korean.read(name)} == {text for _, text in korean.messages(korean.sources()[name])}


@pytest.mark.parametrize("name", [name for name in NAMES if name != korean.SITE])  # which is built with the site
def test_what_is_committed_is_what_the_catalogue_gives(name: str) -> None:
    place, text = korean.built(name, korean.read(name))
    assert place.read_text(encoding="utf-8") == text, "run: make korean"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_has_code_ids_and_tags_of_the_english_and_only_outputs_that_are_compared(name: str) -> None:
    english = nbformat.read(korean.sources()[name], as_version=4)
    built = nbformat.read(korean.built(name, korean.read(name))[0], as_version=4)
    nbformat.validate(built)
    kept = ("id", "cell_type", "metadata")
    assert [[cell[k] for k in kept] for cell in built.cells] == [[cell[k] for k in kept] for cell in english.cells]
    for cell, source in zip(built.cells, english.cells, strict=True):
        if cell.cell_type == "code":
            assert cell.source == source.source
            assert cell.outputs == (source.outputs if "# NBVAL_CHECK_OUTPUT" in cell.source else [])


@pytest.mark.parametrize("name", [*NOTEBOOKS, korean.README])
def test_every_link_of_a_built_file_leads_somewhere(name: str) -> None:
    place, text = korean.built(name, korean.read(name))
    if place.suffix == ".ipynb":
        text = "\n".join(
            cell.source for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "markdown"
        )
    found = re.findall(r"\]\(([^)\s#]+)", text)
    assert len(found) >= 2 and place.name in found[0].replace("README.md", "README.ko.md")
    for link in found:
        assert link.startswith("https://") or (place.parent / link).exists(), link


def test_the_map_and_the_readme_lead_to_the_korean_edition() -> None:
    english = nbformat.read(korean.sources()["index"], as_version=4).cells[0].source
    assert korean.LANGUAGES[0].format("ko/index.ipynb") in english.split("\n\n")
    readme = korean.sources()[korean.README].read_text(encoding="utf-8")
    assert "docs/glossary_ko.md)" in (korean.ROOT / "README.ko.md").read_text(encoding="utf-8")
    assert korean.LANGUAGES[0].format("README.ko.md") in readme.split("\n\n")


def test_the_glossary_has_every_term_of_the_english_one_and_only_words_that_are_used() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| .+ \|$", GLOSSARY.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    words, terms = zip(*rows, strict=True)
    assert len(set(words)) == len(words) >= 60 and len(set(terms)) == len(terms)
    assert list(words) == sorted(words, key=lambda word: (not "가" <= word <= "힣", word.lower()))
    english = (korean.ROOT / "docs" / "notation.md").read_text(encoding="utf-8").split("## Glossary")[1]
    listed = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", english.split("## References")[0], flags=re.MULTILINE)[1:]
    missing = {term for term in listed if not any(re.split(",| \\(", term)[0] in ours for ours in terms)}
    assert missing == NOT_IN_IT
    said = " ".join(entry.msgstr for name in NAMES for entry in korean.read(name))
    assert [word for word in words if " ".join(word.split()) not in " ".join(said.split())] == []


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
