"""A series of notebooks, or the trials of a grid, run with lines on the screen that say how far they are."""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from grpo_kit.config import KitError
from grpo_kit.runs.cluster import Cluster, check_machines, connected, probe_file, run_trials_on_ray
from grpo_kit.runs.grid import (
    UNASKED,
    GridError,
    PlannedTrial,
    TrialResult,
    finished,
    plan_trials,
    read_grid,
    run_trial,
    write_order,
)
from grpo_kit.runs.notebooks import Executed, Planned, execute_in_turn, write_profile
from grpo_kit.runs.record import metrics_lines


def run_series(
    notebooks: Sequence[Planned], profile: str, settings: Mapping[str, object], folder: Path, minutes_per_cell: float
) -> list[Executed]:
    """Execute notebooks from `plan` into a run folder until one fails; `settings` are those that the run changes."""
    print(f"run folder: {folder}", flush=True)
    write_profile(folder, profile, settings)

    def announce(notebook: Planned) -> None:
        print(f"[{notebooks.index(notebook) + 1}/{len(notebooks)}] {notebook.name}", flush=True)

    with training_progress(folder):
        return execute_in_turn(notebooks, folder, minutes_per_cell, announce)


def plan_grid(
    grid: Path,
    notebooks: Sequence[Path],
    profile: str,
    folder: Path,
    parameters: Mapping[str, object],
    settings: Mapping[str, object],
    any_size: bool = False,
) -> list[PlannedTrial]:
    """The planned trials of a grid file; a `KitError` where one cannot run, or they are many and not `any_size`."""
    trials = read_grid(grid)
    planned = plan_trials(trials, notebooks, profile, folder, parameters, settings)
    if len(trials) > UNASKED and not any_size:
        many = f"{len(trials)} trials of {len(notebooks)} notebook{'s' if len(notebooks) > 1 else ''} each"
        raise GridError(f"grid {grid}: {many}, allowed: {UNASKED}. Give --yes to run them all, or --notebooks")
    return planned


def requested_cluster(
    address: str, workers: int | None, cpus: float | None, gpus: float | None, has_grid: bool
) -> Cluster | None:
    """The Ray cluster that a command's options ask for, None where none does; a `KitError` where they do not agree."""
    given = {"--ray": address or None, "--workers": workers, "--cpus": cpus, "--gpus": gpus}
    first = next((option for option, value in given.items() if value is not None), None)
    if first is None:
        return None
    if not address:
        raise KitError(f"{first}: only with --ray. Add --ray local, or leave it out")
    if not has_grid:
        raise KitError("--ray: only with --grid. Add one, or leave it out")
    return Cluster(address, 1.0 if cpus is None else cpus, gpus or 0.0, workers)


def run_grid(
    trials: Sequence[PlannedTrial],
    folder: Path,
    minutes_per_cell: float,
    cluster: Cluster | None,
    on_result: Callable[[TrialResult], object],
) -> list[TrialResult]:
    """Run a grid's trials, one after the other or on a Ray cluster, and return those that failed.

    `on_result` is called with each result when it is there.
    """
    print(f"grid folder: {folder}", flush=True)
    write_order(folder, trials)
    results = _on_ray(trials, folder, minutes_per_cell, cluster) if cluster else _in_turn(trials, minutes_per_cell)
    errors: dict[str, TrialResult] = {}
    with contextlib.closing(results):
        for result in results:
            if result.error:
                errors[result.name] = result
                print(f"      failed: {result.error}", file=sys.stderr, flush=True)
            on_result(result)
    return [errors[trial.name] for trial in trials if trial.name in errors]


def _in_turn(trials: Sequence[PlannedTrial], minutes_per_cell: float) -> Iterator[TrialResult]:
    for number, trial in enumerate(trials, start=1):
        before = finished(trial)
        print(f"[{number}/{len(trials)}] {trial.name}{', finished before' if before else ''}", flush=True)
        with training_progress(trial.folder):
            result = before or run_trial(trial, minutes_per_cell, lambda one: print(f"      {one.name}", flush=True))
        yield result


def _on_ray(
    trials: Sequence[PlannedTrial], folder: Path, minutes_per_cell: float, cluster: Cluster
) -> Iterator[TrialResult]:
    before = [result for trial in trials if (result := finished(trial)) is not None]
    rest = [trial for trial in trials if trial.name not in {result.name for result in before}]
    for number, result in enumerate(before, start=1):
        print(f"[{number}/{len(trials)}] {result.name}, finished before", flush=True)
        yield result
    if not rest:
        return
    with probe_file(folder) as probe, connected(cluster) as description:
        print(description, flush=True)
        check_machines(cluster, probe, [notebook.path for notebook in rest[0].notebooks])
        coming = run_trials_on_ray(rest, probe, cluster, minutes_per_cell)
        for number, result in enumerate(coming, start=len(before) + 1):
            print(f"[{number}/{len(trials)}] {result.name}, {result.minutes:.1f} min", flush=True)
            yield result


@contextlib.contextmanager
def training_progress(folder: Path, seconds: float = 20.0) -> Iterator[None]:
    """Print from time to time how far a run's training is, from the last line of its metrics.jsonl."""
    done = threading.Event()

    def report() -> None:
        printed = 0
        while not done.wait(seconds):
            with contextlib.suppress(IndexError, ValueError, KeyError, TypeError):  # nothing is there yet
                row = json.loads(metrics_lines(folder)[-1])
                now = f"reward {row['reward']:.3f}, {row['step_time']:.1f} s an iteration"
                if row["iteration"] != printed:
                    print(f"      iteration {row['iteration']}: {now}", flush=True)
                printed = row["iteration"]

    threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        done.set()
