"""The exercises of the committed notebooks: what a solution cell defines, and what the learner's stub of it does."""

import ast
import builtins
import contextlib
import symtable
from pathlib import Path
from typing import Any

import nbformat

from grpo_kit.config import PROJECT_ROOT
from grpo_kit.course import editions

NOTEBOOKS = PROJECT_ROOT / "notebooks"
COMPREHENSIONS = ("listcomp", "setcomp", "dictcomp", "genexpr")  # run where they stand


def notebook_of(name: str) -> Path:
    """Return the notebook that the exercise `name` stands in: "06.1" is one of 06."""
    (path,) = NOTEBOOKS.glob(f"{name.partition('.')[0]}_*.ipynb")
    return path


def solution(name: str) -> dict[str, Any]:
    """Run the solution cell of the exercise `name`; returns the names that it defines.

    It runs in a namespace of its own, with what it uses of the notebook's earlier cells: imports, functions, values.
    A name that several cells define is that of the last one before it.
    """
    return _run(name, str)


def stub(name: str) -> dict[str, Any]:
    """Run the same cell as the learner's edition has it; returns the names that it defines before it stops."""
    return _run(name, editions.stub)


def _run(name: str, edition: Any) -> dict[str, Any]:
    cells = [cell for cell in nbformat.read(notebook_of(name), as_version=4).cells if cell.cell_type == "code"]
    wanted = {f"exercise:{name}", "solution"}
    (place,) = [n for n, cell in enumerate(cells) if wanted <= set(cell.metadata.get("tags", []))]
    source = cells[place].source
    statements = [node for cell in cells[:place] for node in ast.parse(cell.source).body]
    namespace: dict[str, Any] = {"__name__": "notebook"}
    exec(compile(ast.Module(_needed(statements, used(source)), []), name, "exec"), namespace)
    with contextlib.suppress(NotImplementedError):
        exec(compile(edition(source), name, "exec"), namespace)
    return {key: namespace[key] for key in bound(ast.parse(source).body) if key in namespace}


def _needed(statements: list[ast.stmt], wanted: set[str]) -> list[ast.stmt]:
    """Return the statements that define the wanted names, and what those use in turn, in their order."""
    asked, kept = [(name, len(statements)) for name in wanted], set()
    for name, end in asked:  # it grows; of several definitions, the last one before its use counts
        places = [n for n, node in enumerate(statements[:end]) if name in bound([node])]
        if places and (place := places[-1]) not in kept:
            kept.add(place)
            source, node = ast.unparse(statements[place]), statements[place]
            asked += [(other, place) for other in used(source, inside=False)]
            asked += [(other, len(statements)) for other in used(source) - used(source, inside=False)]
            asked += [(name, place)] * isinstance(node, ast.AugAssign)  # its name must have been there
    return [statements[place] for place in sorted(kept)]


def used(source: str, inside: bool = True) -> set[str]:
    """Return the global names that code reads, also (inside) those that its functions look up."""
    tables, names = [symtable.symtable(source, "cell", "exec")], set()
    for table in tables:
        children = table.get_children()
        tables += [one for one in children if inside or one.get_name() in COMPREHENSIONS]
        top = table.get_type() == "module"
        names |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return names - set(dir(builtins))


def bound(nodes: list[ast.stmt]) -> set[str]:
    """Return the names that statements define, at the top of a cell."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            stored = [n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
            names |= {n.id for n in stored}
    return names
