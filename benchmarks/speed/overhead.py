"""How much an iteration costs beyond the calls that no iteration can do without.

The bare calls are timed where they happen, so that they have exactly the iteration's shapes: forward passes of policy
and reference, backward, gradient clipping, optimizer step, the pipeline's call and its text encoding, CLIP's encoders.
Everything else is overhead: templates and tokenizers, choosing tokens, log-probabilities and entropies, advantages and
loss, finding duplicates, checking and converting images, CLIP's preprocessing, metrics. What the libraries themselves
waste inside a call counts as the call's.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.speed import measure, text_policy
from benchmarks.speed.peer import make_optimizer
from benchmarks.speed.policy_iteration import configured as configured_text
from benchmarks.speed.policy_iteration import make_kit
from benchmarks.speed.results import Result, Settings
from benchmarks.speed.text_policy import Shape
from benchmarks.speed.whole_iteration import configured
from grpo_kit.experiment import Experiment, load_experiment
from grpo_kit.models.policy import Policy
from grpo_kit.training.iteration import run_iteration

Call = tuple[str, object, str]  # a name, what owns the call, its attribute


class Stopwatch:
    """Adds up the processor and wall seconds of watched calls by name; a call inside another counts once."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}
        self._busy = False

    def watch(self, name: str, call: Callable) -> Callable:
        """The call, timed."""

        @wraps(call)
        def watched(*args: object, **options: object) -> object:
            if self._busy:
                return call(*args, **options)
            self._busy, cpu, wall = True, time.process_time(), time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self._busy = False
                total = self.seconds.setdefault(name, dict.fromkeys(measure.CLOCKS, 0.0))
                total["cpu"] += time.process_time() - cpu
                total["wall"] += time.perf_counter() - wall

        return watched

    def total(self) -> measure.Seconds:
        """All watched seconds since the last time; the watch starts again."""
        sums = {clock: sum(part[clock] for part in self.seconds.values()) for clock in measure.CLOCKS}
        self.seconds.clear()
        return measure.Seconds(**sums)


def overhead(settings: Settings) -> Result:
    """An iteration's seconds by those of its bare calls: the whole on the embedded world, the policy's part on text."""
    world = load_experiment(configured())
    optimizer = make_optimizer(world.policy.trainable_parameters(), world.config.training_settings)
    whole, case = _measure(
        lambda number: run_iteration(world, optimizer, number + 2),
        policy_calls(world.policy, optimizer) + image_calls(world),
        2 * settings.pairs,
    )
    shape = Shape()
    with tempfile.TemporaryDirectory() as place:
        kit = make_kit(text_policy.build(Path(place)), shape, configured_text(shape, beta=0.04))
    part, other = _measure(
        lambda number: kit.iterate(text_policy.prompts(shape, number), seed=number + 1),
        policy_calls(kit.policy, kit.optimizer),
        settings.pairs,
    )
    figures = [
        measure.ratio_figure("whole iteration / its bare calls", *whole, 1.10, 1.05, more_is_better=False),
        measure.ratio_figure(f"policy's part / its bare calls, {shape}", *part, more_is_better=False),
    ]
    cases = [{"case": "embedded world"} | case, {"case": "text policy"} | other]
    return Result("W4", "overhead of an iteration", figures, cases)


def _measure(
    iterate: Callable[[int], object], calls: list[Call], rounds: int
) -> tuple[tuple[list[measure.Seconds], list[measure.Seconds]], dict]:
    """Seconds of iterations and of the bare calls in them, and both for the record."""
    stopwatch, whole, bare, parts = Stopwatch(), [], [], []
    with ExitStack() as stack:
        for name, owner, attribute in calls:
            stack.enter_context(patch.object(owner, attribute, stopwatch.watch(name, getattr(owner, attribute))))
        for number in range(-1, rounds):
            seconds = measure.timed(lambda number=number: iterate(number))
            split = {name: dict(part) for name, part in stopwatch.seconds.items()}
            total = stopwatch.total()
            if number >= 0:
                whole.append(seconds)
                bare.append(total)
                parts.append(split)
    return (whole, bare), {"raw": measure.raw({"iteration": whole, "bare calls": bare}), "calls": parts}


def policy_calls(policy: Policy, optimizer: torch.optim.Optimizer) -> list[Call]:
    """The bare calls of sampling and of the step."""
    return [
        ("policy forward", policy.model, "forward"),
        ("reference forward", policy.reference, "forward"),
        ("backward", torch.Tensor, "backward"),
        ("gradient clipping", torch.nn.utils, "clip_grad_norm_"),
        ("optimizer step", optimizer, "step"),
    ]


def image_calls(world: Experiment) -> list[Call]:
    """The bare calls of drawing and scoring."""
    pipeline, clip = world.generator.pipeline, world.rewards.parts["clip_similarity"].model
    return [
        ("pipeline", type(pipeline), "__call__"),
        ("text encoding", pipeline, "encode_prompt"),
        ("clip images", clip, "encode_image"),
        ("clip texts", clip, "encode_text"),
    ]
