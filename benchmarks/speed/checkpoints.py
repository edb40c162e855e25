"""What a checkpoint after each iteration of `tiny` costs: written, flushed, hashed, read again; beside torch.save."""

import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

import grpo_kit as gk
from benchmarks.speed import measure
from benchmarks.speed.results import Figure, Result, Settings
from grpo_kit.experiment import Experiment
from grpo_kit.training import loop

SKIPPED = 2  # first iterations, which allocate memory


def checkpoints(settings: Settings, profile: str = "tiny") -> Result:
    """A commit's share of the seconds of its iteration, and its seconds by those of torch.save for the same state."""
    count = 4 * settings.pairs + SKIPPED
    changes = {"num_iterations": count, "save_every": 1, "validate_every": 10 * count}
    config = gk.load_config(profile, {f"training_settings.{name}": value for name, value in changes.items()})
    kit, commit, rows, begun = gk.load_experiment(config), loop.commit, [], [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder:

        def watched(kit: Experiment, optimizer: torch.optim.Optimizer, *given: object) -> None:
            spent = measure.timed(lambda: commit(kit, optimizer, *given))
            whole = time.perf_counter() - begun[0]
            state = {"policy": kit.policy.trainable_state(), "optimizer": optimizer.state_dict()}
            plain = measure.timed(lambda: torch.save(state, Path(folder) / "plain.pt"))
            rows.append({"commit": spent.wall, "iteration": whole, "torch.save": plain.wall})
            begun[0] = time.perf_counter()

        with patch.object(loop, "commit", watched):
            gk.train(kit, Path(folder) / "run", progress=False)
    kept = rows[SKIPPED:count]
    share = measure.median([row["commit"] / row["iteration"] for row in kept])
    peer = measure.median([row["commit"] / row["torch.save"] for row in kept])
    figures = [
        Figure("a commit's share of its iteration", *(100 * v for v in vars(share).values()), 3, 1, False, unit=" %"),
        Figure("a commit, by torch.save", *vars(peer).values(), more_is_better=False),
    ]
    return Result("W10", "a checkpoint after each iteration", figures, [{"raw": rows}])
