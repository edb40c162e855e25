"""How an iteration is written into a file's name, `iter_000012`, and read from it: nothing else knows that."""

import re
from collections.abc import Iterable
from pathlib import Path

_NUMBER = re.compile(r"(?:^|_)(\d{6,})(?=\D|$)")


def iteration_name(iteration: int, prefix: str = "iter") -> str:
    """The name of a checkpoint's folder, or a file's stem: `iter_000012`."""
    return f"{prefix}_{iteration:06d}"


def iteration_of(path: Path | str) -> int | None:
    """The iteration that a file's or folder's name says, such as `validation_iter_000020.json`; None where none."""
    found = _NUMBER.search(Path(path).name)
    return None if found is None else int(found[1])


def iterations_of(paths: Iterable[Path]) -> dict[int, Path]:
    """iteration → path of those whose names say one, in the order of the iterations."""
    found = {number: path for path in paths if (number := iteration_of(path)) is not None}
    return dict(sorted(found.items()))


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """iteration → checkpoint in a run's `checkpoints/`, in order; one that is being written has another name."""
    return iterations_of(path for path in folder.glob("iter_*") if path.name[5:].isdecimal())


def validations_of(run_dir: Path) -> dict[int, Path]:
    """iteration → `validation_iter_000020.json` of a run, in order."""
    return iterations_of(run_dir.glob("validation_iter_*.json"))


def rollouts_of(run_dir: Path) -> dict[int, Path]:
    """iteration → `rollouts/iter_000020.parquet` of a run, in order."""
    return iterations_of(run_dir.glob("rollouts/iter_*.parquet"))


def files_of_iterations(run_dir: Path) -> list[Path]:
    """All files of a run whose names say an iteration, but for the checkpoints: records and their pictures."""
    records = ("validation_iter_*.json", "rollouts/iter_*.parquet")
    pictures = ("thumbnails/iter_*", "thumbnails/validation_*")
    found = [path for pattern in (*records, *pictures) for path in run_dir.glob(pattern)]
    return [path for path in found if iteration_of(path) is not None]
