"""R4: Ctrl-C and SIGTERM at any function call of any phase: of `grpo-kit train`, of `grpo-kit run`, in a notebook."""

import contextlib
import copy
import dataclasses
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import torch
from filelock import FileLock, Timeout

from grpo_kit import cli
from grpo_kit.config import load_config
from grpo_kit.experiment import Experiment, load_experiment
from grpo_kit.runs import notebooks as headless
from grpo_kit.training.loop import train
from tests.chaos import Outcome, fault
from tests.chaos.nonfinite import QUICK
from tests.chaos.phases import PHASES, alive_in_session, content, differences, interrupting, this_process_gets
from tests.support.config_files import save_config

SETTINGS = QUICK | {
    "training_settings.num_iterations": 3,
    "training_settings.group_size": 3,
    "training_settings.validate_every": 1,
}
LIMIT = 10.0  # seconds from the signal to the end
PATIENCE = 120.0  # seconds that a process without a signal may take
NOTEBOOK = """profile: str = "tiny"  # a profile
run_dir: str = ""  # a run's folder"""
CELL = """import json, os, time
from pathlib import Path
import grpo_kit as gk
from tests.chaos.phases import interrupting

def announce():
    place.with_suffix(".part").write_text(f"{{os.getpid()}} {{time.monotonic()}}")
    place.with_suffix(".part").replace(place)

place = Path({place!r})
kit = gk.load_experiment(gk.load_config(profile))
with interrupting({phase!r}, {share!r}, announce):
    gk.train(kit, run_dir, progress=False)"""


# --- a command in a process of its own --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, seconds since the signal, its stderr, what is left of its session."""

    code: int
    seconds: float
    errors: str
    orphans: list[int]


def in_fork(work: Callable[[], None], errors: Path) -> int:
    """Start a process with a session of its own, which has imported all that this one has; returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    os.setsid()
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        for name in ("SIGTERM", "SIGHUP"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        with errors.open("w") as file, contextlib.redirect_stdout(None):
            os.dup2(file.fileno(), 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, errors: Path, since: Callable[[], float]) -> Ended:
    """Wait for a process; one that takes longer than `PATIENCE` is killed."""
    deadline = time.monotonic() + PATIENCE
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    seconds = time.monotonic() - since()
    while alive_in_session(child) and time.monotonic() - since() < LIMIT:
        time.sleep(0.1)
    return Ended(os.waitstatus_to_exitcode(found[1]), seconds, errors.read_text(), alive_in_session(child))


def command(arguments: list[str], errors: Path) -> Ended:
    """Run the kit's command line to its end."""
    started = time.monotonic()
    return wait(in_fork(lambda: cli.main(arguments), errors), errors, lambda: started)


def interrupted_train(profile: Path, folder: Path, phase: str, share: float, number: int) -> Ended | None:
    """`grpo-kit train`, which sends itself a signal in a phase; None where the phase was over before."""
    fired, errors = folder.with_suffix(".fired"), folder.with_suffix(".err")

    def action() -> None:
        fired.write_text(str(time.monotonic()))
        os.kill(os.getpid(), number)

    def work() -> None:
        with interrupting(phase, share, action):
            cli.main(["train", "--profile", str(profile), "--run-dir", str(folder)])

    started = time.monotonic()
    ended = wait(in_fork(work, errors), errors, lambda: float(fired.read_text()) if fired.exists() else started)
    return ended if fired.exists() else None


def interrupted_run(profile: Path, folder: Path, phase: str, share: float, number: int) -> Ended | None:
    """`grpo-kit run`, which gets a signal when its kernel says that training is in a phase."""
    fired, errors, series = folder.with_suffix(".fired"), folder.with_suffix(".err"), folder.with_suffix(".series")
    _series(series, CELL.format(place=str(fired), phase=phase, share=share))
    arguments = ["run", "--profile", str(profile), "--run-dir", str(folder)]
    child = in_fork(lambda: _with_series(series, arguments), errors)
    deadline = time.monotonic() + PATIENCE
    while not fired.exists() and time.monotonic() < deadline and not os.waitid(os.P_PID, child, _LOOK):
        time.sleep(0.005)
    if not fired.exists():
        ended = wait(child, errors, time.monotonic)
        return ended if ended.code else None
    sent = time.monotonic()
    os.kill(child, number)
    ended = wait(child, errors, lambda: sent)
    kernel = int(fired.read_text().split()[0])
    while alive_in_session(kernel) and time.monotonic() - sent < LIMIT:
        time.sleep(0.1)
    return dataclasses.replace(ended, orphans=ended.orphans + alive_in_session(kernel))


_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT


def _series(folder: Path, cell: str) -> None:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    cells = [nbformat.v4.new_code_cell(NOTEBOOK, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(cell)]
    notebook.cells = cells
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / "00_train.ipynb")


def _with_series(series: Path, arguments: list[str]) -> None:
    headless.NOTEBOOK_FOLDER = series
    cli.main(arguments)


def problems(ended: Ended, number: int, folder: Path) -> list[str]:
    """What an interrupted command did otherwise than it should; empty where all is well."""
    found = []
    if ended.code != 128 + number:
        found.append(f"exit code {ended.code}")
    if ended.seconds > LIMIT:
        found.append(f"ended after {ended.seconds:.1f} s")
    if ended.orphans:
        found.append(f"left processes {ended.orphans}")
    if ended.errors.count("it goes on where it stopped with: grpo-kit ") != 1 or "Traceback" in ended.errors:
        found.append(f"said {ended.errors[-300:]!r}")
    try:
        FileLock(folder / ".lock", timeout=0).acquire().lock.release()
    except Timeout:
        found.append("the folder is still locked")
    return found


