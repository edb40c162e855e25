"""`make bench`: every workload in a process of its own, then the table and the figure.

A record is written as soon as its workload is done, and kept: a stopped run goes on where it was. It is measured again
when the code or the settings have changed, or with --again. Exit code 1 tells that a workload could not be measured,
above all that its sides do not do the same work.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from benchmarks.speed.results import BenchmarkError, Settings, figures_of, fingerprint, read, write
from grpo_kit.config import PROJECT_ROOT, KitError

WORKLOADS = {
    "W1": "policy_iteration:iteration",
    "W2": "whole_iteration:whole_iteration",
    "W3": "loss_pass:loss_pass",
    "W4": "overhead:overhead",
    "W5": "growth:growth",
    "W6": "long_run:long_run",
    "W8": "imports:imports",
    "W9": "two_processes:two_processes",
    "W10": "checkpoints:checkpoints",
    "W12": "duplicates:duplicates",
    "W13": "busy:busy",
}
LONG = {"W7": "series:series", "W14": "set_up:set_up", "W15": "to_target:to_target"}  # only where they are named
WHICH = f"which of {', '.join(WORKLOADS)}; all of them. {', '.join(LONG)} only where they are named"
QUICK_PAIRS = 2
QUIET = {  # no network, and none of the libraries' warnings and bars between the lines of ours
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


def main(
    workloads: Annotated[list[str] | None, typer.Argument(help=WHICH)] = None,
    pairs: Annotated[int, typer.Option(min=2, help="rounds in which the sides take turns")] = 7,
    quick: Annotated[bool, typer.Option(help="fewer cases and rounds: to see that all works")] = False,
    threads: Annotated[int, typer.Option(min=1, help="threads of both sides")] = 1,
    out: Annotated[Path, typer.Option(help="where the records go")] = PROJECT_ROOT / "reports" / "bench",
    again: Annotated[bool, typer.Option(help="measure again what is there already")] = False,
    here: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure, and write records, table.md and plot.png."""
    chosen = workloads or list(WORKLOADS)
    if unknown := [name for name in chosen if name not in {**WORKLOADS, **LONG}]:
        typer.echo(f"workload: found {unknown[0]!r}, allowed: {', '.join([*WORKLOADS, *LONG])}", err=True)
        raise typer.Exit(2)
    settings = Settings(min(pairs, QUICK_PAIRS) if quick else pairs, quick, threads)
    if here:
        measure_here(chosen[0], settings, out)
        return
    from benchmarks.speed.table import write_table

    failed = [name for name in tqdm(chosen, desc="workloads") if not measure_apart(name, settings, out, again)]
    if any(out.glob("W*.json")):
        typer.echo(write_table(out).read_text())
    missed = [name for name in chosen if name not in failed and _missed(out / f"{name}.json")]
    for text, names in (("not measured", failed), ("a must is missed", missed)):
        if names:
            typer.echo(f"{text}: {', '.join(names)}", err=True)
    raise typer.Exit(1 if failed else 0)


def measure_apart(name: str, settings: Settings, out: Path, again: bool) -> bool:
    """Measure one workload in a process of its own, unless that was done; False where it failed."""
    path = out / f"{name}.json"
    if path.is_file() and not again and read(path)["settings"] == fingerprint(settings):
        return True
    path.unlink(missing_ok=True)
    options = ["--pairs", str(settings.pairs), "--threads", str(settings.threads), "--out", str(out)]
    options += ["--quick"] if settings.quick else []
    threads = {name: str(settings.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", "benchmarks", name, "--here", *options]
    return subprocess.run(command, env=os.environ | threads | QUIET, cwd=PROJECT_ROOT, check=False).returncode == 0


def measure_here(name: str, settings: Settings, out: Path) -> None:
    """Measure one workload in this process and write its record."""
    torch.set_num_threads(settings.threads)
    module, function = {**WORKLOADS, **LONG}[name].split(":")
    try:
        result = getattr(importlib.import_module(f"benchmarks.speed.{module}"), function)(settings)
    except KitError as error:
        typer.echo(f"{name}: {error}", err=True)
        raise typer.Exit(2) from error
    if result.id != name:
        raise BenchmarkError(f"workload: found a result of {result.id}, needed one of {name}")
    write(result, out / f"{name}.json", fingerprint(settings))


def _missed(path: Path) -> bool:
    return any(figure.must is not None and not figure.reaches(figure.must) for figure in figures_of(read(path)))


if __name__ == "__main__":
    typer.run(main)
