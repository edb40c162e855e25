"""Twelve questions on GRPO, one for each misconception of the course, asked before and after it; and what was gained.

`python -m tools.inventory page questions.html` writes a page that works without a network: it saves a learner's answers
as a file of one line. `python -m tools.inventory gain *.jsonl` reads the files of a class. The questions are
`data/course/inventory.json`. The normalised gain is the share of the mistakes made before that is gone afterwards (Hake
1998, doi:10.1119/1.18809), of the class's means.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from grpo_kit.config import PROJECT_ROOT, KitError
from grpo_kit.evaluation.intervals import Interval, percentile_interval, t_interval

FOLDER = PROJECT_ROOT / "data" / "course"
QUESTIONS = json.loads((FOLDER / "inventory.json").read_text(encoding="utf-8"))
TIMES = ("before", "after")
DRAWS = 10_000

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def page(out: Annotated[Path, typer.Argument(help="the page to write")]) -> None:
    """Write the page with the questions; the right answers are not in it."""
    from jinja2 import Environment, FileSystemLoader

    if out.exists():
        raise typer.BadParameter(f"{out} is there already; name another file, or move it away")
    template = Environment(loader=FileSystemLoader(FOLDER), autoescape=True).get_template("inventory.html.j2")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(template.render(questions=QUESTIONS), encoding="utf-8")
    typer.echo(f"{out}: {len(QUESTIONS)} questions")


@app.command("gain")
def print_gain(files: Annotated[list[Path], typer.Argument(help="the files that learners saved", exists=True)]) -> None:
    """Print what a class knew before and after, question by question, and its gain with a 95 % interval."""
    try:
        right = read(files)
        change, normalised = gain(right)
    except KitError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(by_question(right).to_string(index=False, float_format=lambda share: f"{share:.0%}"))
    typer.echo(f"\n{right.index.get_level_values('nickname').nunique()} learners answered both times")
    typer.echo(f"right answers of {len(QUESTIONS)}: {_shown(change, '+.1f')} more")
    typer.echo(f"normalised gain: {_shown(normalised, '.2f')}")


def read(files: list[Path]) -> pd.DataFrame:
    """A row a learner and time, a column a question: whether the answer is right. Of learners who answered twice.

    Raises:
        KitError: a line is not of the page; someone has two different answers of one time; nobody answered both times.
    """
    rows: dict[tuple[str, str], list[bool]] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
            if not line.strip():
                continue
            who, answers = _parsed(line, f"{file.name}, line {number}")
            found = [answers[question["id"]] == question["right"] for question in QUESTIONS]
            if rows.setdefault(who, found) != found:
                raise KitError(f"{file.name}, line {number}: found a second, different answer of {who[0]!r} {who[1]}")
    both = {name for name, _ in rows if all((name, when) in rows for when in TIMES)}
    if not both:
        raise KitError(f"gain: found nobody who answered both times in {len(files)} files, allowed: one and more")
    index = pd.MultiIndex.from_product([sorted(both), TIMES], names=["nickname", "when"])
    return pd.DataFrame([rows[who] for who in index], index, [question["id"] for question in QUESTIONS])


def _parsed(line: str, place: str) -> tuple[tuple[str, str], dict[str, str]]:
    try:
        content = json.loads(line)
        who, answers = (str(content["nickname"]), content["when"]), content["answers"]
        fits = who[1] in TIMES and all(answers[q["id"]] in {*q["choices"], "?"} for q in QUESTIONS)
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise KitError(f"{place}: found {line[:60]!r}, allowed: what the page of questions saves")
    return who, answers


def by_question(right: pd.DataFrame) -> pd.DataFrame:
    """A row a question: the misconception, and the share of learners who were right before and after."""
    shares = right.groupby(level="when").mean().T
    names = [question["misconception"] for question in QUESTIONS]
    return pd.DataFrame({"question": shares.index, "misconception": names, **{when: shares[when] for when in TIMES}})


def gain(right: pd.DataFrame, seed: int = 0) -> tuple[Interval, Interval]:
    """By how many right answers a learner improved (t-interval over learners), and the normalised gain of the class.

    The latter's interval draws learners with replacement; it is NaN where nobody had made a mistake before.
    """
    counts = right.sum(axis=1).unstack("when")[list(TIMES)].to_numpy(dtype=float)  # (learners, 2)
    drawn = np.random.default_rng(seed).integers(len(counts), size=(DRAWS if len(counts) > 1 else 0, len(counts)))
    (estimate,) = _normalised(counts.mean(axis=0, keepdims=True))
    return t_interval(counts[:, 1] - counts[:, 0]), percentile_interval(
        estimate, _normalised(counts[drawn].mean(axis=1))
    )


def _normalised(means: np.ndarray) -> np.ndarray:
    """(n,) gains of (n, 2) means before and after; NaN where nothing was left to gain."""
    left = len(QUESTIONS) - means[:, 0]
    return np.divide(means[:, 1] - means[:, 0], left, out=np.full(len(means), np.nan), where=left > 0)


def _shown(interval: Interval, form: str) -> str:
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


if __name__ == "__main__":
    app()
