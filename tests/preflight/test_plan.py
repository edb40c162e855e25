"""The planner says what the kit computes: parameters, operations and bytes are those of the real models."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES, Family
from support.generators import stable_diffusion, stable_diffusion_xl
from support.plan_cases import SMALL, phase_cost, policy_part, small_config
from torch.utils.flop_counter import FlopCounterMode

from grpo_kit.config import Config, load_config
from grpo_kit.models.generator import load_generator
from grpo_kit.models.policy import Policy, load_policy
from grpo_kit.preflight.plan import plan
from grpo_kit.preflight.plan.architectures import (
    component,
    language_model,
    pipeline_shape,
    published_models,
    reward_model,
)
from grpo_kit.preflight.plan.generator import plan_generator
from grpo_kit.preflight.plan.parts import Plan, count_parameters, tensors_of
from grpo_kit.preflight.plan.policy import longest_rollout, plan_policy
from grpo_kit.preflight.plan.reward import plan_reward
from grpo_kit.preflight.plan.tracing import Trace
from grpo_kit.rewards.loading import load_rewards
from grpo_kit.training.step import grpo_step

LORA = {"model_settings.lora": {"r": 4, "alpha": 8}}
LOOKING = {"model_settings.use_image": True}


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
    table = published_models()
    for name, entry in table["policies"].items():
        assert count_parameters(language_model(name, torch.bfloat16)[0]) == entry["parameters"]
    for name, entry in table["generators"].items():
        for part, parameters in entry["parameters"].items():
            made = component(*pipeline_shape(name).components[part], torch.bfloat16)
            assert count_parameters(made) == parameters, (name, part)
    for name, entry in table["rewards"].items():
        assert count_parameters(reward_model(name)[0]) == entry["parameters"]


@pytest.mark.parametrize("changes", [{}, LORA, LOOKING, {"model_settings.gradient_checkpointing": True}], ids=str)
def test_update_is_planned_with_the_operations_and_the_memory_of_the_real_one(changes: dict):
    config = load_config("tiny", SMALL | changes)
    policy = load_policy(config)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), fused=True)
    rollout = longest_rollout(config)
    grpo_step(policy, optimizer, rollout, config)  # the optimizer's moments are there from now on
    planned = phase_cost(plan_policy(config, torch.float32), "update")
    assert planned.flops == _flops(lambda: grpo_step(policy, optimizer, rollout, config))
    moments = [moment for state in optimizer.state.values() for moment in state.values()]
    with Trace([*tensors_of(policy.model, policy.reference), *moments]) as real:
        grpo_step(policy, optimizer, rollout, config)
    assert planned.peak == real.cost.peak
    shorter = longest_rollout(load_config("tiny", SMALL | changes | {"generation_settings.max_new_tokens": 4}))
    assert planned.flops != _flops(lambda: grpo_step(policy, optimizer, shorter, config))


@pytest.mark.parametrize("use_image", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_sampling_is_planned_with_the_operations_and_the_memory_of_the_real_one(
    shared: bool, use_image: bool, monkeypatch: pytest.MonkeyPatch
):
    if not shared:
        monkeypatch.setattr("grpo_kit.models.policy.reason_not_to_share", lambda model: "for this test")
    config = small_config(model_settings__use_image=use_image)
    planned = phase_cost(plan_policy(config, torch.float32), "sampling")
    policy = load_policy(config)
    sample = _sampling(config, policy)
    assert planned.flops == _flops(sample)
    with Trace(tensors_of(policy.model, policy.reference)) as real:
        sample()
    assert planned.peak == real.cost.peak


def _updated(config: Config, policy: Policy) -> int:
    """Operations of a real update."""
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), fused=True)
    return _flops(lambda: grpo_step(policy, optimizer, longest_rollout(config), config))


def _sampling(config: Config, policy: Policy) -> Callable[[], object]:
    """How an iteration is sampled from a real policy."""
    policy.eos_token_ids = [10**6]  # no completion ends before the limit
    rollout = longest_rollout(config)
    group_size = config.training_settings.group_size
    return lambda: policy.sample(rollout.asked(), group_size, seed=0)


def as_they_take(family: Family, use_image: bool) -> object:
    """One family with pictures and one without in every run; words for all others that see are long."""
    quick = (family.name, use_image) in (("Qwen2.5-VL", True), ("Qwen3", False))
    long = family.sees and not use_image and family.name not in ("Qwen2.5-VL", "SmolVLM")
    marks = [pytest.mark.slow] * (not quick) + [pytest.mark.long] * long
    return pytest.param(family, use_image, id=f"{family.name}-{use_image}", marks=marks)


@pytest.mark.parametrize(("family", "use_image"), [as_they_take(f, seen) for f in FAMILIES for seen in f.views])
def test_a_policy_of_each_family_is_planned_with_its_operations(family: Family, use_image: bool, tmp_path: Path):
    if family.needs:
        pytest.importorskip(family.needs)
    family.write(tmp_path)
    config = small_config(
        model_settings__vlm_model=str(tmp_path),
        model_settings__system_prompt="Be short." if family.system else "",
        model_settings__use_image=use_image,
    )
    planned, policy = plan_policy(config, torch.float32), load_policy(config)
    assert phase_cost(planned, "sampling").flops == _flops(_sampling(config, policy))
    assert phase_cost(planned, "update").flops == _updated(config, policy)


def _drawn(config: Config) -> int:
    """Operations of four real pictures."""
    generator = load_generator(config)
    generator.generate_image("something else")  # what guidance goes away from is read once in a run
    return _flops(lambda: generator.generate_images([f"a {i} circle" for i in range(4)], [0] * 4))


def _planned_drawing(config: Config) -> int:
    return sum(phase.cost.flops for phase in plan_generator(config, torch.float32).phases)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drawing_is_planned_with_the_operations_of_the_real_one(guidance: float):
    config = small_config(generation_settings__guidance_scale=guidance, generation_settings__image_batch_size=2)
    assert _planned_drawing(config) == _drawn(config)


@pytest.mark.parametrize(
    ("build", "scheduler"),
    [(stable_diffusion, None), (stable_diffusion, "HeunDiscreteScheduler"), (stable_diffusion_xl, None)],
)
def test_steps_are_planned_as_the_scheduler_takes_them(build: Callable, scheduler: str | None, tmp_path: Path):
    """Stable Diffusion 1's own scheduler takes a step more than it is asked for, Heun's nearly twice as many."""
    build(tmp_path)
    config = small_config(
        model_settings__sd_model=str(tmp_path),
        generation_settings__scheduler=scheduler,
        generation_settings__num_inference_steps=3,
        generation_settings__image_batch_size=2,
        generation_settings__height=32,
        generation_settings__width=32,
    )
    assert _planned_drawing(config) == _drawn(config)


def test_rewards_are_planned_with_the_operations_of_the_real_ones():
    config = small_config()
    images = load_generator(config).generate_images(["a", "b", "c", "d"], [0] * 4)
    rewards = load_rewards(config)
    real = _flops(lambda: rewards.score(images, ["x", "x", "y", "y"], ["a", "b", "c", "d"]))
    assert sum(phase.cost.flops for phase in plan_reward(config).phases) == real


@pytest.mark.slow
def test_a_part_of_many_micro_batches_costs_what_all_of_them_do():
    of_one_prompt = {"training_settings__group_size": 4, "training_settings__prompts_per_iteration": 1}
    config = small_config(training_settings__micro_batch_size=1, **of_one_prompt)
    planned, real = phase_cost(plan_policy(config, torch.float32), "update"), _updated(config, load_policy(config))
    assert planned.flops == pytest.approx(real, rel=0.01)
    whole = phase_cost(policy_part(**of_one_prompt), "update")
    assert planned.peak < whole.peak
