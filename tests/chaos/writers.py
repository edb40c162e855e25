"""R17: two runs in one folder at the same time: one writes, the other is told so and touches nothing."""

import os
import signal
import subprocess
from pathlib import Path

from grpo_kit.config import PROJECT_ROOT, load_config
from grpo_kit.experiment import Experiment
from tests.chaos import Outcome, fault
from tests.chaos.experiment import Child, child, experiment, reference, run_through, scratch, train_in
from tests.chaos.kills import command_line, through, wait_for_log

_TOLD = "another process writes into it"


@fault("R17", "two runs in one folder")
def writers(short: bool) -> Outcome:
    """Pairs that start together, pairs of which one is under way, a killed process's lock, the real command."""
    kit = experiment(num_iterations=2)
    longer = experiment(num_iterations=9)  # the same run for the folder, but with another config.json
    with scratch() as place:
        expected = reference(kit, place / "reference")
        outcome = Outcome(0)
        for number in range(1 if short else 10):
            outcome += started_together(kit, place / f"together_{number}", expected)
            outcome += second_refused(kit, longer, place / f"second_{number}", expected)
            outcome += stale_lock(kit, place / f"stale_{number}", expected)
        return outcome if short else outcome + command_refused(kit, place / "command", expected)


def started_together(kit: Experiment, folder: Path, expected: dict[str, str]) -> Outcome:
    """Both begin at once; one of them does it all."""
    both = [child(lambda: train_in(kit, folder), folder.with_suffix(f".{name}.log")) for name in "ab"]
    ended = [one.finish() for one in both]
    codes = sorted(one.code for one in ended)
    refused = [one.text for one in ended if one.code == 2]
    if codes not in ([0, 0], [0, 2]) or any(_TOLD not in text for text in refused):  # 0, 0: one came after the other
        return Outcome(1, lost=1, remarks=(f"{folder.name}: ended with {codes}: {ended[0].text} {ended[1].text}",))
    return Outcome(1) + through(folder, 0, "", expected)


def second_refused(kit: Experiment, other: Experiment, folder: Path, expected: dict[str, str]) -> Outcome:
    """A second one, with another number of iterations, comes while the first is writing."""
    first = child(lambda: train_in(kit, folder), folder.with_suffix(".log"))
    wait_until_writing(folder, first)
    os.kill(first.pid, signal.SIGSTOP)  # it shall not be through before the second one has looked
    second = child(lambda: train_in(other, folder), folder.with_suffix(".other.log")).finish()
    os.kill(first.pid, signal.SIGCONT)
    ended = first.finish()
    iterations = load_config(folder).training_settings.num_iterations
    if second.code != 2 or _TOLD not in second.text or iterations != kit.config.training_settings.num_iterations:
        told = f"{folder.name}: the second ended with {second.code}, config.json has {iterations}: {second.text}"
        return Outcome(1, lost=1, remarks=(told,))
    return Outcome(1) + through(folder, ended.code, ended.text, expected)


def stale_lock(kit: Experiment, folder: Path, expected: dict[str, str]) -> Outcome:
    """The first one is killed while it holds the lock; its file is there, and does not block."""
    first = child(lambda: train_in(kit, folder), folder.with_suffix(".log"))
    wait_until_writing(folder, first)
    first.kill()
    first.wait()
    if not (folder / ".lock").exists():
        return Outcome(1, lost=1, remarks=(f"{folder.name}: the killed process left no lock",))
    ended = run_through(kit, folder)
    return Outcome(1) + through(folder, ended.code, ended.text, expected)


def wait_until_writing(folder: Path, first: Child) -> None:
    """Wait until a child holds its run folder."""
    while not (folder / "training.log").is_file() and first.wait(0.002) is None:
        pass


def command_refused(kit: Experiment, folder: Path, expected: dict[str, str]) -> Outcome:
    """`grpo-kit train` twice, as two people would: exit code 2 and one line."""
    command = command_line(kit, folder)
    with subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        wait_for_log(folder, first)
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
        first.send_signal(signal.SIGCONT)
    if second.returncode != 2 or second.stderr.count("\n") != 1 or _TOLD not in second.stderr:
        told = f"{folder.name}: the second command ended with {second.returncode}: {second.stderr[-300:]}"
        return Outcome(1, lost=1, remarks=(told,))
    return Outcome(1) + through(folder, first.returncode, "", expected)
