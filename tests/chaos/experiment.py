"""A small real experiment, trained in children of the process that loaded it, and the bytes that its runs must have."""

import functools
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet  # noqa: F401  so that no child has to import it
import torch

from grpo_kit.config import Config, KitError, load_config
from grpo_kit.experiment import Experiment, load_experiment
from grpo_kit.training.loop import train

QUICK = {
    "model_settings.device": "cpu",
    "generation_settings.num_inference_steps": 1,
    "generation_settings.max_new_tokens": 12,
    "evaluation_settings.validation_prompts": 2,
    "evaluation_settings.paraphrases": False,
    "evaluation_settings.n_resamples": 100,
    "training_settings.num_iterations": 6,
    "training_settings.prompts_per_iteration": 2,
    "training_settings.group_size": 2,
    "training_settings.learning_rate": 1e-3,
    "training_settings.validate_every": 2,
    "training_settings.save_every": 1,
}


@functools.cache
def _loaded() -> Experiment:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not forked along
    torch.set_num_threads(1)
    return load_experiment(load_config("tiny", QUICK))


def experiment(**training: object) -> Experiment:
    """The embedded models with few prompts and pictures; `training` are other training_settings.

    It is loaded once and must only be trained in a child (`child`), which has a copy of its own.
    """
    kit = _loaded()
    return replace(kit, config=quick_config(**training))


def quick_config(**training: object) -> Config:
    """The settings of `experiment`."""
    return load_config("tiny", QUICK | {f"training_settings.{name}": value for name, value in training.items()})


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the runs, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        yield Path(place)


def train_in(kit: Experiment, folder: Path) -> None:
    """Train, or go on; raises what `train` raises."""
    train(kit, folder, progress=False)


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (minus a signal's number), and what it said."""

    code: int
    text: str


@dataclass
class Child:
    """A process of our own that does one piece of work."""

    pid: int
    log: Path
    ended: Ended | None = None

    def kill(self) -> None:
        """SIGKILL, which nothing can answer."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 600.0) -> Ended | None:
        """Wait until it has ended; None where that took longer."""
        until = time.monotonic() + seconds
        while self.ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.ended = Ended(os.waitstatus_to_exitcode(status), self.log.read_text(errors="replace"))
            elif time.monotonic() >= until:
                break
            else:
                time.sleep(0.002)
        return self.ended

    def finish(self) -> Ended:
        """Wait until it has ended; one that hangs is killed."""
        ended = self.wait()
        if ended is None:
            self.kill()
            ended = self.wait()
        return ended


def child(work: Callable[[], object], log: Path) -> Child:
    """Fork: the child does `work` with its output in `log`, and ends with 0, 2 for a KitError, or 1."""
    sys.stdout.flush()
    sys.stderr.flush()
    log.touch()  # it may be killed before it opens it
    pid = os.fork()
    if pid:
        return Child(pid, log)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os._exit(_done(work))


def _done(work: Callable[[], object]) -> int:
    try:
        work()
        code = 0
    except KitError as error:
        print(f"KitError: {error}", file=sys.stderr)
        code = 2
    except BaseException:  # a child reports whatever ended it
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def run_through(kit: Experiment, folder: Path) -> Ended:
    """Train in a child, on from whatever is in the folder, until it ends."""
    return child(lambda: train_in(kit, folder), folder.with_suffix(".log")).finish()


def reference(kit: Experiment, folder: Path) -> dict[str, str]:
    """What an uninterrupted run leaves.

    Raises:
        RuntimeError: it fails, so that nothing can be compared.
    """
    ended = run_through(kit, folder)
    if ended.code != 0:
        raise RuntimeError(f"the uninterrupted run failed: {ended.text[-500:]}")
    return content(folder)


def content(folder: Path) -> dict[str, str]:
    """A hash of each file that must be the same: weights, optimizer, metrics without seconds, validations, pictures."""
    patterns = (
        "checkpoints/**/*",
        "best/**/*",
        "validation_iter_*.json",
        "rollouts/*",
        "thumbnails/*",
        "sentinel.json",
    )
    files = (file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    found = {file.relative_to(folder).as_posix(): _hash(file.read_bytes()) for file in files}
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
    return found | {"metrics.jsonl": _hash(json.dumps([_without_seconds(json.loads(line)) for line in lines]).encode())}


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """The files that are missing, other, or too many."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def _without_seconds(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if name != "step_time" and not name.startswith("time/")}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
