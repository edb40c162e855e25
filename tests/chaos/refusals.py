"""R6: a disk that is full, or that nobody may write to: the last commit is whole, and one line says what to do."""

import ctypes
import errno
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from grpo_kit.config import PROJECT_ROOT
from grpo_kit.experiment import Experiment
from grpo_kit.training.loop import train
from tests.chaos import Outcome, fault
from tests.chaos.crashes import cut_short, watched
from tests.chaos.disk import Disk
from tests.chaos.experiment import Ended, child, experiment, reference, run_through, scratch, train_in
from tests.chaos.kills import command_line, newest, still_there, through

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOBODY = 65534
_NEW_NAMESPACES = 0x10020000  # CLONE_NEWUSER | CLONE_NEWNS


@fault("R6", "disk full, read-only, no permission")
def refusals(short: bool) -> Outcome:
    """Every operation refused in turn; a limit on a file's size; a small disk that fills up; no permission."""
    rng = random.Random(0)
    with scratch() as place:
        place.chmod(0o755)  # who has given up root must still be able to read
        kit = experiment(num_iterations=2 if short else 3, prompts_per_iteration=1, validate_every=1)
        expected = reference(kit, place / "reference")
        begun = cut_short(kit, place / "begun")
        outcome = Outcome(0)
        for number in rng.sample(range(60), 2) if short else range(100):
            outcome += refused_operation(kit, place / f"operation_{number}", begun, number, expected)
        for number in range(1 if short else 10):
            limit = int(1e3 * 10 ** rng.uniform(0, 3.5))  # bytes: from less than a picture to a policy's weights
            outcome += file_too_big(kit, place / f"limit_{number}", begun, limit, expected)
            outcome += small_disk(kit, place / f"small_{number}", begun, int(3e6 * rng.random()), expected)
        for number in range(1 if short else 5):
            outcome += permission_lost(kit, place / f"permission_{number}", expected)
        outcome += no_permission(kit, place / "forbidden")
        return outcome if short else outcome + command_refused(kit, place / "command", begun, expected)


def told(ended: Ended, folder: Path, before: int) -> Outcome:
    """One refusal: the commit is there, and one line, no traceback, names the folder, the commit and the way on."""
    outcome, last = still_there(folder, before), newest(folder)
    kept = "nothing is committed yet" if last < 0 else f"iteration {last} is committed"
    lines = [line for line in ended.text.splitlines() if line.startswith("KitError: ")]
    good = ended.code == 2 and len(lines) == 1 and str(folder) in lines[0] and kept in lines[0]
    good = good and ("the same command again" in lines[0] or (last < 0 and "choose a folder" in lines[0]))
    if not good or "Traceback" in ended.text or "Logging error" in ended.text:
        outcome += Outcome(0, lost=1, remarks=(f"{folder.name}: ended with {ended.code}: {ended.text.strip()[-500:]}",))
    return outcome


def refused(kit: Experiment, ended: Ended, folder: Path) -> Outcome:
    """A run on which the disk was to refuse something; nothing is tried where it came to its end before that."""
    through = ended.code == 0 and newest(folder) == kit.config.training_settings.num_iterations
    return Outcome(0) if through else told(ended, folder, 1)


def goes_on(kit: Experiment, folder: Path, expected: dict[str, str]) -> Outcome:
    """What was in the way is gone: the same call goes on to the end."""
    again = run_through(kit, folder)
    outcome = through(folder, again.code, again.text, expected)
    shutil.rmtree(folder)
    return outcome


def refused_operation(kit: Experiment, folder: Path, begun: Path, number: int, expected: dict[str, str]) -> Outcome:
    """From one operation on, the disk refuses everything."""
    shutil.copytree(begun, folder)
    error = ERRORS[number % len(ERRORS)]

    def refuse(disk: Disk, at: int, operation: str, place: Path) -> None:
        if at >= number:
            raise OSError(error, os.strerror(error), str(place))

    ended = child(lambda: watched(kit, folder, refuse), folder.with_suffix(".log")).finish()
    return refused(kit, ended, folder) + goes_on(kit, folder, expected)


