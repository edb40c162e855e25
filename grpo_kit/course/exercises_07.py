"""Exercises of 07_train: the training loop, and what went wrong in five recorded runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_kit.course.exercise import exercise, expect

if TYPE_CHECKING:
    from grpo_kit.experiment import Experiment

SMALL = {  # of profile tiny: another seed, fewer and coarser pictures than in the notebook
    "training_settings.seed": 7,
    "training_settings.group_size": 3,
    "training_settings.prompts_per_iteration": 2,
    "training_settings.updates_per_rollout": 3,
    "generation_settings.num_inference_steps": 2,
    "reward_settings.monitors": [],
}
Found = tuple[list[float], float]  # the mean reward of each iteration, and how far the weights moved in all


@exercise("07.1", "Write the loop", minutes=20, difficulty=3)
def check_loop(my_loop: Callable[[Experiment, int, int], list[float]]) -> None:
    """Iterations 2 to 4 of an experiment, beside what `gk.train` does in them."""
    from grpo_kit.config import load_config
    from grpo_kit.experiment import load_experiment

    kit = load_experiment(load_config("tiny", SMALL))
    untouched = {name: value.clone() for name, value in kit.policy.trainable_state().items()}

    def run(loop: Callable = _as_trained, first: int = 2, last: int = 4, **mistake: Any) -> Found:
        kit.policy.load_trainable_state(untouched)
        rewards = [float(reward) for reward in loop(kit, first, last, **mistake)]
        state = kit.policy.trainable_state()
        moved = sum(float((state[name] - value).double().square().sum()) for name, value in untouched.items())
        return rewards, moved**0.5

    found, right = run(my_loop), run()
    if len(found[0]) == len(right[0]) and np.allclose(found[0], right[0]) and np.isclose(found[1], right[1], rtol=1e-4):
        return  # the mistakes below need not be made

    def forgetful(kit: Experiment, first: int, last: int) -> list[float]:
        return [_as_trained(kit, iteration, iteration)[0] for iteration in range(first, last + 1)]

    mistakes = {
        "the last iteration is missing: range(first, last + 1)": run(last=3),
        "the iterations are counted from 0: begin with `first`, or a run that goes on repeats itself": run(
            first=0, last=2
        ),
        "the rollout's seed is the same in each iteration: it must depend on the iteration": run(seeds="one"),
        "the rollout's seed is `rollout_seed(settings.seed, iteration)`, not a sum": run(seeds="sum"),
        "the prompts are the same in each iteration: they depend on the iteration": run(fresh_prompts=False),
        "nothing is learned between the iterations: the step is missing": run(step=0),
        "gk.grpo_step makes all updates of a rollout: call it once": run(step=3),
        "the optimizer is made anew in each iteration and forgets its momentum": run(forgetful),
    }
    rewards, moved = ({why: answer[part] for why, answer in mistakes.items()} for part in (0, 1))
    expect(found[0], right[0], "the mean rewards of iterations 2 to 4", wrong=rewards, tolerance=1e-5)
    expect(found[1], right[1], "how far the weights moved in iterations 2 to 4", wrong=moved, tolerance=1e-4)


def _as_trained(
    kit: Experiment, first: int, last: int, seeds: str = "own", fresh_prompts: bool = True, step: int = 1
) -> list[float]:
    """What `gk.train` computes in these iterations; or with other seeds, the same prompts, more steps or none."""
    from grpo_kit.config.prompts import balanced_batch
    from grpo_kit.rollout import collect_rollout
    from grpo_kit.training.iteration import rollout_seed
    from grpo_kit.training.loop import make_optimizer
    from grpo_kit.training.step import grpo_step

    settings, optimizer, found = kit.config.training_settings, make_optimizer(kit, kit.config), []
    for iteration in range(first, last + 1):
        number = iteration if fresh_prompts else 0
        prompts = balanced_batch(kit.train_prompts, settings.prompts_per_iteration, settings.seed, number)
        own, one = rollout_seed(settings.seed, iteration), settings.seed
        seed = {"own": own, "one": one, "sum": one + iteration}[seeds]
        rollout = collect_rollout(kit.policy, kit.generator, kit.rewards, prompts, settings.group_size, seed)
        for _ in range(step):
            grpo_step(kit.policy, optimizer, rollout, kit.config)
        found.append(float(rollout.rewards.nanmean()))
    return found


@exercise("07.2", "Diagnose five runs", minutes=15, difficulty=3)
def check_diagnosis(diagnose: Callable[[], Mapping[int, str]]) -> None:
    """Run → what happened in it; made by `tools/diagnose_runs.py`."""
    no_kl, random, too_high = "beta 0", "random reward", "learning rate too high"
    causes = {1: no_kl, 2: random, 3: "healthy", 4: too_high, 5: "gamed"}
    mistakes = {  # → the runs of which it is told, and the cause that it speaks against
        "its rewrites follow the prompts, and gold rises with the reward: no gaming": ((1, 3), "gamed"),
        "its reward is as good as the healthy run's, but its KL goes on growing: nothing holds it back": (1, "healthy"),
        "its KL stays half as large as that of another run that learns: something holds it back": (3, no_kl),
        "the KL stays small although nothing is learned: a missing KL term would let it grow": (2, no_kl),
        "a gamed run raises the reward that it is trained on, and this one does not": (2, "gamed"),
        "its rewrites are sound and its steps ordinary: look at the gradient's norm of run 4": (2, too_high),
        "a random reward moves a policy slowly and leaves its language sound; here the words break down": (4, random),
        "a gamed run writes well and raises its reward; here both break down": (4, "gamed"),
        "the highest reward is not the best run: its rewrites say nearly the same whatever was asked": (5, "healthy"),
        "reward far above gold, and objects that nobody asked for, come from the reward, not from beta": (5, no_kl),
    }
    found = diagnose()
    expect(sorted(found), sorted(causes), "the runs that are answered")
    for run, cause in causes.items():
        wrong = {why: said for why, (of, said) in mistakes.items() if run in np.atleast_1d(of)}
        expect(found[run], cause, f"run {run}", wrong=wrong)
