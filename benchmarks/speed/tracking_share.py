"""What do the mirrors of a run cost? The share of an iteration that wandb (offline) and TensorBoard take, with both on.

Profile tiny, with its samples and tables at each validation. `python -m benchmarks.speed.tracking_share` trains for
some iterations and prints two shares of the training's seconds: what an iteration's line costs, and all calls together.
Opening and closing the mirrors happens once a run, whatever its length, and stands apart.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import pandas as pd
import typer

import grpo_kit as gk
from grpo_kit.evaluation.intervals import bootstrap_interval
from grpo_kit.runs.tracking import Tracker

CALLS = ("__enter__", "log", "log_samples", "__exit__")


def main(iterations: Annotated[int, typer.Option(min=20, help="of the run that is measured")] = 60) -> None:
    """Train, count the seconds inside the tracker, print the shares."""
    spent: dict[str, list[float]] = defaultdict(list)
    changes = {"tracking_settings.wandb": "offline", "tracking_settings.tensorboard": True}
    config = gk.load_config("tiny", changes | {"training_settings.num_iterations": iterations})
    kit = gk.load_experiment(config)
    with tempfile.TemporaryDirectory() as folder:
        patches = [patch.object(Tracker, name, timed(getattr(Tracker, name), spent[name])) for name in CALLS]
        for one in patches:
            one.start()
        gk.train(kit, Path(folder) / "run", progress=False)
        for one in patches:
            one.stop()
        steps = pd.read_json(Path(folder) / "run" / "metrics.jsonl", lines=True)["step_time"].to_numpy()
    lines = pd.Series(spent["log"]).tail(len(steps)).to_numpy()  # validations' lines among them
    share = bootstrap_interval(lines / steps)
    typer.echo(f"a line: {share['mean']:.2%} [{share['low']:.2%}, {share['high']:.2%}] of an iteration's seconds")
    together = sum(spent["log"]) + sum(spent["log_samples"])
    typer.echo(f"all lines, pictures and tables: {together / steps.sum():.2%} of {steps.sum():.0f} s of iterations")
    typer.echo(f"opening {sum(spent['__enter__']):.1f} s, closing {sum(spent['__exit__']):.1f} s, once a run")


def timed(call: Callable, seconds: list[float]) -> Callable:
    """The same call, which notes what it takes."""

    def measured(*arguments: object, **options: object) -> object:
        started = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    return measured


if __name__ == "__main__":
    typer.run(main)
