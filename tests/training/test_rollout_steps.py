"""Training draws with `rollout_steps`, validations and evaluations with all."""

import copy
import dataclasses
from pathlib import Path

import pytest

from grpo_kit.config import load_config
from grpo_kit.evaluation.evaluate import evaluate
from grpo_kit.evaluation.validation import validate
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator
from grpo_kit.rewards.loading import load_rewards
from grpo_kit.runs.folder import RunFolder
from grpo_kit.training.iteration import run_iteration
from grpo_kit.training.loop import make_optimizer


@pytest.fixture
def drafting(kit: Experiment) -> Experiment:
    """An experiment that draws with two steps in training, and whose reward draws too."""
    changes = {
        "generation_settings.rollout_steps": 2,
        "reward_settings.weights": {"gain": 1.0},
        "reward_settings.monitors": ["gold"],
        "evaluation_settings.validation_prompts": 2,
        "evaluation_settings.paraphrases": False,
    }
    config = load_config(kit.config, changes)
    rewards = load_rewards(config, kit.generator)
    return dataclasses.replace(kit, config=config, rewards=rewards, policy=copy.deepcopy(kit.policy))


def test_training_draws_with_few_steps_and_everything_else_with_all(
    drafting: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []
    draw = Generator._draw

    def noted(self: Generator, pairs: list) -> list:
        seen.append(self.num_inference_steps)
        return draw(self, pairs)

    monkeypatch.setattr(Generator, "_draw", noted)
    all_steps = drafting.generator.num_inference_steps
    folder = RunFolder.open(tmp_path / "run", drafting.config)
    for work, steps in (
        (lambda: run_iteration(drafting, make_optimizer(drafting, drafting.config), 1), 2),
        (lambda: validate(drafting, 1, folder), all_steps),
        (
            lambda: evaluate(drafting, drafting.val_prompts[:2], compare=("raw", "trained"), seeds_per_prompt=1),
            all_steps,
        ),
    ):
        seen.clear()
        work()
        assert set(seen) == {steps} and drafting.generator.num_inference_steps == all_steps


def test_gain_compares_pictures_of_as_many_steps(drafting: Experiment):
    """The raw prompt's kept score is of the same steps: against itself a picture gains nothing."""
    prompts, seeds = ["a red circle"] * 2, [1, 2]
    gain, generator = drafting.rewards.parts["gain"], drafting.generator
    for count in (2, None):
        with generator.steps(count):
            images = generator.generate_images(prompts, seeds)
            assert gain(images, prompts, prompts, image_seeds=seeds).tolist() == [0.0, 0.0]


def test_steps_are_put_back_after_an_error(kit: Experiment):
    before = kit.generator.num_inference_steps
    with pytest.raises(KeyError), kit.generator.steps(1):
        raise KeyError
    assert kit.generator.num_inference_steps == before


def test_training_never_draws_with_more_steps_than_an_evaluation(kit: Experiment):
    """Who sets `num_inference_steps` alone means both."""
    full = kit.generator.num_inference_steps
    with kit.generator.steps(full + 5):
        assert kit.generator.num_inference_steps == full
