"""A board on the local network: what learners send is shown, nothing else is taken, and a lost board loses no line."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from grpo_kit import course
from grpo_kit.course import progress
from tools import board as boards

LINE = {"nickname": "나무", "exercise": "00.1", "attempt": 1, "passed": True, "seconds": 61.0, "mistake": ""}


@pytest.fixture
def board(tmp_path: Path) -> Iterator[boards.Board]:
    server = boards.Board(("127.0.0.1", 0), tmp_path / "board.jsonl")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
    course.leave()


def _address(board: boards.Board) -> str:
    return f"http://127.0.0.1:{board.server_port}"


def test_a_check_is_on_the_board_and_in_the_learners_file(board, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # of the room: a board is reached without it
    assert "Nobody has checked" in httpx.get(_address(board), trust_env=False).text
    course.join("나무", file=tmp_path / "mine.jsonl", board=_address(board))
    assert f"sent to {_address(board)}" in capsys.readouterr().out
    course.check("00.1", lambda rewards: [0.0] * len(rewards))
    page = httpx.get(_address(board), trust_env=False).text
    assert "나무" in page and "00.1" in page and 'http-equiv="refresh"' in page
    assert (tmp_path / "board.jsonl").read_bytes() == (tmp_path / "mine.jsonl").read_bytes()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"\xff\xfe",
        json.dumps(LINE | {"nickname": "x" * 41}).encode(),
        json.dumps(LINE | {"seconds": -1}).encode(),
        json.dumps(LINE).encode() + b"\n" + json.dumps(LINE).encode(),
        json.dumps(LINE | {"more": "x" * 3000}).encode(),
    ],
)
def test_anything_else_is_refused(board, body):
    assert httpx.post(_address(board), content=body, trust_env=False).status_code == 400
    assert not board.lines and not board.file.exists()


def test_markup_of_a_nickname_is_shown_as_text(board):
    hostile = json.dumps(LINE | {"nickname": "<script>alert(1)</script>"})
    assert httpx.post(_address(board), content=hostile.encode(), trust_env=False).status_code == 204
    assert b"<script" not in board.page()


def test_a_second_start_goes_on_and_a_line_counts_once(board):
    line = json.dumps(LINE)
    assert board.add(line) and board.add(line)
    again = boards.Board(("127.0.0.1", 0), board.file)
    assert again.lines == {line} and board.file.read_text(encoding="utf-8").count("\n") == 1
    again.server_close()


def test_a_board_that_is_gone_stops_no_check_and_loses_no_line(tmp_path, capsys):
    course.join("나무", file=tmp_path / "mine.jsonl", board="http://127.0.0.1:9")
    course.check("00.1", lambda rewards: [0.0] * len(rewards))
    course.leave()
    assert "did not get the line, which is in mine.jsonl" in capsys.readouterr().out
    assert len(progress.read([tmp_path / "mine.jsonl"])[0]) == 1
