"""Three hundred iterations: does the process grow, and do iterations get slower?

The embedded world with few and quick images, so that policy, kept text embeddings, generator, CLIP and optimizer all
take part, many times over. The learning rate is next to nothing, so that the work stays the same. Memory is read after
every iteration, with the allocator's free memory given back. Each iteration's seconds are divided by those of a fixed
product of matrices right after it, since a machine's own speed drifts too. The first iterations are left out.
"""

import gc

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.speed import measure
from benchmarks.speed.results import Figure, Result, Settings
from benchmarks.speed.whole_iteration import configured
from grpo_kit.config import load_config
from grpo_kit.experiment import load_experiment
from grpo_kit.training.iteration import run_iteration
from grpo_kit.training.loop import make_optimizer

ITERATIONS = 300
WARM_UP = 60
PLAIN = {
    "training_settings.prompts_per_iteration": 2,
    "training_settings.group_size": 4,
    "generation_settings.num_inference_steps": 2,
    "generation_settings.max_new_tokens": 6,  # nearly every rewrite is longer: each iteration is the same work
}


def long_run(settings: Settings) -> Result:
    """Memory's growth over 100 iterations, and the drift of an iteration's seconds over the run."""
    iterations = ITERATIONS // 3 if settings.quick else ITERATIONS
    kit = load_experiment(load_config(configured(), PLAIN))
    optimizer = make_optimizer(kit, kit.config)
    gc.freeze()
    held, seconds, yardstick = [], [], []
    for iteration in tqdm(range(iterations), desc="long run", leave=False, disable=None):
        seconds.append(measure.timed(lambda iteration=iteration: run_iteration(kit, optimizer, iteration)).cpu)
        yardstick.append(measure.timed(_fixed_work).cpu)
        held.append(measure.resident_mb())
    warm = min(WARM_UP, iterations // 3)
    relative = np.array(seconds[warm:]) / np.array(yardstick[warm:])
    memory, drift = measure.slope(held[warm:]), measure.slope(relative / np.median(relative))
    per_100, whole = [100 * v for v in vars(memory).values()], [100 * len(relative) * v for v in vars(drift).values()]
    figures = [
        Figure("memory held", *per_100, 1.0, 0.2, False, " MB per 100 iterations"),
        Figure("an iteration's seconds", *whole, 2.0, None, False, " % over the run"),
    ]
    gc.unfreeze()
    raw = {"held_mb": np.round(held, 3).tolist(), "cpu": np.round(seconds, 5).tolist()}
    raw["yardstick"] = np.round(yardstick, 5).tolist()
    return Result("W6", f"{iterations} iterations, 2 prompts × 4, 2 steps", figures, [{"case": "run", "raw": raw}])


def _fixed_work() -> None:
    rows, weights = torch.ones(2816, 160), torch.ones(160, 640)
    for _ in range(8):
        torch.nn.functional.gelu(rows @ weights)
