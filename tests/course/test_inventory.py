"""The twelve questions before and after a course: a page without answers, and the gain that the answers give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grpo_kit.config import KitError
from tools import inventory

RIGHT = {question["id"]: question["right"] for question in inventory.QUESTIONS}


def _save(folder: Path, name: str, when: str, wrong: int) -> Path:
    """A learner's file with so many wrong answers, from the first question on."""
    answers = RIGHT | dict.fromkeys(list(RIGHT)[:wrong], "?")
    file = folder / f"{name}_{when}.jsonl"
    file.write_text(json.dumps({"nickname": name, "when": when, "answers": answers}) + "\n", encoding="utf-8")
    return file


def test_the_questions_are_whole_and_their_answers_are_no_pattern() -> None:
    assert list(RIGHT) == [str(number) for number in range(1, 13)]
    for question in inventory.QUESTIONS:
        assert list(question["choices"]) == ["a", "b", "c"] and question["right"] in question["choices"]
        assert len(set(question["choices"].values())) == 3
    assert [list(RIGHT.values()).count(letter) for letter in "abc"] == [4, 4, 4]


def test_gain_is_of_those_who_answered_twice(tmp_path: Path) -> None:
    files = [_save(tmp_path, "kim", "before", 6), _save(tmp_path, "kim", "after", 3)]
    files += [
        _save(tmp_path, "lee", "before", 10),
        _save(tmp_path, "lee", "after", 1),
        _save(tmp_path, "gone", "before", 0),
    ]
    right = inventory.read([*files, files[0]])  # a file twice counts once
    change, normalised = inventory.gain(right)
    assert change.mean == 6.0 and change.low == pytest.approx(6 - 12.706 * 3, abs=1e-2)
    assert normalised.mean == pytest.approx(12 / 16)
    assert normalised.low == pytest.approx(3 / 6) and normalised.high == pytest.approx(9 / 10)
    table = inventory.by_question(right).set_index("question")
    assert table.loc["1", ["before", "after"]].tolist() == [0, 0]
    assert table.loc["3", ["before", "after"]].tolist() == [0, 0.5]
    shown = CliRunner().invoke(inventory.app, ["gain", *map(str, files)]).output
    assert "2 learners answered both times" in shown and "normalised gain: 0.75 [0.50, 0.90]" in shown


def test_learners_who_knew_all_before_have_no_gain_and_no_error(tmp_path: Path) -> None:
    change, normalised = inventory.gain(inventory.read([_save(tmp_path, "kim", when, 0) for when in inventory.TIMES]))
    assert change.mean == 0 and normalised.mean != normalised.mean


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", "allowed: what the page of questions saves"),
        ("not json", "line 1: found 'not json'"),
        (json.dumps({"nickname": "kim", "when": "later", "answers": RIGHT}), "allowed: what the page"),
        (json.dumps({"nickname": "kim", "when": "after", "answers": RIGHT | {"3": "d"}}), "allowed: what the page"),
        (
            json.dumps({"nickname": "kim", "when": "before", "answers": RIGHT}),
            "a second, different answer",
        ),
        (json.dumps({"nickname": "lee", "when": "after", "answers": RIGHT}), "found nobody who answered both times"),
    ],
)
def test_other_files_are_one_line(tmp_path: Path, line: str, said: str) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(KitError, match=said) as error:
        inventory.read([_save(tmp_path, "kim", "before", 2), other])
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_saves_what_is_read_and_does_not_tell_the_answers(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    out = tmp_path / "questions.html"
    assert CliRunner().invoke(inventory.app, ["page", str(out)]).exit_code == 0
    assert CliRunner().invoke(inventory.app, ["page", str(out)]).exit_code == 2, "nothing is overwritten"
    assert "misconception" not in out.read_text(encoding="utf-8")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.context.set_offline(True)
        page.goto(out.as_uri())
        saved = []
        for when in inventory.TIMES:
            page.fill("[name=nickname]", "김 / kim")
            page.check(f"[name=when][value={when}]")
            for number in ("1", "2") if when == "after" else ("1",):
                page.check(f"[name='{number}'][value={RIGHT[number]}]")
            with page.expect_download() as download:
                page.click("button")
            saved.append(tmp_path / download.value.suggested_filename)
            download.value.save_as(saved[-1])
        browser.close()
    assert [file.name for file in saved] == ["questions_김_kim_before.jsonl", "questions_김_kim_after.jsonl"]
    assert inventory.read(saved).sum(axis=1).tolist() == [1, 2]