def said_command(ended: Ended) -> list[str]:
    """What an interrupted command says that it goes on with, without `grpo-kit`."""
    line = next(line for line in ended.errors.splitlines() if "it goes on where it stopped with: " in line)
    return shlex.split(line.split("with: grpo-kit ", 1)[1])


# --- a notebook's objects ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ctrl_c() -> Iterator[None]:
    """Let SIGINT be what it is in a notebook, whatever started this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted_objects(kit: Experiment, folder: Path, phase: str, share: float) -> list[str] | None:
    """`train` interrupted and called again with the same objects; None where it was not interrupted.

    Returns:
        What is wrong with the objects in between.
    """
    kit.policy.enhance_prompt("a red ball")  # which gives all its modules the mode of the whole
    modes = [module.training for module in kit.policy.model.modules()]
    trained = [parameter.requires_grad for parameter in kit.policy.model.parameters()]
    random_state = torch.get_rng_state()
    with ctrl_c(), interrupting(phase, share, this_process_gets(signal.SIGINT)):
        try:
            train(kit, folder, progress=False)
        except KeyboardInterrupt:
            pass
        else:  # over before; or Python lost the interrupt, as it does while an object is taken down
            return None
    found = []
    if not str(kit.policy.enhance_prompt("a red ball")).strip():
        found.append("the policy does not answer")
    if [module.training for module in kit.policy.model.modules()] != modes:
        found.append("the model is in another mode")
    if [parameter.requires_grad for parameter in kit.policy.model.parameters()] != trained:
        found.append("other parameters are trained")
    if any(parameter.grad is not None for parameter in kit.policy.model.parameters()):
        found.append("gradients are left")
    if not torch.equal(torch.get_rng_state(), random_state):
        found.append("the global random numbers moved")
    train(kit, folder, progress=False)
    return found


# --- the row ----------------------------------------------------------------------------------------------------------


def _profile(folder: Path) -> Path:
    return save_config(load_config("tiny", SETTINGS), folder / "quick.json")


def _tries(place: Path, short: bool) -> Iterator[tuple[str, list[str]]]:
    """Each try's name and what went wrong in it."""
    draw, profile = random.Random(4), _profile(place)
    whole = command(["train", "--profile", str(profile), "--run-dir", str(place / "whole")], place / "whole.err")
    assert whole.code == 0, whole.errors
    expected = content(place / "whole")
    signals = (signal.SIGTERM, signal.SIGINT)
    train_tries = [(interrupted_train, phase, number) for phase in PHASES for number in signals for _ in range(3)]
    run_tries = [(interrupted_run, phase, number) for phase in PHASES for number in signals]
    chosen = [(interrupted_train, "rewards", signal.SIGTERM)] if short else train_tries + run_tries
    for number, (kind, phase, sent) in enumerate(chosen):
        for share in (share * factor for share in [draw.random() * 0.9] for factor in (1, 0.5, 0.2)):
            folder = place / f"{kind.__name__}-{number}-{int(1000 * share)}"
            ended = kind(profile, folder, phase, share, sent)
            if ended is not None:  # else the phase was shorter than at its first visit
                break
        name = f"{kind.__name__} {phase} {share:.3f} {sent.name}"
        yield name, ["never in the phase"] if ended is None else _judged(kind, ended, sent, folder, expected)


def _judged(
    kind: Callable[..., Ended | None], ended: Ended, sent: int, folder: Path, expected: dict[str, str]
) -> list[str]:
    """What is wrong with an interrupted command, and with what came of it when it went on."""
    if ended.code == 0 and "Exception ignored in" in ended.errors and ended.seconds < LIMIT:
        return [f"finished with other files {wrong[:5]}" for wrong in [differences(folder, expected)] if wrong]
    found = problems(ended, sent, folder)
    if found:
        return found
    again, errors = said_command(ended), folder.with_suffix(".again")
    if kind is interrupted_run:
        series = folder.with_suffix(".series")
        code = wait(in_fork(lambda: _with_series(series, again), errors), errors, time.monotonic).code
    else:
        code = command(again, errors).code
    wrong = differences(folder, expected)
    return [f"gone on: exit code {code}, other files {wrong[:5]}"] if code or wrong else []


def _object_tries(place: Path, short: bool) -> Iterator[tuple[str, list[str]]]:
    draw, kit = random.Random(5), load_experiment(load_config("tiny", SETTINGS))
    train(_own(kit), place / "objects", progress=False)
    expected = content(place / "objects")
    for number, phase in enumerate(("step", "committing") if short else list(PHASES) * 8):
        folder, share = place / f"objects-{number}", draw.random() * 0.9
        found = interrupted_objects(_own(kit), folder, phase, share)
        wrong = differences(folder, expected)
        if found is None and not wrong:
            continue
        found = (found or []) + ([f"other files {wrong[:5]}"] if wrong else [])
        yield f"objects {phase} {share:.3f}", found


def _own(kit: Experiment) -> Experiment:
    return dataclasses.replace(kit, policy=copy.deepcopy(kit.policy))


@fault("R4", "SIGTERM and Ctrl-C in each phase, of a command and in a notebook")
def interruptions(short: bool) -> Outcome:
    """Interrupt, look at what is left, go on, and compare with the run that was not interrupted."""
    outcome = Outcome(0)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for tries in (_tries, _object_tries):  # commands first: a process that has trained has threads
            for what, found in tries(place, short):
                remarks = tuple(f"{what}: {problem}" for problem in found)
                outcome += Outcome(1, lost=int(bool(found)), remarks=remarks)
    return outcome
