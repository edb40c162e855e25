"""The planner says what the kit computes: parameters, operations and bytes are those of the real models."""

import functools

import pytest
import torch
from plan_cases import SMALL, phase_cost, policy_part, small_config
from torch.utils.flop_counter import FlopCounterMode

from grpo_kit.config import load_config
from grpo_kit.grpo.step import grpo_step
from grpo_kit.models.generator import load_generator
from grpo_kit.models.policy import load_policy
from grpo_kit.plan.architectures import component, known_models, language_model, pipeline_shape, reward_model
from grpo_kit.plan.fit import Plan, plan
from grpo_kit.plan.generator import plan_generator
from grpo_kit.plan.parts import count_parameters, tensors_of
from grpo_kit.plan.policy import longest_prompts, longest_rollout, plan_policy
from grpo_kit.plan.reward import plan_reward
from grpo_kit.plan.tracing import Trace
from grpo_kit.rewards.loading import load_rewards

LORA = {"model_settings.lora": {"r": 4, "alpha": 8}}


@functools.cache
def _plan() -> Plan:
    return plan(small_config(), "t4")


def _flops(work: object) -> int:
    with FlopCounterMode(display=False) as counted:
        work()
    return counted.get_total_flops()


# --- what is said is what is computed ---------------------------------------------------------------------------------


def test_parameters_are_those_of_the_real_models():
    config, parts = small_config(), {part.name: part for part in _plan().parts}
    generator, rewards = load_generator(config), load_rewards(config)
    assert parts["policy"].parameters == count_parameters(load_policy(config).model)
    models = [m for m in generator.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    assert parts["generator"].parameters == sum(map(count_parameters, models))
    assert parts["reward"].parameters == count_parameters(rewards.parts["clip_similarity"].model)


def test_models_in_the_table_have_as_many_parameters_as_their_owners_say():
    from grpo_kit.plan.architectures import _table

    for name in known_models()["policies"]:
        assert count_parameters(language_model(name, torch.bfloat16)[0]) == _table()["policies"][name]["parameters"]
    for name in known_models()["generators"]:
        for part, parameters in _table()["generators"][name]["parameters"].items():
            made = component(*pipeline_shape(name).components[part], torch.bfloat16)
            assert count_parameters(made) == parameters, (name, part)
    for name in known_models()["rewards"]:
        assert count_parameters(reward_model(name)[0]) == _table()["rewards"][name]["parameters"]


@pytest.mark.parametrize("changes", [{}, LORA, {"model_settings.gradient_checkpointing": True}], ids=str)
def test_update_is_planned_with_the_operations_and_the_memory_of_the_real_one(changes: dict):
    config = load_config("tiny", SMALL | changes)
    policy = load_policy(config)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), fused=True)
    rollout = longest_rollout(longest_prompts(config), 2, 5)
    grpo_step(policy, optimizer, rollout, config)  # the optimizer's moments are there from now on
    planned = phase_cost(plan_policy(config, torch.float32), "update")
    assert planned.flops == _flops(lambda: grpo_step(policy, optimizer, rollout, config))
    moments = [moment for state in optimizer.state.values() for moment in state.values()]
    with Trace([*tensors_of(policy.model, policy.reference), *moments]) as real:
        grpo_step(policy, optimizer, rollout, config)
    assert planned.peak == real.cost.peak
    shorter = longest_rollout(longest_prompts(config), 2, 4)
    assert planned.flops != _flops(lambda: grpo_step(policy, optimizer, shorter, config))


@pytest.mark.parametrize("shared", [True, False])
def test_sampling_is_planned_with_the_operations_of_the_real_one(shared: bool, monkeypatch: pytest.MonkeyPatch):
    if not shared:
        monkeypatch.setattr("grpo_kit.models.policy.reason_not_to_share", lambda model: "for this test")
    config = small_config()
    policy = load_policy(config)
    policy.eos_token_ids = [10**6]  # no completion ends before the limit
    texts = [prompt.user_prompt for prompt in longest_prompts(config)]
    real = _flops(lambda: policy.sample(texts, 2, seed=0))
    assert phase_cost(plan_policy(config, torch.float32), "sampling").flops == real


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drawing_is_planned_with_the_operations_of_the_real_one(guidance: float):
    config = small_config(generation_settings__guidance_scale=guidance, generation_settings__image_batch_size=2)
    generator = load_generator(config)
    generator.generate_image("something else")  # what guidance goes away from is read once in a run
    real = _flops(lambda: generator.generate_images([f"a {i} circle" for i in range(4)], [0] * 4))
    assert sum(phase.cost.flops for phase in plan_generator(config, torch.float32).phases) == real


def test_rewards_are_planned_with_the_operations_of_the_real_ones():
    config = small_config()
    images = load_generator(config).generate_images(["a", "b", "c", "d"], [0] * 4)
    rewards = load_rewards(config)
    real = _flops(lambda: rewards.score(images, ["x", "x", "y", "y"], ["a", "b", "c", "d"]))
    assert sum(phase.cost.flops for phase in plan_reward(config).phases) == real


def test_a_part_of_many_micro_batches_costs_what_all_of_them_do():
    config = small_config(training_settings__micro_batch_size=1, training_settings__group_size=4)
    policy = load_policy(config)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), fused=True)
    real = _flops(lambda: grpo_step(policy, optimizer, longest_rollout(longest_prompts(config), 4, 5), config))
    planned = phase_cost(plan_policy(config, torch.float32), "update")
    assert planned.flops == pytest.approx(real, rel=0.01)  # the two prompts are not quite as long
    whole = phase_cost(policy_part(training_settings__group_size=4), "update")
    assert planned.peak < whole.peak
