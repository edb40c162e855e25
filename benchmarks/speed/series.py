"""The whole notebook series on the embedded world, as `make run` executes it, beside that of an earlier commit.

Both checkouts take turns with the same Python. A share is not spent computing: starting kernels, papermill, the report.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from benchmarks.speed import measure
from benchmarks.speed.busy import LOOP, running
from benchmarks.speed.results import Figure, Result, Settings
from grpo_kit.config import PROJECT_ROOT

EARLIER = "063f904"  # the last commit before kernels were forked and pictures shared by threads


def series(settings: Settings) -> Result:
    """Seconds of the series by those of the earlier commit (in git's history), and beside two busy loops."""
    rounds = min(settings.pairs, 2)
    with tempfile.TemporaryDirectory() as folder, earlier(Path(folder) / "earlier") as before:
        runs = [Path(folder) / f"run{number}" for number in range(rounds)]
        sides = {
            "now": lambda number: _execute(PROJECT_ROOT, runs[number]),
            EARLIER: lambda number: _execute(before, Path(folder) / f"earlier{number}"),
        }
        timings = measure.alternate(sides, rounds, warm_up=0, label="series")
        shares = [1 - _in_cells(run) / seconds.wall for run, seconds in zip(runs, timings["now"], strict=True)]
        with running([LOOP, LOOP]):
            beside = measure.timed(lambda: _execute(PROJECT_ROOT, Path(folder) / "beside"))
    found = measure.median(measure.paired_ratios(timings["now"], timings[EARLIER], "wall"))
    quiet = measure.median([seconds.wall for seconds in timings["now"]])
    figures = [
        Figure(f"seconds of the series, by {EARLIER}'s", *vars(found).values(), 0.7, 0.5, more_is_better=False),
        Figure("share not spent in cells", *vars(measure.median(shares)).values(), 0.2, 0.12, False, unit=""),
        Figure("the series", *vars(quiet).values(), more_is_better=False, unit=" s"),
        Figure("the series beside two busy loops", beside.wall, more_is_better=False, unit=" s"),
    ]
    return Result("W7", "the notebook series through papermill", figures, [{"raw": measure.raw(timings)}])


@contextmanager
def earlier(folder: Path) -> Iterator[Path]:
    """A checkout of the earlier commit, for a while."""
    git = ["git", "-C", str(PROJECT_ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), EARLIER], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def _execute(checkout: Path, run: Path) -> None:
    command = [sys.executable, "-m", "grpo_kit.cli", "run", "--profile", "tiny", "--run-dir", str(run)]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    subprocess.run(
        command, cwd=checkout, env=environment | {"PYTHONPATH": str(checkout)}, check=True, capture_output=True
    )


def _in_cells(run: Path) -> float:
    """Seconds that papermill saw cells compute."""
    total = 0.0
    for path in (run / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            trace = cell["metadata"].get("papermill", {})
            if trace.get("end_time"):
                ends = [datetime.fromisoformat(trace[name]) for name in ("start_time", "end_time")]
                total += (ends[1] - ends[0]).total_seconds()
    return total
