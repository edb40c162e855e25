"""What `test_processes.py` runs in each of several processes; the main one writes what it found as JSON.

python -m accelerate.commands.launch … tests/support/parallel_worker.py SCRATCH
"""

import copy
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from grpo_kit.config import Config, KitError, load_config
from grpo_kit.experiment import Experiment, load_experiment
from grpo_kit.grpo import LOSS_TYPES
from grpo_kit.grpo.advantages import group_advantages
from grpo_kit.grpo.loss import token_weights
from grpo_kit.models.policy import Policy
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rollout import Rollout
from grpo_kit.training import step as step_module
from grpo_kit.training.accumulation import Accumulation, Part
from grpo_kit.training.iteration import collect, collect_groups
from grpo_kit.training.launch import joined
from grpo_kit.training.loop import train
from grpo_kit.training.processes import ALONE, ProcessError, Processes, full_tensor
from grpo_kit.training.step import grpo_step

SETTINGS = {
    "model_settings.device": "cpu",
    "training_settings.num_iterations": 2,
    "training_settings.prompts_per_iteration": 3,  # two groups for one process, one for the other
    "training_settings.group_size": 4,
    "training_settings.validate_every": 1,
    "training_settings.save_every": 1,
    "generation_settings.num_inference_steps": 1,
    "evaluation_settings.validation_prompts": 1,
    "evaluation_settings.paraphrases": False,
}
NAN = float("nan")
VARIED = [0.1, 0.5, 0.2, 0.9, 0.3, 0.3, 0.8, 0.1, 0.7, 0.2, 0.4, 0.6]
REWARDS = {"all": VARIED, "some lost": [*VARIED[:6], NAN, NAN, *VARIED[8:]], "a share lost": [NAN] * 4 + VARIED[4:]}
SCALES, SIZES = ("group", "batch", "none"), (None, 5, 1)


def settings() -> tuple[Config, Config]:
    """Of a run that ends after one iteration, and of the same one that goes on."""
    return (load_config("tiny", SETTINGS | {"training_settings.num_iterations": number}) for number in (1, 2))


class Watched(torch.optim.SGD):
    """Keeps every whole gradient that it is given, and changes nothing."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.trainable_parameters(), lr=0.0)
        self.gradients: list[torch.Tensor] = []

    def step(self, closure: None = None) -> None:
        """Keep the gradients of all parameters, one after the other."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        given = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.gradients.append(torch.cat([full_tensor(gradient).flatten() for gradient in given]))