def file_too_big(kit: Experiment, folder: Path, begun: Path, limit: int, expected: dict[str, str]) -> Outcome:
    """No file may have more bytes than the limit."""
    shutil.copytree(begun, folder)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        train_in(kit, folder)

    ended = child(limited, folder.with_suffix(".log")).finish()
    return refused(kit, ended, folder) + goes_on(kit, folder, expected)


def small_disk(kit: Experiment, folder: Path, begun: Path, room: int, expected: dict[str, str]) -> Outcome:
    """A real disk that fills up, where this process may mount one; nothing is tried where it may not."""
    report = folder.with_suffix(".report")

    def on_small_disk() -> None:
        folder.mkdir()
        if not mounted(folder):
            report.write_text("0 0 0")
            return
        run, ballast = folder / "run", folder / "ballast"
        shutil.copytree(begun, run)
        ballast.write_bytes(bytes(max(0, _free(folder) - room)))
        outcome = refused(kit, child(lambda: train_in(kit, run), report.with_suffix(".log")).finish(), run)
        ballast.unlink()
        outcome += goes_on(kit, run, expected)
        print(*outcome.remarks, sep="\n")
        report.write_text(f"{outcome.tried} {outcome.lost} {outcome.repaired}")

    ended = child(on_small_disk, folder.with_suffix(".log")).finish()
    if ended.code != 0:
        raise RuntimeError(f"the small disk could not be tried: {ended.text[-500:]}")
    tried, lost, repaired = map(int, report.read_text().split())
    if not tried:
        print("R6: this process may not mount a small disk; left out", file=sys.stderr)
    return Outcome(tried, lost, repaired, (ended.text.strip(),) if lost or repaired else ())


def mounted(place: Path, size: int = 64_000_000) -> bool:
    """Mount a disk in memory at `place`, seen by this process and its children alone; False where that is forbidden."""
    try:
        user, group = os.getuid(), os.getgid()
        if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NAMESPACES) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except (OSError, AttributeError):
        return False
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=False).returncode == 0


def _free(place: Path) -> int:
    state = os.statvfs(place)
    return state.f_bavail * state.f_frsize


def permission_lost(kit: Experiment, folder: Path, expected: dict[str, str]) -> Outcome:
    """After its first iteration, the process may no longer write into the folder."""
    give_up = _give_up_writing(folder)

    def lose() -> None:
        train(kit, folder, progress=False, on_iteration=lambda metrics: give_up())

    ended = child(lose, folder.with_suffix(".log")).finish()
    folder.chmod(0o755)
    for place in folder.rglob("*/"):
        place.chmod(0o755)
    return told(ended, folder, 1) + goes_on(kit, folder, expected)


def _give_up_writing(folder: Path) -> Callable[[], None]:
    """For root, who may write anywhere, to become nobody; for others, to take away the folders' permission."""

    def give_up() -> None:
        if os.geteuid() == 0:
            os.seteuid(_NOBODY)
        elif os.getuid() != 0:
            for place in (*folder.rglob("*/"), folder):
                place.chmod(0o555)

    return give_up


def no_permission(kit: Experiment, parent: Path) -> Outcome:
    """A new run where nobody may make one, and one that nobody may even look for."""
    outcome = Outcome(0)
    for mode in (0o555, 0o000):
        folder = parent / f"{mode:o}" / "run"
        folder.parent.mkdir(parents=True)
        folder.parent.chmod(mode)

        def forbidden(folder: Path = folder) -> None:
            if os.geteuid() == 0:
                os.seteuid(_NOBODY)
            train_in(kit, folder)

        outcome += told(child(forbidden, parent.with_suffix(".log")).finish(), folder, -1)
        folder.parent.chmod(0o755)
    return outcome


def command_refused(kit: Experiment, folder: Path, begun: Path, expected: dict[str, str]) -> Outcome:
    """`grpo-kit train` where no file may be big: exit code 2 and one line; then, with room, it goes on."""
    shutil.copytree(begun, folder)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, resource.RLIM_INFINITY))"
    command = command_line(kit, folder)
    limited = [sys.executable, "-c", f"{limit}; from grpo_kit.cli import main; main()", *command[3:]]
    done = subprocess.run(limited, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    said = "\n".join(line.replace("grpo-kit: ", "KitError: ") for line in done.stderr.splitlines())
    return told(Ended(done.returncode, said), folder, 1) + goes_on(kit, folder, expected)
