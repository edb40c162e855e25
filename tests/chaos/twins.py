"""Deliberately broken versions of the kit, each of which the trial of one fault must catch."""

import contextlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from tests.chaos import Outcome
from tests.chaos.crashes import Kind, every_crash, first_kit, killed, power_cut_empty, power_cut_half, torn
from tests.chaos.damages import flipped, one_damage
from tests.chaos.experiment import experiment, reference, scratch
from tests.chaos.refusals import refused_operation
from tests.chaos.resumes import resumed_everywhere
from tests.chaos.writers import second_refused

_FOLDER, _CHECKPOINT = "grpo_kit.runs.folder", "grpo_kit.runs.checkpoint"


@dataclass(frozen=True)
class Twin:
    """A broken version: what it has instead of the kit's own, and a trial in an empty folder that must catch it."""

    fault: str
    trial: Callable[[Path], Outcome]
    instead: dict[str, object] = field(default_factory=dict)


def escaped() -> list[str]:
    """Try every broken version and say what became of it; returns the names of those that were not caught."""
    missed = []
    for name, twin in TWINS.items():
        with scratch() as place, contextlib.ExitStack() as patches:
            place.chmod(0o755)
            for target, value in twin.instead.items():
                patches.enter_context(patch(target, value))
            outcome = twin.trial(place)
        caught = outcome.tried > 0 and not outcome.withstood
        missed += [] if caught else [name]
        print(f"{twin.fault:<4} {name:<40} {'caught' if caught else 'MISSED'}", flush=True)
    return missed


def nothing(*arguments: object) -> None:
    """Do nothing."""


def in_place(place: Path, content: bytes) -> None:
    """Write a file where it is, so that a crash leaves half of it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)


def unguarded(self: object, *arguments: object) -> contextlib.AbstractContextManager:
    """Guard nothing."""
    return contextlib.nullcontext()


def last_state(kind: Kind) -> Callable[[Path], Outcome]:
    """The crash of one kind after all is done, or the last that leaves another state than a kill."""
    return lambda place: _crash(place, kind, slice(-1, None))


def first_state(kind: Kind) -> Callable[[Path], Outcome]:
    """The first crash of one kind."""
    return lambda place: _crash(place, kind, slice(1))


def _crash(place: Path, kind: Kind, which: slice) -> Outcome:
    def choose(states: Iterable[str]) -> list[str]:
        return [state for state in states if state.endswith(kind.__name__)][which]

    return every_crash(first_kit(), place / "run", None, choose, stride=8, kinds=(killed, kind))


def refused(place: Path) -> Outcome:
    """The disk refuses all from the twentieth operation on."""
    one, two = (experiment(num_iterations=n, prompts_per_iteration=1, validate_every=1) for n in (1, 2))
    reference(one, place / "begun")
    return refused_operation(two, place / "run", place / "begun", 20, reference(two, place / "reference"))


def one_flip(place: Path) -> Outcome:
    """One bit of a checkpoint is another."""
    reference(experiment(num_iterations=2, keep_checkpoints=3), place / "run")
    return one_damage(place / "run", place / "no other", place / "damaged", flipped, random.Random(0), None)


def two_writers(place: Path) -> Outcome:
    """A second process comes while the first one writes."""
    kit, longer = experiment(num_iterations=2), experiment(num_iterations=3)
    return second_refused(kit, longer, place / "run", reference(kit, place / "reference"))


TWINS: dict[str, Twin] = {
    "nothing_flushed": Twin(
        "R2",
        last_state(power_cut_empty),
        {f"{_FOLDER}.flush": nothing, "grpo_kit.runs.durable.flush": nothing, f"{_FOLDER}.flush_tree": nothing}
        | {f"{_CHECKPOINT}.flush": nothing, f"{_CHECKPOINT}.flush_tree": nothing},
    ),
    "commit_before_what_it_vouches_for": Twin(
        "R2", last_state(power_cut_half), {f"{_FOLDER}.RunFolder.commit": lambda self, save: save()}
    ),
    "files_written_in_place": Twin("R2", first_state(torn), {f"{_FOLDER}.replace_file": in_place}),
    "errors_left_to_the_libraries": Twin("R6", refused, {f"{_FOLDER}.RunFolder.file_errors": unguarded}),
    "hashes_not_compared": Twin("R7", one_flip, {f"{_CHECKPOINT}.sha256": lambda file: "any"}),
    "optimizer_forgotten": Twin(
        "R8",
        lambda place: resumed_everywhere(place / "run", range(1, 2), {}),
        {"torch.optim.AdamW.load_state_dict": nothing},
    ),
    "no_lock": Twin("R17", two_writers, {f"{_FOLDER}.RunFolder._lock": nothing}),
}
