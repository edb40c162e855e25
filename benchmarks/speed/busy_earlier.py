"""Seconds of an iteration of `tiny` on a busy machine, now and at an earlier commit (in git's history).

`python -m benchmarks.speed.busy_earlier` prints a line for each thing that computes beside it. Both sides train some
iterations with the same Python, in turns, beside the same programs; the figures are medians of what they logged.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.speed.busy import BESIDE, running
from benchmarks.speed.series import EARLIER, earlier
from grpo_kit.config import PROJECT_ROOT

SKIPPED = 2  # first iterations, which allocate memory


def main(
    iterations: Annotated[int, typer.Option(min=4, help="of each run")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="runs of each")] = 1,
) -> None:
    """Measure and print a line for what computes beside it."""
    with tempfile.TemporaryDirectory() as folder, earlier(Path(folder) / "earlier") as before:
        for name, (programs, *_) in {"nothing": ([],), **BESIDE}.items():
            seconds = {"now": [], EARLIER: []}
            for number in range(rounds):
                for side, checkout in zip(seconds, (PROJECT_ROOT, before), strict=True):
                    run = Path(folder) / f"{side} {name} {number}"
                    with running(programs):
                        seconds[side] += _iterations(checkout, run, iterations)
            found = {side: statistics.median(values) for side, values in seconds.items()}
            typer.echo(f"beside {name}: " + ", ".join(f"{side} {value:.2f} s" for side, value in found.items()))


def _iterations(checkout: Path, run: Path, count: int) -> list[float]:
    """Seconds of a run's iterations."""
    settings = {"num_iterations": count, "validate_every": 10 * count, "save_every": 10 * count}
    options = [part for key, value in settings.items() for part in ("-o", f"training_settings.{key}={value}")]
    command = [sys.executable, "-m", "grpo_kit.cli", "train", "--profile", "tiny", *options, "--run-dir", str(run)]
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment |= {"PYTHONPATH": str(checkout)}
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step_time"] for line in lines[SKIPPED:]]


if __name__ == "__main__":
    typer.run(main)
