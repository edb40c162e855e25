"""How an iteration is written into a file's name, `iter_000012`, and read from it: nothing else knows that."""

import re
from collections.abc import Iterable
from pathlib import Path

_NUMBER = re.compile(r"(?:^|_)(\d{6,})(?=\D|$)")


def iteration_name(iteration: int) -> str:
    """The name of a checkpoint's folder, or a file's stem: `iter_000012`."""
    return f"iter_{iteration:06d}"


def iteration_of(path: Path | str) -> int | None:
    """The iteration that a file's or folder's name says, such as `validation_iter_000020.json`; None where none."""
    found = _NUMBER.search(Path(path).name)
    return None if found is None else int(found[1])


def iterations_of(paths: Iterable[Path]) -> dict[int, Path]:
    """iteration → path of those whose names say one, in the order of the iterations."""
    found = {number: path for path in paths if (number := iteration_of(path)) is not None}
    return dict(sorted(found.items()))
