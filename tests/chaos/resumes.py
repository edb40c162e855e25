"""R8: a run that is resumed at any of its iterations is the run that was not stopped."""

import itertools
import shutil
from pathlib import Path

from tests.chaos import Outcome, fault
from tests.chaos.experiment import experiment, reference, run_through, scratch
from tests.chaos.kills import through

UPDATES, MICRO_BATCHES, BETAS = (1, 2), (None, 2), (0.0, 0.04)


@fault("R8", "resume at every iteration")
def resumes(short: bool) -> Outcome:
    """1 and 2 inner updates, with and without accumulation, with and without the KL term."""
    outcome = Outcome(0)
    with scratch() as place:
        settings = [(2, 2, 0.04)] if short else list(itertools.product(UPDATES, MICRO_BATCHES, BETAS))
        for number, (updates, micro_batch, beta) in enumerate(settings):
            chosen = {"updates_per_rollout": updates, "micro_batch_size": micro_batch, "beta": beta}
            outcome += resumed_everywhere(place / str(number), range(1, 2) if short else range(3), chosen)
    return outcome


def resumed_everywhere(place: Path, iterations: range, settings: dict[str, object]) -> Outcome:
    """Go on from each of these iterations of one run, which ends after the last of them, and compare."""
    kit = experiment(num_iterations=iterations.stop, keep_checkpoints=iterations.stop + 1, **settings)
    place.mkdir()
    expected = reference(kit, place / "whole")
    outcome = Outcome(0)
    for iteration in iterations:
        folder = back_at(place / "whole", place / f"from_{iteration}", iteration)
        ended = run_through(kit, folder)
        outcome += Outcome(1) + through(folder, ended.code, ended.text, expected)
    return outcome


def back_at(run: Path, folder: Path, iteration: int) -> Path:
    """A copy of a run whose checkpoints end at an iteration; all that it logged later is still there."""
    shutil.copytree(run, folder)
    for checkpoint in folder.glob("checkpoints/iter_*"):
        if int(checkpoint.name.removeprefix("iter_")) > iteration:
            shutil.rmtree(checkpoint)
    return folder
