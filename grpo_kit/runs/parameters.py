"""A notebook's parameters: which it declares, and whether a value is of the declared type.

papermill only warns of a parameter that a notebook does not have, writes its name into the notebook's code as it
stands, and enforces no annotation. So the kit checks names and values before the first notebook starts, and each
notebook's second code cell checks them again by `check_parameters(globals())`.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_kit.config import KitError, nearest, one_line

TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict, "tuple": tuple}
INJECTED = "# Parameters"  # the first line of the cell that papermill adds


class NotebookError(KitError):
    """A notebook or a parameter that does not exist, or a value that the notebook does not take."""


@dataclass(frozen=True)
class Parameter:
    """What a notebook declares of a parameter: its type, as annotated or as its default shows, and its default."""

    kind: str  # a key of `TYPES`, or a type that cannot be given
    default: object = None


# --- what a notebook declares -----------------------------------------------------------------------------------------


def declared_parameters(path: Path) -> Mapping[str, Parameter]:
    """The parameters by name of a notebook's cell that is tagged `parameters`.

    Raises:
        NotebookError: the file is no notebook.
    """
    return _inspected(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=100)  # a grid asks for the same notebooks again for each of its trials
def _inspected(path: Path, _changed: int) -> Mapping[str, Parameter]:
    import papermill

    try:
        found = papermill.inspect_notebook(papermill_path(path))
    except ValueError as error:  # not JSON, or not a notebook
        raise NotebookError(f"{path}: not a notebook: {one_line(error, 100)}") from None
    return {name: _parameter(entry["inferred_type_name"], entry["default"]) for name, entry in found.items()}


def papermill_path(path: Path) -> str:
    """A path as papermill takes it: it formats paths with the parameters, so braces in a folder's name are doubled."""
    return re.sub(r"([{}])", r"\1\1", str(path))


def _parameter(annotation: str | None, source: str) -> Parameter:
    try:
        default = ast.literal_eval(source)
    except (ValueError, SyntaxError):
        default = None
    return Parameter(type(default).__name__ if annotation in ("None", "", None) else _kind(annotation), default)


def _kind(annotation: str) -> str:
    return annotation.split("[")[0].strip()


# --- values -----------------------------------------------------------------------------------------------------------


def read_value(name: str, given: object, parameter: Parameter) -> object:
    """Read a value, given as text or as it is, as the type that the notebook declares.

    Raises:
        NotebookError: it is not of that type, or the type is none of `TYPES`.
    """
    value = given
    if isinstance(given, str) and parameter.kind != "str":
        try:
            value = _from_text(given, parameter.kind)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # as literal_eval is documented
            value = None
    if type(value) is int and parameter.kind == "float":
        value = float(value)
    if not _fits(value, parameter.kind):
        example = f", such as {parameter.default!r:.60}" if parameter.kind in TYPES else f": one of {', '.join(TYPES)}"
        raise NotebookError(f"parameter {name}: found {given!r:.60}, allowed: {parameter.kind:.40}{example}")
    return value


def _from_text(text: str, kind: str) -> object:
    if kind in ("int", "float"):
        return TYPES[kind](text)
    text = text.lower() if kind == "bool" else text
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def _fits(value: object, kind: str) -> bool:
    """Whether a value is of a type: a whole number is a float, too; true is no number; neither is nan or inf."""
    exact = type(value) is TYPES.get(kind) or (kind == "float" and type(value) is int)
    return exact and not (isinstance(value, float) and not math.isfinite(value))


# --- in a notebook ----------------------------------------------------------------------------------------------------


def check_parameters(namespace: Mapping[str, object]) -> dict[str, object]:
    """Check a notebook's parameters: every injected name must be declared, every value of its declared type.

    What was declared is read from the parameters cell (annotated assignments and nothing else), what was injected from
    the cell that papermill added, both in IPython's own history of the session.

    Args:
        namespace: the notebook's `globals()`.

    Returns:
        The parameters by name.

    Raises:
        NotebookError: an unknown name (with the nearest known one), or a wrong type.
    """
    history = [str(source) for source in namespace.get("In", [])]
    declared = _declared(history) or _annotated(namespace)
    if not declared:
        raise NotebookError("parameters: found no cell that declares them. Run the parameters cell first.")
    for name in _injected(history):
        if name not in declared:
            hint = f"{nearest(name, declared)}; allowed: {', '.join(declared)}"
            raise NotebookError(f"parameter {name}: not in this notebook{hint}")
    for name, kind in declared.items():
        if not _fits(namespace[name], kind):
            raise NotebookError(
                f"parameter {name}: found {namespace[name]!r:.60}, allowed: {kind}. Give a value of that type."
            )
    return {name: namespace[name] for name in declared}


def _declared(history: Sequence[str]) -> dict[str, str]:
    """Return name → type of the newest cell that holds annotated assignments only."""
    for source in reversed(history):
        body = _statements(source)
        if body and all(isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name) for s in body):
            return {s.target.id: _kind(ast.unparse(s.annotation)) for s in body}
    return {}


def _annotated(namespace: Mapping[str, object]) -> dict[str, str]:
    """Return name → type of what the session has annotated so far: nbval keeps no history of its cells."""
    found = namespace.get("__annotations__", {})
    kinds = {name: kind if isinstance(kind, str) else getattr(kind, "__name__", "") for name, kind in found.items()}
    return {name: kind for name, kind in kinds.items() if kind in TYPES and name in namespace}


def _injected(history: Sequence[str]) -> list[str]:
    """Return the names that papermill assigned."""
    body = [s for source in history if source.lstrip().startswith(INJECTED) for s in _statements(source)]
    targets = [target for s in body if isinstance(s, ast.Assign) for target in s.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _statements(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError:  # a cell with a magic: it declares no parameters
        return []
