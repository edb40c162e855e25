"""The sentences of the checks of exercises, with a hole `{}` for each value, as their modules write them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

MODULES = Path(__file__).parents[1] / "grpo_kit" / "course"
FRAMES = (  # a sentence with its misconception, a title with what is said of it
    "{} ({})",
    "{}: {}",
    "{}: right",
    "{}. Is your list from the worst to the best?",
)
NOTES = ("Predict, then look:", "Answer:", "Misconceptions that the check names:")  # of the teacher's notes
ANSWERS = {"beta 0", "random reward", "learning rate too high", "two samples"}  # which learners write, in English
_OTHERS = re.compile(
    r"exercise: |catch_up: |none of this|stopped with|another mistake|not written yet$|<div|def \{"
)  # not of a check


def course_messages() -> Iterator[tuple[str, str]]:
    """Yield each sentence with the module that it is in; titles of exercises, too."""
    for path in [MODULES / "exercise.py", *sorted(MODULES.glob("exercises_*.py"))]:
        yield from ((path.name, text) for text in _texts(ast.parse(path.read_text(encoding="utf-8"))) if _is_said(text))
    yield from (("exercise.py", frame) for frame in FRAMES)
    yield from (("editions.py", text) for text in NOTES)


def _texts(tree: ast.Module) -> list[str]:
    """The texts of a module, in order, but for docstrings; the values in an f-string are holes."""
    found = [node for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.Constant))]
    inside = {id(part) for node in found if isinstance(node, ast.JoinedStr) for part in ast.walk(node) if part != node}
    inside |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = sorted((n for n in found if id(n) not in inside), key=lambda node: (node.lineno, node.col_offset))
    return [_text(node) for node in found if isinstance(node, ast.JoinedStr) or isinstance(node.value, str)]


def _text(node: ast.JoinedStr | ast.Constant) -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)
    return re.sub(r"(?:\{[^{}]*\})+", "{}", text)  # two values side by side are one


def _is_said(text: str) -> bool:
    """Whether it is a sentence: with a word and a space, no code, no answer and no error for who writes a notebook."""
    if " " not in text or not re.search("[a-z]{2}", text) or text in ANSWERS or _OTHERS.match(text):
        return False
    try:
        ast.parse(text.replace("{}", "?"))
    except SyntaxError:
        return True
    return False
