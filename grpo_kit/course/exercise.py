"""An exercise: what a learner hands in is tried on inputs of its own, and the first mistake is told in one sentence.

The exercises of notebook NN are in the module `exercises_NN`: a function for each, which calls `expect` on what the
learner's code gives for inputs that the notebook does not show.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from grpo_kit.config.errors import KitError, shown
from grpo_kit.config.paths import PROJECT_ROOT
from grpo_kit.course.spoken import spoken

EXERCISES: dict[str, "Exercise"] = {}  # filled by the modules `exercises_NN`, as they are imported


@dataclass(frozen=True)
class Exercise:
    """One exercise: `check(*answers)` raises `WrongAnswer` at the first mistake, and may say more than "right"."""

    name: str
    title: str
    minutes: int
    difficulty: int
    check: Callable[..., str | None]


class WrongAnswer(Exception):
    """What a learner handed in is not right; its text is the sentence that the learner reads."""

    def __init__(self, sentence: str, idea: str | None = None) -> None:
        """`idea` is the name of the misconception, where it is a known one."""
        super().__init__(f"{sentence} ({idea})" if idea else sentence)
        self.idea = idea or "another mistake"


@dataclass(frozen=True)
class Checked:
    """How an exercise was answered: whether it passed, and the sentence that says so."""

    exercise: str
    passed: bool
    message: str
    mistake: str = ""  # in a word: the misconception, or what stopped the code

    def __repr__(self) -> str:
        return f"{'✓' if self.passed else '✗'} {self.exercise}: {spoken(self.message)}"

    def _repr_html_(self) -> str:
        colour = "#0a6b3d" if self.passed else "#a8330f"
        return f"<div style='border-left: 4px solid {colour}; padding: 4px 10px'>{escape(repr(self))}</div>"


def exercise(name: str, title: str, *, minutes: int, difficulty: int) -> Callable[[Callable], Callable]:
    """Decorate the check of an exercise: `name` as "06.1", minutes to do it, difficulty from 1 to 5."""

    def add(check: Callable[..., None]) -> Callable[..., None]:
        EXERCISES[name] = Exercise(name, title, minutes, difficulty, check)
        return check

    return add


def expect(
    found: Any, expected: Any, given: str, *, wrong: Mapping[str, Any] | None = None, tolerance: float = 1e-6
) -> None:
    """Compare what a learner's code gave with what is right.

    Args:
        found, expected: numbers, arrays, tensors, texts or lists of them; a NaN equals a NaN.
        given: the input, in words: "ratio 1.5, A = +1".
        wrong: the name of a misconception → what it gives for this input; the one that matches is told.
        tolerance: of numbers, absolute, and relative to what is expected.

    Raises:
        WrongAnswer: one sentence with the input, what was expected and found, and the misconception.
    """
    if _equal(found, expected, tolerance):
        return
    idea = next((name for name, value in (wrong or {}).items() if _equal(found, value, tolerance)), None)
    sentence = f"for {given}: expected {_short(expected)}, found {_short(found)}"
    raise WrongAnswer(sentence, idea)


def check(name: str, *answers: Any) -> Checked:
    """Check what was written for the exercise `name`, such as "06.1"; a wrong answer is told, not raised.

    A learner who has joined a class (`grpo_kit.course.join`) gets one more line in the file of progress.

    Raises:
        KitError: there is no such exercise.
        WrongAnswer: where nbgrader grades, which counts a cell without an error as solved.
    """
    from grpo_kit.course.progress import record

    checked = _tried(find_exercise(name), answers)
    record(name, checked.passed, checked.mistake)
    if not checked.passed and os.environ.get("NBGRADER_EXECUTION"):
        raise WrongAnswer(checked.message)
    return checked


def _tried(task: Exercise, answers: tuple) -> Checked:
    try:
        said = task.check(*answers)
    except WrongAnswer as mistake:
        return Checked(task.name, False, str(mistake), mistake.idea)
    except NotImplementedError:
        sentence = "not written yet: put your code in the place of `raise NotImplementedError()`"
        return Checked(task.name, False, sentence, "not written yet")
    except Exception as error:
        kind = type(error).__name__
        return Checked(task.name, False, f"your code stopped with {kind}: {error}", f"stopped with {kind}")
    return Checked(task.name, True, f"{task.title}: {said or 'right'}")


def find_exercise(name: str) -> Exercise:
    """Return the exercise of that name; a `KitError` where there is none."""
    name = str(name)
    module = f"grpo_kit.course.exercises_{name.partition('.')[0]}"
    if importlib.util.find_spec(module) is not None:
        importlib.import_module(module)
    if name not in EXERCISES:
        there = ", ".join(sorted(EXERCISES)) or "none of this notebook"
        raise KitError(f"exercise: found {shown(name)}, allowed: {there}; names are as in the notebooks, such as 06.1")
    return EXERCISES[name]


def catch_up(name: str) -> None:
    """Define in the notebook what the exercise `name` asks for, as its solution does, and show that code.

    A `KitError` where there is no such exercise, or no notebook to define it in.
    """
    from IPython import get_ipython

    find_exercise(name)
    if (notebook := get_ipython()) is None:
        raise KitError(f"catch_up: found no notebook to define {name} in. Call it in a notebook's cell")
    for path in sorted((PROJECT_ROOT / "notebooks").glob(f"{name.partition('.')[0]}_*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if {f"exercise:{name}", "solution"} <= set(cell["metadata"].get("tags", [])):
                code = "".join(line for line in "".join(cell["source"]).splitlines(True) if " SOLUTION" not in line)
                print(code)
                notebook.run_cell(code)


def _equal(found: Any, expected: Any, tolerance: float) -> bool:
    found, expected = _plain(found), _plain(expected)
    if found.shape != expected.shape:
        return False
    if found.dtype.kind in "fiub" and expected.dtype.kind in "fiub":
        return bool(np.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True))
    return found.tolist() == expected.tolist()


def _plain(value: Any) -> np.ndarray:
    value = value.detach().cpu() if hasattr(value, "detach") else value
    try:
        return np.asarray(value)
    except ValueError:  # rows of different lengths
        return np.asarray(value, dtype=object)


def _short(value: Any) -> str:
    value = _plain(value)
    return np.array2string(value, precision=4, suppress_small=True, threshold=12, separator=", ")
