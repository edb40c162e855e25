"""R2: a crash before every single write, rename, fsync and removal; then the run goes on."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from grpo_kit.experiment import Experiment
from tests.chaos import Outcome, fault
from tests.chaos.disk import Disk
from tests.chaos.experiment import Ended, child, experiment, reference, run_through, scratch, train_in
from tests.chaos.kills import newest, still_there, through

CRASHED, NOT_POSSIBLE = 77, 78  # how a child says that it died as asked; that there was nothing to tear

Kind = Callable[[Disk], bool]  # what a crash does to the files; False where it cannot happen there


def killed(disk: Disk) -> bool:
    """The process is gone; what it wrote is there."""
    return True


def torn(disk: Disk) -> bool:
    """The process is gone in the middle of a write."""
    return disk.tear()


def power_cut_empty(disk: Disk) -> bool:
    """The machine is gone: what was not flushed is empty."""
    disk.cut_power(0.0, entries=True)
    return True


def power_cut_half(disk: Disk) -> bool:
    """The machine is gone: of what was not flushed, half is there."""
    disk.cut_power(0.5, entries=True)
    return True


def power_cut_gone(disk: Disk) -> bool:
    """The machine is gone: what was not flushed is not there, nor are names in folders that were not flushed."""
    disk.cut_power(0.0, entries=False)
    return True


KINDS: tuple[Kind, ...] = (killed, torn, power_cut_empty, power_cut_half, power_cut_gone)

NEEDED = {("rename", ".replaced-best"), ("rename", "checkpoints/iter_000002"), ("rmdir", "checkpoints/iter_000000")}


@fault("R2", "crash at every write, rename, fsync")
def crashes(short: bool) -> Outcome:
    """Crash in a run that begins, and in one that goes on with an iteration that was not committed."""
    outcome, seen = Outcome(0), set()
    with scratch() as place:
        begun = cut_short(resumed_kit(), place / "begun")
        for name, kit, template in (("first", first_kit(), None), ("resumed", resumed_kit(), begun)):
            expected = reference(kit, place / f"reference_{name}")
            asked = operations(kit, place / f"count_{name}", template)
            seen |= set(asked)
            for number, kind in chosen(len(asked), short):
                outcome += crash(kit, place / f"{name}_{number}_{kind.__name__}", template, number, kind, expected)
    if not seen >= NEEDED:
        raise RuntimeError(f"not every kind of operation was met: {sorted(NEEDED - seen)}; choose another seed")
    return outcome


def first_kit() -> Experiment:
    """One iteration, from nothing, which makes a better policy."""
    return experiment(num_iterations=1, prompts_per_iteration=1)


def resumed_kit() -> Experiment:
    """Two iterations with a validation each."""
    return experiment(num_iterations=2, prompts_per_iteration=1, validate_every=1)


def chosen(count: int, short: bool) -> Iterator[tuple[int, Kind]]:
    """Every operation with every kind of crash; in the short form a few operations, each with the next kind."""
    if not short:
        yield from ((number, kind) for number in range(count + 1) for kind in KINDS)
        return
    step = max(1, count // 8)
    for turn, number in enumerate(range(count, 0, -step)):
        yield number, KINDS[(turn + 2) % len(KINDS)]


def operations(kit: Experiment, folder: Path, begun: Path | None = None) -> list[tuple[str, str]]:
    """What a run asks of the disk, in order: operation, file inside the run."""
    log = folder.with_suffix(".operations")

    def note(disk: Disk, number: int, operation: str, place: Path) -> None:
        with log.open("a") as file:
            file.write(f"{operation} {place.relative_to(folder)}\n")

    prepare(folder, begun)
    ended = child(lambda: watched(kit, folder, note), folder.with_suffix(".log")).finish()
    if ended.code != 0:
        raise RuntimeError(f"the run that was only to be watched failed: {ended.text[-500:]}")
    return [tuple(line.split(" ", 1)) for line in log.read_text().splitlines()]


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


def crash(
    kit: Experiment, folder: Path, begun: Path | None, number: int, kind: Kind, expected: dict[str, str]
) -> Outcome:
    """Crash before one operation, see what is committed, and go on."""
    prepare(folder, begun)
    before = newest(folder)
    ended = die_before(kit, folder, number, kind)
    if ended.code == NOT_POSSIBLE:
        shutil.rmtree(folder)
        return Outcome(0)
    if ended.code != CRASHED:
        raise RuntimeError(f"{folder.name}: the crash itself failed: {ended.text[-500:]}")
    outcome = still_there(folder, before)
    again = run_through(kit, folder)
    outcome += through(folder, again.code, again.text, expected)
    shutil.rmtree(folder)
    return outcome


def die_before(kit: Experiment, folder: Path, number: int, kind: Kind) -> Ended:
    """Train in a child that dies before operation `number`, or when all are done."""

    def die(disk: Disk, at: int, operation: str = "", place: Path | None = None) -> None:
        if at == number:
            os._exit(CRASHED if kind(disk) else NOT_POSSIBLE)

    def work() -> None:
        disk = watched(kit, folder, die)
        disk.inside = True
        die(disk, disk.number)

    return child(work, folder.with_suffix(".log")).finish()
