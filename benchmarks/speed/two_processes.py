"""One run shared by two processes, beside the same run in one: each computes with one thread, over gloo."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from benchmarks.speed import measure
from benchmarks.speed.results import Figure, Gate, Result, Settings, require
from grpo_kit.config import PROJECT_ROOT

ITERATIONS, SKIPPED = 10, 3  # of a run; the first of them, which allocate memory


def two_processes(settings: Settings) -> Result:
    """Efficiency: seconds of an iteration by one process, by twice those by two; both do the same."""
    seconds, apart = {1: [], 2: []}, []
    with tempfile.TemporaryDirectory() as folder:
        for number in tqdm(range(2 if settings.quick else max(2, settings.pairs // 2)), "pairs"):
            runs = {count: Path(folder) / f"{count}_{number}" for count in seconds}
            for count, run in runs.items():
                _train(run, count)
                seconds[count].append(_iteration(run))
            apart.append(_apart(*runs.values()))
    found = measure.median([one / (2 * two) for one, two in zip(seconds[1], seconds[2], strict=True)])
    figures = [
        Figure("efficiency of two processes", *vars(found).values(), 0.85, 0.92, unit=""),
        *(Figure(f"an iteration, processes: {n}", statistics.median(seconds[n]), unit=" s") for n in seconds),
    ]
    gates = require([Gate("metrics of the first iteration, relative", max(apart), 1e-4)])
    return Result("W9", "one run by two processes", figures, [{"seconds": seconds}], gates)


def _train(run: Path, processes: int) -> None:
    changes = {"num_iterations": ITERATIONS, "validate_every": 10 * ITERATIONS, "save_every": ITERATIONS}
    options = [part for name, value in changes.items() for part in ("-o", f"training_settings.{name}={value}")]
    options += ["-o", "model_settings.device=cpu", "--launch", str(processes), "--run-dir", str(run)]
    command = [sys.executable, "-m", "grpo_kit.cli", "train", "--profile", "tiny", *options]
    subprocess.run(
        command, cwd=PROJECT_ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True
    )


def _lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _iteration(run: Path) -> float:
    """Median seconds of an iteration of a run."""
    return statistics.median(line["step_time"] for line in _lines(run)[SKIPPED:])


def _apart(one: Path, two: Path) -> float:
    """The largest relative difference of what both say of the first iteration: rewards, loss, gradient, KL."""
    first, second = (_lines(run)[0] for run in (one, two))
    names = [name for name in first if not name.startswith(("time/", "sampling/", "step_time"))]
    return max(abs(first[name] - second[name]) / max(abs(first[name]), 1e-3) for name in names)
