"""What a notebook needs at its start: its parameters checked before anything long begins.

papermill only warns of a parameter that a notebook does not have, and enforces no annotation; so each notebook's second
code cell calls `check_parameters(globals())`.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping, Sequence

from grpo_kit.config import KitError

TYPES = {"int": int, "float": float, "str": str, "bool": bool}
INJECTED = "# Parameters"  # the first line of the cell that papermill adds


class ParameterError(KitError):
    """A notebook was given a parameter that it does not have, or a value of another type."""


def check_parameters(namespace: Mapping[str, object]) -> dict[str, object]:
    """Check a notebook's parameters: every injected name must be declared, every value of its declared type.

    What was declared is read from the parameters cell (annotated assignments and nothing else), what was injected from
    the cell that papermill added, both in IPython's own history of the session.

    Args:
        namespace: the notebook's `globals()`.

    Returns:
        The parameters by name.

    Raises:
        ParameterError: an unknown name (with the nearest known one), or a wrong type.
    """
    history = [str(source) for source in namespace.get("In", [])]
    declared = _declared(history) or _annotated(namespace)
    if not declared:
        raise ParameterError("parameters: found no cell that declares them. Run the parameters cell first.")
    for name in _injected(history):
        if name not in declared:
            near = difflib.get_close_matches(name, declared, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ParameterError(f"parameter {name}: not in this notebook, allowed: {', '.join(declared)}.{hint}")
    for name, kind in declared.items():
        _check_type(name, namespace[name], kind)
    return {name: namespace[name] for name in declared}


def _check_type(name: str, value: object, kind: str) -> None:
    allowed = (int, float) if kind == "float" else (TYPES[kind],)
    if type(value) not in allowed:
        raise ParameterError(f"parameter {name}: found {value!r:.60}, allowed: {kind}. Give a value of that type.")


def _declared(history: Sequence[str]) -> dict[str, str]:
    """Return name → type of the newest cell that holds annotated assignments only."""
    for source in reversed(history):
        body = _statements(source)
        if body and all(isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name) for s in body):
            return {s.target.id: ast.unparse(s.annotation) for s in body}
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
