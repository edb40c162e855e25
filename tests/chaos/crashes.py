"""R2: a crash before every single write, rename, fsync and removal; then the run goes on."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from grpo_kit.experiment import Experiment
from tests.chaos import Outcome, fault
from tests.chaos.disk import Disk
from tests.chaos.experiment import child, experiment, reference, run_through, scratch, train_in
from tests.chaos.kills import newest, still_there, through

Kind = Callable[[Disk, Path], bool]  # what a crash makes of a copy of the disk; False where it cannot happen there


def killed(disk: Disk, target: Path) -> bool:
    """The process is gone; what it wrote is there."""
    return True


def torn(disk: Disk, target: Path) -> bool:
    """The process is gone in the middle of a write."""
    return disk.tear(target)


def power_cut_empty(disk: Disk, target: Path) -> bool:
    """The machine is gone: what was not flushed is empty."""
    disk.cut_power(target, 0.0, entries=True)
    return True


def power_cut_half(disk: Disk, target: Path) -> bool:
    """The machine is gone: of what was not flushed, half is there."""
    disk.cut_power(target, 0.5, entries=True)
    return True


def power_cut_gone(disk: Disk, target: Path) -> bool:
    """The machine is gone: what was not flushed is not there, nor are names in folders that were not flushed."""
    disk.cut_power(target, 0.0, entries=False)
    return True


KINDS: tuple[Kind, ...] = (killed, torn, power_cut_empty, power_cut_half, power_cut_gone)
CRASHED = 77  # how a child says that it died as asked


@fault("R2", "crash at every write, rename, fsync")
def crashes(short: bool) -> Outcome:
    """Crash in a run that begins, and in one that goes on with an iteration that was not committed.

    The run itself is not ended: before each operation the disk is copied as a crash would leave it. Crashes that leave
    the same files behind are continued once, since what a run does then depends on these alone.
    """
    choose = two_of if short else list
    with scratch() as place:
        first, resumed = first_kit(), resumed_kit()
        stride = 16 if short else 1
        outcome = every_crash(first, place / "first", None, choose, stride)
        return outcome + every_crash(resumed, place / "resumed", cut_short(resumed, place / "begun"), choose, stride)


def two_of(states: Iterable[str]) -> list[str]:
    """Two states, one of the first half and one of the second."""
    every = list(states)
    return every[len(every) // 4 :: len(every) // 2 + 1]


def every_crash(
    kit: Experiment,
    place: Path,
    begun: Path | None,
    choose: Callable[[Iterable[str]], Iterable[str]],
    stride: int = 1,
    kinds: Sequence[Kind] = KINDS,
) -> Outcome:
    """The crashes of one run, at every so many operations, that leave the chosen states: go on, and compare."""
    place.mkdir()
    expected, states = reference(kit, place / "reference"), collect(kit, place, begun, stride, kinds)
    outcome, before = Outcome(0), -1 if begun is None else newest(begun)
    for state in choose(states):
        folder, times = place / "states" / state, len(states[state])
        found = still_there(folder, before)
        again = run_through(kit, folder)
        found += through(folder, again.code, again.text, expected)
        outcome += Outcome(times, found.lost * times, found.repaired * times, found.remarks)
        shutil.rmtree(folder)
    return outcome


def collect(
    kit: Experiment, place: Path, begun: Path | None, stride: int = 1, kinds: Sequence[Kind] = KINDS
) -> dict[str, list[str]]:
    """The different states that crashes of one run leave, in `place/states`: name → the crashes that leave it."""
    crashes, log = place / "crashes.jsonl", place / "watched.log"
    ended = child(lambda: _watch_crashes(kit, place / "watched", begun, crashes, stride, kinds), log).finish()
    if ended.code != 0:
        raise RuntimeError(f"the run that was only to be watched failed: {ended.text[-500:]}")
    states: dict[str, list[str]] = {}
    for name, state in map(json.loads, crashes.read_text().splitlines()):
        states.setdefault(state, []).append(name)
    return states


def _watch_crashes(
    kit: Experiment, folder: Path, begun: Path | None, crashes: Path, stride: int, kinds: Sequence[Kind]
) -> None:
    seen: dict[str, str] = {}  # digest → the first crash that left it

    def crash(disk: Disk, number: int, operation: str, place: Path) -> None:
        for kind in kinds if number % stride == 0 else ():
            target = folder.with_name("states") / f"{number}_{kind.__name__}"
            disk.copy(target)
            possible = kind(disk, target)
            first = seen.setdefault(digest(target), target.name) if possible else ""
            if first != target.name:
                shutil.rmtree(target)
            if possible:
                with crashes.open("a") as file:
                    file.write(json.dumps([f"{target.name} before {operation} {place.name}", first]) + "\n")

    prepare(folder, begun)
    disk = watched(kit, folder, crash)
    disk.inside = True
    crash(disk, disk.number, "end", folder)


def digest(folder: Path) -> str:
    """All that a run reads: names and contents, but for the log and the lock."""
    files = sorted(file for file in folder.rglob("*") if file.name not in ("training.log", ".lock"))
    whole = hashlib.sha256()
    for file in files:
        content = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "folder"
        whole.update(f"{file.relative_to(folder)} {content}\n".encode())
    return whole.hexdigest()


def first_kit() -> Experiment:
    """One iteration, from nothing, which makes a better policy."""
    return experiment(num_iterations=1, prompts_per_iteration=1)


def resumed_kit() -> Experiment:
    """Two iterations with a validation each."""
    return experiment(num_iterations=2, prompts_per_iteration=1, validate_every=1)


def watched(kit: Experiment, folder: Path, before: Callable[[Disk, int, str, Path], None]) -> Disk:
    """Train with `before` called before each operation."""
    disk = Disk(folder, before)
    disk.watch()
    train_in(kit, folder)
    return disk


def prepare(folder: Path, begun: Path | None) -> None:
    """A folder with a run that has begun, or an empty one."""
    if begun is None:
        folder.mkdir()
    else:
        shutil.copytree(begun, folder)


def cut_short(kit: Experiment, folder: Path) -> Path:
    """A run whose second iteration is done and not committed: its process died before the rename."""
    folder.mkdir()

    def die(disk: Disk, number: int, operation: str, place: Path) -> None:
        if (operation, place.name) == ("rename", "iter_000002"):
            os._exit(CRASHED)

    ended = child(lambda: watched(kit, folder, die), folder.with_suffix(".log")).finish()
    if ended.code != CRASHED or newest(folder) != 1:
        raise RuntimeError(f"no run was cut before its second commit: {ended.text[-500:]}")
    return folder
