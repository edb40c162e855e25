"""Where a run is, and interrupting it there: at any call of any function within one of its phases."""

import contextlib
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

# phase → the function that it is in; sampling for a validation is a part of the validation
PHASES = {
    "sampling": ("grpo_kit.models.policy", "Policy.sample"),
    "images": ("grpo_kit.models.generator", "Generator.generate_images"),
    "rewards": ("grpo_kit.rewards.composition", "Rewards.score"),
    "step": ("grpo_kit.training.iteration", "grpo_step"),
    "validation": ("grpo_kit.training.loop", "validate"),
    "committing": ("grpo_kit.training.loop", "save_checkpoint"),
}
VISIT = 2  # which time that a phase is entered in training; its first visit is counted, to know how long it is


class _Phase:
    """Counts the function calls of a phase's first visit, and acts at a share of them in the second."""

    def __init__(self, share: float, action: Callable[[], None]) -> None:
        self.share, self.action = share, action
        self.visits = self.calls = self.first = 0
        self.fired = False

    @contextlib.contextmanager
    def visit(self) -> Iterator[None]:
        """What happens in the block is a visit."""
        self.visits += 1
        self.calls = 0
        if self.visits > VISIT:
            yield
            return
        sys.setprofile(self._count)
        try:
            yield
        finally:
            sys.setprofile(None)
            self.first = self.first or self.calls

    def _count(self, frame: object, event: str, argument: object) -> None:
        if event not in ("call", "c_call"):
            return
        self.calls += 1
        if self.visits == VISIT and not self.fired and self.calls >= self.share * self.first:
            self.fired = True
            sys.setprofile(None)
            self.action()


@contextlib.contextmanager
def interrupting(phase: str, share: float, action: Callable[[], None]) -> Iterator[_Phase]:
    """Act within the second visit of a phase, after a share of the function calls that its first one took."""
    module, path = PHASES[phase]
    owner = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, counter, validating = getattr(owner, name), _Phase(share, action), []

    def watched(*arguments: object, **options: object) -> object:
        if validating or counter.fired:
            return original(*arguments, **options)
        with counter.visit():
            return original(*arguments, **options)

    train = importlib.import_module("grpo_kit.training.loop")
    validate = train.validate

    def validation(*arguments: object, **options: object) -> object:
        validating.append(True)
        try:
            return validate(*arguments, **options)
        finally:
            validating.pop()

    with contextlib.ExitStack() as stack:
        if phase != "validation":
            stack.enter_context(patch.object(train, "validate", validation))
        stack.enter_context(patch.object(owner, name, watched))
        yield counter


def content(folder: Path) -> dict[str, str]:
    """What a run left, file by file, as digests: all but seconds, logs, locks and what mirrors wrote."""
    left_out = {"training.log", ".lock", "tracking.json", "index.html"}
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name in left_out or name.split("/")[0] in {"tensorboard", "wandb", "notebooks"}:
            continue
        found[name] = _untimed(file) if file.suffix == ".jsonl" else hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _untimed(file: Path) -> str:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return json.dumps([{k: v for k, v in row.items() if k != "step_time" and "time/" not in k} for row in rows])


def differences(folder: Path, expected: dict[str, str]) -> list[str]:
    """The files in which a run differs from what is expected."""
    found = content(folder)
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def alive_in_session(session: int) -> list[int]:
    """The processes of a session, but for those that have ended and wait to be asked."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = place.read_text().rsplit(")", 1)[1].split()[:4]
            if int(of) == session and state != "Z":
                found.append(int(place.parent.name))
    return found


def this_process_gets(number: int) -> Callable[[], None]:
    """An action: this process is sent a signal."""
    return lambda: os.kill(os.getpid(), number)
