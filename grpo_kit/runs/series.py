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
from grpo_kit.runs.notebooks import Executed, Planned, execute, write_profile


def run_series(
    notebooks: Sequence[Planned], profile: str, settings: Mapping[str, object], folder: Path, minutes_per_cell: float
) -> list[Executed]:
    """Execute notebooks into a run folder, one after the other, until one fails.

    Args:
        notebooks: from `plan`.
        profile: a profile's name or the path of a JSON file.
        settings: of the profile, by dotted key, that this run changes.
        folder: the run's folder.
        minutes_per_cell: the longest that a cell may take.
    """
    print(f"run folder: {folder}", flush=True)
    write_profile(folder, profile, settings)
    ran: list[Executed] = []
    for number, notebook in enumerate(notebooks, start=1):
        print(f"[{number}/{len(notebooks)}] {notebook.name}", flush=True)
        with training_progress(folder):
            ran.append(execute(notebook, folder / "notebooks", minutes_per_cell))
        if ran[-1].error:
            break
    return ran


def plan_grid(
    grid: Path,
    notebooks: Sequence[Path],
    profile: str,
    folder: Path,
    parameters: Mapping[str, object],
    settings: Mapping[str, object],
    any_size: bool = False,
) -> list[PlannedTrial]:
    """Read a grid file and check every trial of it.

    Args:
        grid: for `read_grid`.
        notebooks: and what follows, for `plan_trials`.
        any_size: whether it may be a large one.

    Raises:
        KitError: one line on what is wrong with the file, a trial, or the number of trials.
    """
    trials = read_grid(grid)
    planned = plan_trials(trials, notebooks, profile, folder, parameters, settings)
    if len(trials) > UNASKED and not any_size:
        many = f"{len(trials)} trials of {len(notebooks)} notebook{'s' if len(notebooks) > 1 else ''} each"
        raise GridError(f"grid {grid}: {many}, allowed: {UNASKED}. Give --yes to run them all, or --notebooks")
    return planned


def requested_cluster(
    address: str, workers: int | None, cpus: float | None, gpus: float | None, has_grid: bool
) -> Cluster | None:
    """The Ray cluster that a command's options ask for; None where there are none.

    Raises:
        KitError: options that only count with a cluster, or a cluster without a grid.
    """
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

    Args:
        trials: from `plan_grid`.
        folder: the grid's folder.
        minutes_per_cell: the longest that a cell may take.
        cluster: None runs the trials in this process.
        on_result: called with each result when it is there.
    """
    print(f"grid folder: {folder}", flush=True)
    write_order(folder, trials)
    in_turn = cluster is None
    results = _in_turn(trials, minutes_per_cell) if in_turn else _on_ray(trials, folder, minutes_per_cell, cluster)
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

    def report_restart(trial: PlannedTrial, reason: str) -> None:
        print(f"      {trial.name} is started again: {reason}", file=sys.stderr, flush=True)

    with probe_file(folder) as probe, connected(cluster) as description:
        print(description, flush=True)
        check_machines(cluster, probe, [notebook.path for notebook in rest[0].notebooks])
        coming = run_trials_on_ray(rest, probe, cluster, minutes_per_cell, report_restart)
        for number, result in enumerate(coming, start=len(before) + 1):
            print(f"[{number}/{len(trials)}] {result.name}, {result.minutes:.1f} min", flush=True)
            yield result


@contextlib.contextmanager
def training_progress(folder: Path, seconds: float = 20.0) -> Iterator[None]:
    """Print from time to time how far a run's training is, from the last line of its metrics.jsonl."""
    done = threading.Event()

    def report() -> None:
        printed = ""
        while not done.wait(seconds):
            line = _last_metrics(folder / "metrics.jsonl")
            if line and line != printed:
                print(f"      {line}", flush=True)
            printed = line

    threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _last_metrics(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        row = json.loads(lines[-1])
        return f"iteration {row['iteration']}: reward {row['reward']:.3f}, {row['step_time']:.1f} s an iteration"
    except (IndexError, ValueError, KeyError, TypeError):  # nothing there yet, or half a line
        return ""
