"""A notebook's parameters: which it declares, and whether a value is of the declared type.

papermill only warns of a parameter that a notebook does not have, and enforces no annotation. So names and values are
checked before the first notebook starts, and again by `check_parameters(globals())` in each notebook.
"""

import ast
import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from grpo_kit.config import KitError, nearest, one_line

TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict, "tuple": tuple}
INJECTED = "# Parameters"  # the first line of the cell that papermill adds


class NotebookError(KitError):
    """A notebook or a parameter that does not exist, or a value that the notebook does not take."""


@dataclass(frozen=True)
class Parameter:
    """What a notebook declares of a parameter."""

    kind: str  # the type as annotated, or as the default shows
    default: object = None

    def fits(self, value: object) -> bool:
        """Whether a value is of the type: a whole number is a float, too; true is no number; neither is nan or inf."""
        if self.kind == "float" and type(value) in (int, float):
            return abs(value) <= sys.float_info.max  # false for nan
        return type(value) is TYPES.get(self.kind)

    def refusal(self, name: str, found: object) -> NotebookError:
        """The error that says which values the parameter of that name takes."""
        allowed = self.kind if self.kind in TYPES else f"one of {', '.join(TYPES)}"
        allowed += "" if self.default is None else f", such as {self.default!r:.60}"
        return NotebookError(f"parameter {name}: found {found!r:.60}, allowed: {allowed}; give a value of that type")

    def read(self, name: str, given: object) -> object:
        """A value, given as text or as it is, as one of the type; a `NotebookError` where it is none."""
        try:
            value = self._from_text(given) if isinstance(given, str) else given
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # as literal_eval is documented
            value = None
        if not self.fits(value):
            raise self.refusal(name, given)
        return float(value) if self.kind == "float" else value

    def _from_text(self, text: str) -> object:
        if self.kind in ("str", "int", "float"):
            return TYPES[self.kind](text)
        text = text.lower() if self.kind == "bool" else text
        try:
            return json.loads(text)
        except ValueError:
            return ast.literal_eval(text)


def declared_parameters(path: Path) -> Mapping[str, Parameter]:
    """The parameters of a notebook by name, from its cell that is tagged `parameters`; else a `NotebookError`."""
    return _read_parameters(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=100)  # a grid asks for the same notebooks again for each of its trials
def _read_parameters(path: Path, _changed: int) -> Mapping[str, Parameter]:
    import nbformat

    try:
        cells = nbformat.read(path, as_version=4).cells
    except Exception as error:  # nbformat raises many: of JSON, of its schema, of a version that it does not know
        raise NotebookError(f"{path}: not a notebook: {one_line(error, 100)}") from None
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return _assigned(tagged[0]) if tagged else {}


def _assigned(source: str) -> dict[str, Parameter]:
    """What a cell's code assigns to names: `name: type = default`, or `name = default`."""
    found = {}
    for statement in _statements(source):
        if isinstance(statement, ast.AnnAssign | ast.Assign):
            annotated = isinstance(statement, ast.AnnAssign)
            target = statement.target if annotated else statement.targets[0]
            try:
                default = ast.literal_eval(statement.value)
            except (ValueError, TypeError):  # not a literal
                default = None
            kind = ast.unparse(statement.annotation) if annotated else type(default).__name__
            if isinstance(target, ast.Name):
                found[target.id] = Parameter(kind.split("[")[0], default)
    return found


def _statements(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError:  # a cell with a magic: it declares no parameters
        return []


def settings_in(changes: str) -> dict[str, object]:
    """The settings in a notebook's parameter `changes`, by dotted key: a JSON object as text; "" has none.

    A `NotebookError` where it is no JSON object.
    """
    try:
        found = json.loads(changes or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        allowed = """a JSON object, such as '{"training_settings.beta": 0.1}'"""
        raise NotebookError(f"parameter changes: found {changes!r:.60}, allowed: {allowed}")
    return found


def check_parameters(namespace: Mapping[str, object]) -> dict[str, object]:
    """The parameters of a notebook, of whose `globals()` this is called, by name; a `NotebookError` where one is wrong.

    What was declared is read from the parameters cell (annotated assignments and nothing else), what was injected from
    the cell that papermill added, both in IPython's own history of the session. Every injected name must be declared,
    every value of its declared type.
    """
    history = [str(source) for source in namespace.get("In", [])]
    cells = ((source, _statements(source)) for source in reversed(history))
    only_annotated = (source for source, body in cells if body and all(isinstance(s, ast.AnnAssign) for s in body))
    declared = _assigned(next(only_annotated, ""))
    if not declared:  # nbval keeps no history of its cells: take what the session has annotated so far
        found = namespace.get("__annotations__", {})
        kinds = {name: kind if isinstance(kind, str) else getattr(kind, "__name__", "") for name, kind in found.items()}
        declared = {name: Parameter(kind) for name, kind in kinds.items() if kind in TYPES and name in namespace}
    if not declared:
        raise NotebookError("parameters: found no cell that declares them. Run the parameters cell first.")
    for name in [name for source in history if source.lstrip().startswith(INJECTED) for name in _assigned(source)]:
        if name not in declared:
            allowed = f"{nearest(name, declared)}; allowed: {', '.join(declared)}"
            raise NotebookError(f"parameter {name}: not in this notebook{allowed}")
    for name, parameter in declared.items():
        if not parameter.fits(namespace[name]):
            raise parameter.refusal(name, namespace[name])
    return {name: namespace[name] for name in declared}
