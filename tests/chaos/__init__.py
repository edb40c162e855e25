"""Faults that a run must survive, each tried for real: `python -m tests.chaos [--short] [R1 R2 …]` prints the outcome.

A fault is a function in a module of this package that carries `@fault`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outcome:
    """What came of one fault.

    `lost` counts what should have been kept and was not: a committed iteration, a byte that an uninterrupted run has,
    a damage that was not noticed. `repaired` counts the times that a run went on only after a repair by hand.
    `remarks` say in one line each what was lost and with which seed or place it can be had again.
    """

    tried: int
    lost: int = 0
    repaired: int = 0
    remarks: tuple[str, ...] = field(default=())

    def __add__(self, other: "Outcome") -> "Outcome":
        remarks = self.remarks + other.remarks
        return Outcome(self.tried + other.tried, self.lost + other.lost, self.repaired + other.repaired, remarks)

    @property
    def withstood(self) -> bool:
        """Something was tried, and nothing was lost or repaired."""
        return self.tried > 0 and not self.lost and not self.repaired


@dataclass(frozen=True)
class Fault:
    """A fault as it stands in RELIABILITY.md, and the function that tries it; `short` asks for a few tries only."""

    name: str
    title: str
    run: Callable[[bool], Outcome]


FAULTS: dict[str, Fault] = {}


def fault(name: str, title: str) -> Callable[[Callable[[bool], Outcome]], Callable[[bool], Outcome]]:
    """Register a function `(short: bool) -> Outcome` as the one that tries fault `name`.

    Raises:
        ValueError: another function has that name.
    """

    def register(run: Callable[[bool], Outcome]) -> Callable[[bool], Outcome]:
        if name in FAULTS:
            raise ValueError(f"fault {name}: registered twice; give one of them another name")
        FAULTS[name] = Fault(name, title, run)
        return run

    return register


def every_fault() -> list[Fault]:
    """All faults, in the order of their numbers."""
    for module in pkgutil.iter_modules(__path__):
        if module.name != "__main__":
            importlib.import_module(f"{__name__}.{module.name}")
    return sorted(FAULTS.values(), key=lambda one: (int("".join(filter(str.isdigit, one.name)) or 0), one.name))


def table(rows: Sequence[tuple[Fault, Outcome]]) -> str:
    """Fault, tried, lost, repaired by hand: one line each, and below them the remarks."""
    cells = [(f"{one.name:<4} {one.title}", *map(str, (o.tried, o.lost, o.repaired))) for one, o in rows]
    head = ("fault", "tried", "lost", "repaired by hand")
    width = max(len(row[0]) for row in [head, *cells])
    lines = [f"{row[0]:<{width}}  {row[1]:>6}  {row[2]:>5}  {row[3]:>16}" for row in [head, *cells]]
    return "\n".join(lines + [f"{one.name}: {remark}" for one, outcome in rows for remark in outcome.remarks])
