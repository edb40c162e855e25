"""Where a branch comes from: the run, the iteration, and the settings that it changed there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_kit.config import KitError
from grpo_kit.runs.record import RecordError, read_json

FILE = "branch.json"


@dataclass(frozen=True)
class Origin:
    """What `branch.json` says: nothing in it is a path of this machine."""

    parent: str  # the run's name
    iteration: int  # the last one that both have
    settings: dict[str, list[Any]]  # dotted key → [the parent's value, the branch's], in the order of the config
    best_from_parent: bool  # whether the parent had chosen its best/ by then
    differs: str | None = None  # how the state that was computed again differs from the parent's record, if it does


def read_origin(run_dir: Path) -> Origin | None:
    """Where a run comes from; None where it is no branch.

    Raises:
        KitError: `branch.json` is damaged.
    """
    place = run_dir / FILE
    try:
        return Origin(**read_json(place)) if place.is_file() else None
    except (RecordError, TypeError) as error:
        raise KitError(
            f"{place}: no record of a branch ({error}). Restore the file, or make the branch again"
        ) from error


def first_own_validation(run_dir: Path) -> int:
    """The first iteration whose validation is of a policy that `best/` can hold.

    0, but for a branch that began before its parent had chosen its best: the policies validated until then are gone.
    """
    origin = read_origin(run_dir)
    return 0 if origin is None or origin.best_from_parent else origin.iteration + 1


def refuse_branch_without_checkpoint(run_dir: Path) -> None:
    """Refuse to begin a branch that has no checkpoint at iteration 0: its first iterations are its parent's.

    Raises:
        KitError: the run is a branch.
    """
    origin = read_origin(run_dir)
    if origin is not None:
        raise KitError(
            f"run {run_dir}: none of its checkpoints is whole, and a branch of {origin.parent} cannot begin at "
            f"iteration 0. Branch again: grpo-kit replay {origin.parent} --iteration {origin.iteration} --branch"
        )
