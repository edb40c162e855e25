"""`python -m benchmarks.size.house`: the shape of the package, counted from its files, beside what it may be.

A room is a folder of the package or a module loose at its root. All imports count: those inside functions, those under
`TYPE_CHECKING`, and names that a package loads when they are first used. Exit code 1 tells that a figure is missed.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import networkx

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "grpo_kit"
FLOORS = (  # from the ground up: a room imports from the floors below its own
    {"config", "shapeworld"},
    {"grpo", "runs"},
    {"models", "rewards"},
    {"experiment", "rollout"},
    {"evaluation"},
    {"training", "show"},
    {"preflight", "course"},
    {"cli"},
)
Function = ast.FunctionDef | ast.AsyncFunctionDef
LAZY = "lazy_names"  # the package's function whose table names modules as text


@dataclass(frozen=True)
class Import:
    """One module of the package names another, on a line of its file."""

    source: str  # dotted, below the package: `training.step`
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


@dataclass(frozen=True)
class Figure:
    """One counted figure and the most that it may be."""

    name: str
    found: float
    most: float
    where: str = ""  # the worst place, or what is too much

    @property
    def holds(self) -> bool:
        """Whether it is within its bound."""
        return self.found <= self.most


def modules(root: Path = PROJECT_ROOT) -> dict[str, Path]:
    """The modules of the package, dotted name below it → file; the package's own `__init__` has the name ""."""
    package = root / PACKAGE
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path = PROJECT_ROOT) -> list[Import]:
    """Every import of one module of the package by another."""
    known = modules(root)
    found = []
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for target, line in [*_imported(tree, known), *_loaded_later(tree, name, path.name == "__init__.py")]:
            if target in known and target != name:
                found.append(Import(name, target, line))
    return found


def _imported(tree: ast.Module, known: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    """What import statements name, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, rest = alias.name.partition(".")
                if package == PACKAGE:
                    yield rest, node.lineno
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            base = node.module.partition(".")[2]
            for alias in node.names:
                full = f"{base}.{alias.name}".strip(".")
                yield full if full in known else base, node.lineno


def _loaded_later(tree: ast.Module, name: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """What the tables of names that are loaded when first used name; the package's own stand above all floors."""
    uses = any(isinstance(node, ast.Name) and node.id == LAZY for node in ast.walk(tree))
    if not (is_package and uses and name):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield f"{name}.{value.value}", value.lineno


def room_of(module: str) -> str:
    """The room that a module stands in."""
    return module.partition(".")[0] or "__init__"


def rooms(root: Path = PROJECT_ROOT) -> set[str]:
    """Folders of the package, and modules loose at its root."""
    return {room_of(name) for name in modules(root)}


def upward(found: list[Import]) -> list[Import]:
    """Imports that do not go down: to a room on the same floor, or above."""
    floor = {room: number for number, names in enumerate(FLOORS) for room in names} | {"__init__": -1}
    return [
        one
        for one in found
        if (a := room_of(one.source)) != (b := room_of(one.target))
        and a != "__init__"
        and floor.get(b, 99) >= floor.get(a, 0)
    ]


def circles(found: list[Import]) -> list[list[str]]:
    """Groups of modules that import each other in a circle; importing a module of a package loads the package first."""
    graph = networkx.DiGraph((one.source, one.target) for one in found if one.source)
    return [sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1]


def functions(root: Path = PROJECT_ROOT) -> Iterator[tuple[str, Function, bool]]:
    """Every function of the package: the place where it stands, and whether others may call it by its name."""
    for path in modules(root).values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        reachable = {id(node) for owner in (tree, *classes) for node in owner.body}
        for node in ast.walk(tree):
            if isinstance(node, Function):
                place = f"{path.relative_to(root).as_posix()}:{node.lineno} {node.name}"
                yield place, node, id(node) in reachable and not node.name.startswith("_")


def is_typed(node: Function) -> bool:
    """Whether every argument (but self and cls) and the result carry an annotation."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    named = [one for one in arguments if one is not None and one.arg not in ("self", "cls")]
    return all(one.annotation for one in named) and (node.returns is not None or node.name == "__init__")


def figures(root: Path = PROJECT_ROOT) -> list[Figure]:
    """The house's figures."""
    files, found, every = modules(root), imports(root), list(functions(root))
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in files.items()}
    longest = max(lines, key=lines.__getitem__)
    lengths = {place: node.end_lineno - node.lineno + 1 for place, node, _ in every}
    tallest = max(lengths, key=lengths.__getitem__)
    public = [(place, node) for place, node, is_public in every if is_public]
    untyped = [place for place, node in public if not is_typed(node)]
    silent = [place for place, node in public if ast.get_docstring(node) is None]
    top = rooms(root)
    folders = {room for room in top if (root / PACKAGE / room).is_dir()}
    ring, back = circles(found), upward(found)
    return [
        Figure("rooms", len(top), 16),
        Figure("folders", len(folders), 11),
        Figure("modules loose at the root", len(top - folders), 4, ", ".join(sorted(top - folders))),
        Figure("floors", len(FLOORS), 8),
        Figure("imports back up", len(back), 0, "; ".join(map(str, back[:5]))),
        Figure("circles of modules", len(ring), 0, "; ".join(" ".join(group) for group in ring[:3])),
        Figure("lines of the package", sum(lines.values()), 17_000),
        Figure("lines of the longest file", lines[longest], 450, longest),
        Figure("lines of the longest function", lengths[tallest], 60, tallest),
        Figure("public functions without types", len(untyped), 0, "; ".join(untyped[:5])),
        Figure("public functions without a docstring", len(silent), 0, "; ".join(silent[:5])),
    ]


def main() -> None:
    """Print the figures; exit code 1 where one is missed."""
    found = figures()
    for figure in found:
        sign = "  " if figure.holds else "✗ "
        print(f"{sign}{figure.name:<38} {figure.found:>8,.0f}   at most {figure.most:>8,.0f}   {figure.where}")
    sys.exit(not all(figure.holds for figure in found))


if __name__ == "__main__":
    main()
