"""Progress of a class: only of those who join, only what is said, and a page for the teacher."""

import json

import pytest

from grpo_kit import __version__, course
from grpo_kit.config import KitError
from grpo_kit.course import progress


def _right(rewards):
    mean = sum(rewards) / len(rewards)
    deviation = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
    return [(r - mean) / (deviation + 1e-4) for r in rewards]


@pytest.fixture(autouse=True)
def nobody_has_joined():
    course.leave()
    yield
    course.leave()


def test_nothing_is_written_for_those_who_do_not_join(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    course.check("00.1", _right)
    assert list(tmp_path.iterdir()) == []


def test_a_line_says_what_was_promised_and_nothing_else(tmp_path, capsys):
    file = tmp_path / "progress.jsonl"
    course.join("나무", file=file)
    assert "it stays on this machine" in capsys.readouterr().out
    course.check("00.1", lambda rewards: [secret for secret in rewards])
    course.check("00.1", _right)
    course.leave()
    course.check("00.1", _right)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [sorted(row) for row in rows] == [sorted([*progress.KEYS, "kit"])] * 2
    assert [(row["attempt"], row["passed"], row["kit"]) for row in rows] == [
        (1, False, __version__),
        (2, True, __version__),
    ]
    assert rows[0]["nickname"] == "나무" and rows[0]["exercise"] == "00.1" and rows[1]["mistake"] == ""
    assert rows[0]["mistake"] in ("another mistake", "the mean of the group is not subtracted")
    assert all(0 <= row["seconds"] < 60 for row in rows) and "secret" not in file.read_text(encoding="utf-8")


def test_attempts_go_on_after_the_kernel_was_started_again(tmp_path):
    for _ in range(2):
        course.join("a", file=tmp_path / "p.jsonl")
        course.check("00.1", _right)
    assert [row["attempt"] for row in progress.read([tmp_path / "p.jsonl"])[0]] == [1, 2]


def test_a_file_that_is_gone_stops_no_check(tmp_path, capsys):
    folder = tmp_path / "gone"
    folder.mkdir()
    course.join("a", file=folder / "p.jsonl")
    (folder / "p.jsonl").unlink()
    folder.rmdir()
    assert course.check("00.1", _right).passed
    assert "progress is not written" in capsys.readouterr().out


@pytest.mark.parametrize("nickname", ["", "  ", "x" * 41, "two\nlines"])
def test_a_nickname_is_short_and_on_one_line(tmp_path, nickname):
    with pytest.raises(KitError, match="nickname: found"):
        course.join(nickname, file=tmp_path / "p.jsonl")


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(KitError, match="cannot be written"):
        course.join("a", file=tmp_path)


def _row(nickname, exercise, attempt, passed, seconds, mistake=""):
    return json.dumps(dict(zip(progress.KEYS, (nickname, exercise, attempt, passed, seconds, mistake), strict=True)))


def test_the_page_of_a_class(tmp_path):
    wrong = "the clip is missing"
    lines = [
        _row("<b>ann</b>", "00.1", 1, True, 60),
        _row("<b>ann</b>", "06.1", 1, False, 120.0, wrong),
        _row("<b>ann</b>", "06.1", 2, True, 180.0),
        _row("<b>ann</b>", "06.1", 3, False, 900.0, "what comes after is play"),
        _row("ben", "06.1", 1, False, 240.0, wrong),
    ]
    broken = [
        '{"nickname": "x"}',
        "[]",
        "no JSON",
        _row("c", "06.1", 1, True, float("nan")),
        _row("c", "06.1", 1, True, -5),
    ]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("\n".join([*lines, *broken]), encoding="utf-8")
    two.write_text(lines[0] + "\n\n", encoding="utf-8")  # handed in twice
    said = progress.class_page([one, two], tmp_path / "new" / "class.html")
    page = (tmp_path / "new" / "class.html").read_text(encoding="utf-8")
    assert "2 people, 2 exercises; 5 lines were no lines of progress" in said
    assert "&lt;b&gt;ann&lt;/b&gt;</td><td>✓ 1 min, 1×</td><td>✓ 5 min, 2×" in page
    assert "ben</td><td>·</td><td>✗ 4 min, 1×" in page
    assert "solved it</td><td>1</td><td>5" in page and f"mistake</td><td>·</td><td>{wrong} (2×)" in page
    assert "http" not in page.replace("http-equiv", "") and "<b>" not in page


def test_no_lines_and_no_files_are_told(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(KitError, match="no line of progress"):
        progress.class_page([tmp_path / "empty.jsonl"], tmp_path / "class.html")
    with pytest.raises(KitError, match="cannot be read"):
        progress.read([tmp_path / "none.jsonl"])