def cases() -> list[dict[str, object]]:
    """Training settings: any two together, the sizes of a micro-batch in turn."""
    names = ("loss_type", "scale_rewards", "beta")
    product = [dict(zip(names, values, strict=True)) for values in itertools.product(LOSS_TYPES, SCALES, (0.0, 0.04))]
    pairs = [case for i, case in enumerate(product) if (i // 6 + i % 6 // 2 + i % 2) % 2 == 0]
    found = [case | {"micro_batch_size": SIZES[(i + i // 3) % 3]} for i, case in enumerate(pairs)]
    return [case | ({"epsilon_high": 5.0} if case["loss_type"] == "cispo" else {}) for case in found]


def halves() -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """The cases in two parts, each of which has every value of every setting."""
    first, second = [], []
    for i, case in enumerate(cases()):
        (second if (i // 3 + i % 3 + i // 6) % 2 else first).append(case)
    return first, second


def gradient(
    kit: Experiment, rollout: Rollout, case: dict[str, object], watched: Watched, processes: Processes
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Advantages, gradient, and the metrics of one step."""
    training = {"max_grad_norm": 1e9, "updates_per_rollout": 1} | case
    config = load_config(kit.config, {f"training_settings.{name}": value for name, value in training.items()})
    watched.gradients.clear()
    stats = grpo_step(kit.policy, watched, rollout, config, processes)
    return stats.advantages, watched.gradients[-1], stats.metrics


def drifted(rollout: Rollout, rewards: list[float]) -> Rollout:
    """With these rewards, and as if the policy had moved since it sampled: ratios on both sides of the clip."""
    noise = torch.randn(rollout.old_logprobs.shape, generator=torch.Generator().manual_seed(0))
    old = rollout.old_logprobs + 0.2 * noise * rollout.completion_mask
    return dataclasses.replace(rollout, rewards=torch.tensor(rewards, dtype=torch.float64), old_logprobs=old)


# --- versions that are broken on purpose ------------------------------------------------------------------------------


@contextmanager
def weights_of_the_local_batch() -> Iterator[None]:
    """Each process weighs its tokens as if its own rows were the batch."""
    right = Accumulation._divided

    def wrong(accumulation: Accumulation, batch: Part) -> tuple[list[Part], int]:
        parts, own = right(accumulation, batch)
        rows = torch.cat([part.mask for part in parts[:own]])
        local = token_weights(rows, "dapo").split([len(part.mask) for part in parts[:own]])
        changed = [dataclasses.replace(part, weights=w) for part, w in zip(parts[:own], local, strict=True)]
        return changed + parts[own:], own

    with patch.object(Accumulation, "_divided", wrong):
        yield


@contextmanager
def mean_over_processes() -> Iterator[None]:
    """The mean that DDP takes is left as the batch's gradient."""
    with patch.object(Processes, "backward", lambda self, loss: loss.backward()):
        yield


@contextmanager
def statistics_of_the_local_batch(processes: Processes) -> Iterator[None]:
    """Each process scales its rewards by its own rows' spread."""

    def wrong(rewards: torch.Tensor, group_ids: torch.Tensor, **options: object) -> torch.Tensor:
        shard = processes.shards(int(group_ids.max()) + 1)[processes.rank]
        own = (group_ids >= shard.start) & (group_ids < shard.stop)
        advantages = torch.zeros_like(rewards)
        advantages[own] = group_advantages(rewards[own], group_ids[own], **options)
        return advantages

    with patch.object(step_module, "group_advantages", wrong):
        yield


@contextmanager
def seeds_of_the_local_batch() -> Iterator[None]:
    """Each process counts its prompts from 0."""
    right = Policy.sample
    with patch.object(Policy, "sample", lambda self, *args, first_prompt=0, **options: right(self, *args, **options)):
        yield


# --- what is compared -------------------------------------------------------------------------------------------------


def far(found: tuple, expected: tuple) -> dict[str, float]:
    """Largest distances of advantages, gradients and metrics, and the gradients' in lengths of the expected one."""
    (advantages, grad, metrics), (right_advantages, right, right_metrics) = found, expected
    same = [name for name in right_metrics if not name.startswith("time/")]
    return {
        "advantages": float((advantages - right_advantages).abs().max()),
        "gradient": float((grad - right).abs().max()),
        "gradient, relative": float((grad - right).norm() / right.norm()),
        "metrics": max(abs(metrics[name] - right_metrics[name]) for name in same if metrics[name] == metrics[name]),
        "norm": float(right.norm()),
    }


LOST = {"some lost": {"loss_type": "dapo", "micro_batch_size": 5}, "a share lost": {"micro_batch_size": 1}}
TWIN = {"loss_type": "dapo", "scale_rewards": "batch"}
Found = tuple[torch.Tensor, torch.Tensor, dict[str, float]]  # advantages, gradient, metrics


def steps_of_one(kit: Experiment, rollout: Rollout, processes: Processes) -> dict[str, Found]:
    """What one process finds for each case and its rewards; every process computes some of them, and all get all."""
    own = dataclasses.replace(kit, policy=copy.deepcopy(kit.policy))
    asked = [(case, "all") for case in (*cases(), TWIN)] + [(case, name) for name, case in LOST.items()]
    watched = Watched(own.policy)
    shares = processes.gather(
        lambda: {
            f"{case}, {name}": gradient(own, drifted(rollout, REWARDS[name]), case, watched, ALONE)
            for case, name in asked[processes.rank :: processes.count]
        }
    )
    return {name: found for share in shares for name, found in share.items()}


def compare_steps(
    kit: Experiment, rollout: Rollout, processes: Processes, expected: dict[str, Found], chosen: list[dict[str, object]]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Steps of all processes against those of one, for each chosen case; and the same for each broken version."""
    several = dataclasses.replace(kit, policy=copy.deepcopy(kit.policy))
    watched = Watched(several.policy)
    processes.prepare(several.policy, watched)

    def distance(case: dict[str, object], name: str = "all") -> dict[str, float]:
        found = gradient(several, drifted(rollout, REWARDS[name]), case, watched, processes)
        return far(found, expected[f"{case}, {name}"])

    steps = {str(case): distance(case) for case in chosen}
    steps |= {f"{case}, {name}": distance(case, name) for name, case in LOST.items()}
    twins: dict[str, Callable] = {
        "weights": weights_of_the_local_batch,
        "mean": mean_over_processes,
        "statistics": lambda: statistics_of_the_local_batch(processes),
    }
    broken = {}
    for name, version in twins.items():
        with version():
            broken[name] = distance(TWIN)
    return steps, broken


def compare_rollouts(kit: Experiment, processes: Processes) -> dict[str, object]:
    """A rollout of all processes against that of one; and whether local seeds would be seen."""
    prompts = kit.train_prompts[:3]

    def rollout(workers: Processes) -> Rollout:
        return collect_groups(kit, prompts, 0, workers)

    one, several = rollout(ALONE), rollout(processes)
    with seeds_of_the_local_batch():
        broken = rollout(processes)
    return {
        "texts": one.enhanced_prompts == several.enhanced_prompts,
        "ids": torch.equal(one.completion_ids, several.completion_ids),
        "mask": torch.equal(one.completion_mask, several.completion_mask),
        "seeds": torch.equal(one.image_seeds, several.image_seeds),
        "groups": torch.equal(one.group_ids, several.group_ids),
        "pictures": sum(image is not None for row in several.images for image in row),
        "rewards": float((one.rewards - several.rewards).abs().max()),
        "old_logprobs": float((one.old_logprobs - several.old_logprobs).abs().max()),
        "local seeds are seen": one.enhanced_prompts != broken.enhanced_prompts,
    }


def compare_groups_drawn_again(kit: Experiment, processes: Processes) -> dict[str, object]:
    """As `compare_rollouts`, where there are at times fewer groups to draw again than processes."""
    training = {"prompts_per_iteration": 3, "max_resampling": 6, "group_size": 4}
    config = load_config(kit.config, {f"training_settings.{name}": value for name, value in training.items()})

    def long(images: list, prompts: list[str], enhanced_prompts: list[str]) -> list[float]:
        return [float(len(text) > 54) for text in enhanced_prompts]

    own = dataclasses.replace(kit, config=config).with_rewards(Rewards({"long": long}, {"long": 1.0}))
    one, several = collect(own, 1, ALONE), collect(own, 1, processes)
    return {
        "attempts": one.attempts.tolist(),
        "several": several.attempts.tolist(),
        "texts": one.enhanced_prompts == several.enhanced_prompts,
        "rewards": torch.equal(one.rewards, several.rewards),
        "pictures": sum(image is not None for row in several.images for image in row),
    }


def compare_turns(kit: Experiment, processes: Processes) -> dict[str, object]:
    """A rollout of two turns, and the step on it, of all processes against those of one; then one that goes wrong."""
    config = load_config(kit.config, {"generation_settings.turns": 2, "training_settings.beta": 0.04})
    own, shared = (dataclasses.replace(kit, config=config, policy=copy.deepcopy(kit.policy)) for _ in range(2))
    one, several = collect(own, 1, ALONE), collect(shared, 1, processes)
    expected = gradient(own, one, {}, Watched(own.policy), ALONE)
    watched = Watched(shared.policy)
    processes.prepare(shared.policy, watched)
    last = one.turn_ids == 1
    mixed = dataclasses.replace(several, context_ids=several.context_ids.where(~last, several.context_ids.flip(0)))
    logged = one.metrics(), several.metrics()
    return {
        "turns": several.turns,
        "texts": one.enhanced_prompts == several.enhanced_prompts,
        "rows": all(torch.equal(getattr(one, n), getattr(several, n)) for n in ("group_ids", "context_ids", "kept")),
        "contexts": [context.prompt for context in one.contexts] == [context.prompt for context in several.contexts],
        "logged": max(abs(logged[0][name] - logged[1][name]) for name in logged[0]),
        "step": far(gradient(shared, several, {}, watched, processes), expected),
        "mixed": far(gradient(shared, mixed, {}, watched, processes), expected),
    }


def failures(processes: Processes) -> list[str]:
    """What every process hears of an error in the second one, and of one in the main one."""
    heard = []

    def fail(rank: int) -> None:
        if processes.rank == rank:
            raise KitError(f"broken in {rank}")

    for share, rank in ((processes.gather, 1), (processes.on_main, 0)):
        try:
            share(lambda rank=rank: fail(rank))
        except ProcessError as error:
            heard.append(str(error))
    return heard


def main(scratch: Path) -> None:
    """Compare rollouts, and steps in every setting; then train.

    One iteration goes into `from_two`; the run of one process in `from_one` goes on.
    """
    half, whole = settings()
    with joined(half, scratch / "from_two") as processes:
        kit = load_experiment(half)
        rollout = collect_groups(kit, kit.train_prompts[:3], 0, processes)
        spread = Processes(processes.accelerator)
        spread.sharded = True
        found = {"rollouts": compare_rollouts(kit, processes), "processes": processes.count}
        found |= {"again": compare_groups_drawn_again(kit, processes), "turns": compare_turns(kit, processes)}
        expected = steps_of_one(kit, rollout, processes)
        for number, (name, workers) in enumerate({"ddp": processes, "fsdp": spread}.items()):
            steps, broken = compare_steps(kit, rollout, workers, expected, halves()[number])
            found[name] = {"steps": steps, "broken": broken}
        own = failures(processes)
        found["heard"] = processes.gather(lambda: own)
        train(load_experiment(half), scratch / "from_two", progress=False, processes=processes)
        train(load_experiment(whole), scratch / "from_one", progress=False, processes=spread)
        if processes.is_main:
            (scratch / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
