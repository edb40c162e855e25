"""Progress of a class, where its members want it: one line for each check, and a page that shows the lines of all."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import median
from string import Template

import httpx

import grpo_kit
from grpo_kit.config.errors import KitError, printable, shown
from grpo_kit.config.paths import PROJECT_ROOT

KEYS = {"nickname": str, "exercise": str, "attempt": int, "passed": bool, "seconds": float, "mistake": str}
LONGEST = 40  # characters of a nickname
_JOINED: list[tuple[str, Path, str | None]] = []  # at most one
_LAST: list[float] = []  # when its last line was written


def join(nickname: str, file: str | Path = "progress.jsonl", board: str | None = None) -> None:
    """From here on, each check in this notebook adds a line to a file; nothing is written for those who do not join.

    A line has the nickname, the exercise, which attempt it is, whether it passed, the seconds since the check before
    (of the first one: since joining), the mistake in a word, and the kit's version; nothing of what was written in the
    notebook. The file stays on this machine. The learner hands it over, or deletes it. With the address of a teacher's
    `board` on the local network (`http://192.168.0.7:8765`) each line is sent there too.
    """
    nickname, file = str(nickname).strip(), Path(file).expanduser().resolve()
    if not 0 < len(nickname) <= LONGEST or not nickname.isprintable():
        raise KitError(f"nickname: found {shown(nickname)}, allowed: 1 to {LONGEST} letters on one line")
    try:
        file.open("a", encoding="utf-8").close()
    except OSError as error:
        raise KitError(f"{file}: cannot be written ({error.strerror}). Name another file: file=…") from error
    _JOINED[:], _LAST[:] = [(nickname, file, board)], [time.monotonic()]
    print(f"{nickname}: each check adds a line to {file.name}: exercise, attempt, passed or not, seconds, mistake.")
    place = f"is sent to {board} too" if board else "stays on this machine"
    print(f"Nothing of what you write is in it, and it {place}. `gk.course.leave()` stops it.")


def leave() -> None:
    """Write no more lines from here on."""
    _JOINED.clear()


def record(exercise: str, passed: bool, mistake: str) -> None:
    """Add the line of a check to the file of whoever has joined; a file that cannot be written stops no check."""
    if not _JOINED:
        return
    (nickname, file, board), seconds = _JOINED[0], round(time.monotonic() - _LAST[0], 1)
    try:
        before = read([file])[0] if file.exists() else []
        attempt = 1 + sum((row["nickname"], row["exercise"]) == (nickname, exercise) for row in before)
        values = (nickname, exercise, attempt, passed, seconds, mistake)
        line = dict(zip(KEYS, values, strict=True)) | {"kit": grpo_kit.__version__}
        text = json.dumps(line, ensure_ascii=False)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(text + "\n")
        if board:
            httpx.post(board, content=text.encode(), timeout=2, trust_env=False).raise_for_status()
    except (OSError, KitError) as error:
        print(f"progress is not written: {error}")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        print(f"the board {board} did not get the line, which is in {file.name}: {error}")
    _LAST[:] = [time.monotonic()]


def read(files: Iterable[Path]) -> tuple[list[dict], int]:
    """Return the lines of progress files, each once, and how many could not be read as such."""
    rows, broken = {}, 0
    for file in files:
        try:
            lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise KitError(
                f"{file}: cannot be read ({error.strerror}). Name files of progress, one a learner"
            ) from error
        for line in filter(None, lines):
            if (row := parsed(line)) is None:
                broken += 1
            else:
                rows[line] = row
    return list(rows.values()), broken


def parsed(line: str) -> dict | None:
    """A line of progress; None where it is none."""
    try:
        row = json.loads(line)
        row["seconds"] = float(row["seconds"])
        good = all(isinstance(row[key], kind) for key, kind in KEYS.items()) and 0 <= row["seconds"] < 1e7
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return row if good else None


def class_page(files: Sequence[Path], page: Path) -> str:
    """Write one page, for a browser without a network: who solved what, in how many minutes, and the first mistakes.

    Returns:
        A sentence that says what is on it.
    """
    rows, broken = read(files)
    if not rows:
        raise KitError(f"class: found no line of progress in {len(files)} files. A notebook writes them after join")
    people, names = sorted({row["nickname"] for row in rows}), sorted({row["exercise"] for row in rows})
    columns = [["", *people, "median minutes of those who solved it", "commonest first mistake"]]
    columns += [_column(name, people, rows) for name in names]
    lines = ["".join(f"<td>{escape(printable(text))}</td>" for text in line) for line in zip(*columns, strict=True)]
    page.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    template = Template((PROJECT_ROOT / "data" / "course" / "class.html").read_text(encoding="utf-8"))
    page.write_text(template.substitute(body=body, people=len(people), names=len(names)), encoding="utf-8")
    unread = f"; {broken} lines were no lines of progress" if broken else ""
    return f"{len(people)} people, {len(names)} exercises{unread}: {page}"


def _column(name: str, people: Sequence[str], rows: Sequence[dict]) -> list[str]:
    """One exercise's column: its name, a cell for each person, the median of the minutes, the first mistake."""
    cells, minutes, firsts = [name], [], Counter()
    for person in people:
        mine = [row for row in rows if (row["exercise"], row["nickname"]) == (name, person)]
        mine.sort(key=lambda row: row["attempt"])
        first = next((place for place, row in enumerate(mine) if row["passed"]), len(mine))
        mine, is_solved = mine[: first + 1], first < len(mine)  # what comes after it was solved is play
        spent = sum(row["seconds"] for row in mine) / 60
        cells.append(f"{'✓' if is_solved else '✗'} {spent:.0f} min, {len(mine)}×" if mine else "·")
        minutes += [spent] * is_solved
        firsts.update([row["mistake"] for row in mine[:1] if not row["passed"]])
    cells.append(f"{median(minutes):.0f}" if minutes else "·")
    return [*cells, next((f"{mistake} ({n}×)" for mistake, n in firsts.most_common(1)), "·")]
