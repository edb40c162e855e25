"""R1: SIGKILL at random times, again and again, until the run is through all the same."""

import random
import subprocess
import sys
import time
from pathlib import Path

from grpo_kit.config import PROJECT_ROOT
from grpo_kit.experiment import Experiment
from grpo_kit.runs.checkpoint import CheckpointError, load_checkpoint
from tests.chaos import Outcome, fault
from tests.chaos.experiment import child, content, differences, experiment, reference, scratch, train_in
from tests.support.config_files import save_config

_LONGEST = 0.4  # of an uninterrupted run's seconds: the longest that a part of a run may last


@fault("R1", "SIGKILL at random times")
def kills(short: bool) -> Outcome:
    """Kill children of this process, 200 of them, and the real command, three times; saving every iteration.

    In the short form five of the children: to start the command takes longer than all of them.
    """
    kit = experiment(num_iterations=2 if short else 6)
    with scratch() as place:
        started = time.monotonic()
        expected = reference(kit, place / "reference")
        longest = _LONGEST * (time.monotonic() - started)
        outcome, rng, number = Outcome(0), random.Random(0), 0
        times = 5 if short else 200
        while outcome.tried < times:
            number += 1
            left = times - outcome.tried
            outcome += killed_until_through(kit, place / f"run_{number}", expected, rng, longest, left)
        return outcome if short else outcome + command_killed(kit, place / "command", expected, 3, rng, longest)


def killed_until_through(
    kit: Experiment, folder: Path, expected: dict[str, str], rng: random.Random, longest: float, times: int
) -> Outcome:
    """Start a run in `folder` and kill it, at most so many times, until it comes to the end; compare what it left.

    A part that came no further than the one before makes the next last longer: a busy machine is slow.
    """
    outcome = Outcome(0)
    while True:
        before = newest(folder)
        running = child(lambda: train_in(kit, folder), folder.with_suffix(".log"))
        ended = running.wait(rng.uniform(0, longest)) if outcome.tried < times else running.finish()
        if ended is not None:
            return outcome + through(folder, ended.code, ended.text, expected)
        there = newest(folder)
        running.kill()
        running.wait()
        outcome += still_there(folder, there)
        longest *= 1.0 if there > before else 1.2


def through(folder: Path, code: int, text: str, expected: dict[str, str]) -> Outcome:
    """A run that came to its end by itself, with the bytes that it must have; nothing is counted as tried."""
    if code != 0:
        return Outcome(0, repaired=1, remarks=(f"{folder.name}: does not go on: {text.strip()[-300:]}",))
    different = differences(content(folder), expected)
    return Outcome(0, lost=len(different), remarks=tuple(f"{folder.name}: {name} is another" for name in different))


def still_there(folder: Path, before: int) -> Outcome:
    """One kill: what was committed before it is there, and the newest of all can be loaded."""
    after = newest(folder)
    try:
        if after >= 0:
            load_checkpoint(folder / "checkpoints" / f"iter_{after:06d}")
    except CheckpointError as error:
        return Outcome(1, lost=1, remarks=(f"{folder.name}: {error}",))
    if after < before:
        return Outcome(1, lost=1, remarks=(f"{folder.name}: iteration {before} was committed, {after} is",))
    return Outcome(1)


def newest(folder: Path) -> int:
    """The newest iteration that has a checkpoint, -1 where none has."""
    return max((int(place.name.removeprefix("iter_")) for place in folder.glob("checkpoints/iter_*")), default=-1)


def command_killed(
    kit: Experiment, folder: Path, expected: dict[str, str], times: int, rng: random.Random, longest: float
) -> Outcome:
    """Kill `grpo-kit train` in a process of its own while it trains, then let it come to the end."""
    outcome, command = Outcome(0), command_line(kit, folder)
    for _ in range(times):
        with subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as real:
            wait_for_log(folder, real)
            time.sleep(rng.uniform(0, longest / times))
            there = newest(folder)
            real.kill()
        outcome += still_there(folder, there)
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    return outcome + through(folder, done.returncode, done.stderr, expected)


def command_line(kit: Experiment, folder: Path) -> list[str]:
    """`grpo-kit train` with the experiment's settings, which are written beside the run folder."""
    config = save_config(kit.config, folder.with_suffix(".json"))
    return [sys.executable, "-m", "grpo_kit.cli", "train", "--config", str(config), "--run-dir", str(folder)]


def wait_for_log(folder: Path, process: subprocess.Popen) -> None:
    """Wait until a process has begun to write into its run folder, or has ended."""
    log = folder / "training.log"
    before = log.stat().st_mtime_ns if log.is_file() else 0
    while process.poll() is None and not (log.is_file() and log.stat().st_mtime_ns > before):
        time.sleep(0.01)
