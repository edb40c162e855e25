"""An exercise: what a learner hands in is tried on inputs of its own, and the first mistake is told in one sentence.

The exercises of notebook NN are in the module `exercises_NN`: a function for each, which calls `expect` on what the
learner's code gives for inputs that the notebook does not show.
"""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from grpo_kit.config.errors import KitError, shown
from grpo_kit.config.paths import PROJECT_ROOT

EXERCISES: dict[str, "Exercise"] = {}  # filled by the modules `exercises_NN`, as they are imported


@dataclass(frozen=True)
class Exercise:
    """One exercise: `check(*answers)` raises `WrongAnswer` at the first mistake."""

    name: str
    title: str
    minutes: int
    difficulty: int
    check: Callable[..., None]


class WrongAnswer(Exception):
    """What a learner handed in is not right; its text is the sentence that the learner reads."""


@dataclass(frozen=True)
class Checked:
    """How an exercise was answered: whether it passed, and the sentence that says so."""

    exercise: str
    passed: bool
    message: str

    def __repr__(self) -> str:
        return f"{'✓' if self.passed else '✗'} {self.exercise}: {self.message}"

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
    raise WrongAnswer(f"{sentence} ({idea})" if idea else sentence)


def check(name: str, *answers: Any) -> Checked:
    """Check what was written for the exercise `name`, such as "06.1"; a wrong answer is told, not raised.

    Raises:
        KitError: there is no such exercise.
    """
    task = find_exercise(name)
    try:
        task.check(*answers)
    except WrongAnswer as mistake:
        return Checked(name, False, str(mistake))
    except NotImplementedError:
        return Checked(name, False, "not written yet: put your code in the place of `raise NotImplementedError()`")
    except Exception as error:
        return Checked(name, False, f"your code stopped with {type(error).__name__}: {error}")
    return Checked(name, True, f"{task.title}: right")


def find_exercise(name: str) -> Exercise:
    """Return the exercise of that name.

    Raises:
        KitError: there is none.
    """
    module = f"grpo_kit.course.exercises_{name.partition('.')[0]}"
    if importlib.util.find_spec(module) is not None:
        importlib.import_module(module)
    if name not in EXERCISES:
        there = ", ".join(sorted(EXERCISES)) or "none of this notebook"
        raise KitError(f"exercise: found {shown(name)}, allowed: {there}; names are as in the notebooks, such as 06.1")
    return EXERCISES[name]


def catch_up(name: str) -> None:
    """Define in the notebook what the exercise `name` asks for, as its solution does, and show that code."""
    from IPython import get_ipython

    find_exercise(name)
    for path in sorted((PROJECT_ROOT / "notebooks").glob(f"{name.partition('.')[0]}_*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if {f"exercise:{name}", "solution"} <= set(cell["metadata"].get("tags", [])):
                code = "".join(cell["source"])
                print(code)
                get_ipython().run_cell(code)


def _equal(found: Any, expected: Any, tolerance: float) -> bool:
    found, expected = _plain(found), _plain(expected)
    if found.shape != expected.shape:
        return False
    if found.dtype.kind in "fiub" and expected.dtype.kind in "fiub":
        return bool(np.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True))
    return found.tolist() == expected.tolist()


def _plain(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def _short(value: Any) -> str:
    value = _plain(value)
    return np.array2string(value, precision=4, suppress_small=True, threshold=12, separator=", ")
