"""Exercises of 07: solutions pass, stubs say that nothing is written, mistakes are called by their names."""

import pandas as pd
import pytest
import torch

import grpo_kit as gk
from grpo_kit.config import PROJECT_ROOT
from grpo_kit.config.prompts import balanced_batch
from grpo_kit.course import check, exercises_07
from grpo_kit.training.iteration import rollout_seed
from tests.support.course import solution, stub
from tools import diagnose_runs

ANSWERS = {"07.1": "my_loop", "07.2": "diagnose"}
CAUSES = {1: "beta 0", 2: "random reward", 3: "healthy", 4: "learning rate too high", 5: "gamed"}


def loop(kit, first, last, *, seed_of=rollout_seed, prompts_of=int, fresh=False, steps=1, from_0=False, end=1):
    settings, optimizer, found = kit.config.training_settings, None, []
    for iteration in range(0, last - first + 1) if from_0 else range(first, last + end):
        if optimizer is None or fresh:
            weights = kit.policy.trainable_parameters()
            optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        prompts = balanced_batch(
            kit.train_prompts, settings.prompts_per_iteration, settings.seed, prompts_of(iteration)
        )
        seed = seed_of(settings.seed, iteration)
        rollout = gk.collect_rollout(kit.policy, kit.generator, kit.rewards, prompts, settings.group_size, seed)
        for _ in range(steps):
            gk.grpo_step(kit.policy, optimizer, rollout, kit.config)
        found.append(float(rollout.rewards.mean()))
    return found


WRONG = [
    ({"fresh": True}, "forgets its momentum"),
    ({"from_0": True}, "counted from 0"),
    ({"end": 0}, "the last iteration is missing"),
    ({"seed_of": lambda seed, _: seed}, "the rollout's seed is the same"),
    ({"seed_of": lambda seed, iteration: seed + iteration}, "not a sum"),
    ({"prompts_of": lambda _: 0}, "the prompts are the same"),
    ({"steps": 0}, "the step is missing"),
    ({"steps": 3}, "makes all updates of a rollout: call it once"),
]


@pytest.fixture(scope="module", autouse=True)
def computed_once():
    """What the check trains itself, right and wrong, comes out the same each time: it is trained once and kept."""
    kept, trained = {}, exercises_07._as_trained

    def remembered(kit, *iterations, **mistake):
        key = (iterations, *mistake.items())
        if key not in kept:
            rewards = trained(kit, *iterations, **mistake)
            kept[key] = rewards, {name: value.clone() for name, value in kit.policy.trainable_state().items()}
        rewards, state = kept[key]
        kit.policy.load_trainable_state(state)
        return rewards

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exercises_07, "_as_trained", remembered)
        yield


@pytest.mark.parametrize("name", ANSWERS)
def test_the_solution_of_the_notebook_passes_and_its_stub_does_not(name):
    assert check(name, solution(name)[ANSWERS[name]]).passed
    empty = check(name, stub(name)[ANSWERS[name]])
    assert not empty.passed and "not written yet" in empty.message


@pytest.mark.parametrize(
    ("change", "idea"), [WRONG[0], *(pytest.param(*one, marks=pytest.mark.slow) for one in WRONG[1:])]
)
def test_a_mistake_in_the_loop_is_called_by_its_name(change, idea):
    found = check("07.1", lambda *given: loop(*given, **change))
    assert not found.passed and idea in found.message, found.message


@pytest.mark.parametrize(
    ("changed", "idea"),
    [
        ({1: "healthy", 3: "beta 0"}, "its KL goes on growing"),
        ({5: "healthy"}, "the highest reward is not the best run"),
        ({3: "gamed", 5: "healthy"}, "gold rises with the reward: no gaming"),
        ({2: "learning rate too high", 4: "random reward"}, "its steps ordinary"),
        ({4: "gamed", 5: "learning rate too high"}, "here both break down"),
    ],
)
def test_a_wrong_diagnosis_is_called_by_its_name(changed, idea):
    found = check("07.2", lambda: CAUSES | changed)
    assert not found.passed and idea in found.message, found.message


def test_the_recorded_runs_are_those_that_the_tool_makes_and_show_what_is_asked_of_them():
    assert {number: cause for number, (cause, _) in diagnose_runs.CAUSES.items()} == CAUSES
    lines = pd.read_json(PROJECT_ROOT / "data/recorded_runs/validations.jsonl", lines=True)
    last = lines[lines["iteration"] == 25].set_index("run")
    gold = pd.Series({run: scores["gold"] for run, scores in last["rewards"].items()})
    assert last["reward"].idxmax() == 5 and last["diversity"].idxmin() == 5 and last["reward"][5] > gold[5] + 0.1
    assert set(gold[gold < 0.5].index) == {2, 4} and gold.idxmax() == 3
    metrics = pd.read_json(PROJECT_ROOT / "data/recorded_runs/metrics.jsonl", lines=True)
    kl = metrics[metrics["iteration"] == 25].set_index("run")["kl"]
    assert kl.idxmax() == 4 and kl[1] > 1.5 * kl[3] and kl.idxmin() == 2


def test_a_loop_with_an_optimizer_that_is_not_fused_is_right_too():
    assert check("07.1", loop).passed
