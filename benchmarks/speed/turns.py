"""What a second turn costs: seconds of an iteration with one turn, with two, and with branches, and where they go.

`python -m benchmarks.speed.turns` prints a row for each, medians of some iterations after two; docs/eyes.md has them.
One thread; nothing else should compute beside it.
"""

import statistics
import time

import torch

import grpo_kit as gk
from grpo_kit.training.iteration import run_iteration
from grpo_kit.training.loop import make_optimizer

CASES = {
    "one turn": {"generation_settings.turns": 1},
    "two turns": {},
    "two turns, branches": {"generation_settings.branches": True},
}
ITERATIONS, FIRST = 8, 2  # of which the first ones do not count


def seconds(changes: dict[str, object]) -> dict[str, float]:
    """Median seconds of each part of an iteration of `tiny_refine` with some settings changed."""
    kit = gk.load_experiment(gk.load_config("tiny_refine", changes))
    optimizer, rows = make_optimizer(kit, kit.config), []
    for iteration in range(1, ITERATIONS + 1):
        started = time.perf_counter()
        rollout, _ = run_iteration(kit, optimizer, iteration)
        whole = time.perf_counter() - started
        rows.append(rollout.seconds | {"step": whole - sum(rollout.seconds.values()), "all": whole})
    return {part: statistics.median(row[part] for row in rows[FIRST:]) for part in rows[0]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case, changes in CASES.items():
        print(case, {part: round(value, 2) for part, value in seconds(changes).items()}, flush=True)
