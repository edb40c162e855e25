"""What a run needs before it is started: `plan(config)` gives parameters, memory and seconds, part by part."""

from collections.abc import Callable
from dataclasses import replace

from grpo_kit.config import Config
from grpo_kit.preflight.plan.generator import plan_generator
from grpo_kit.preflight.plan.parts import Part, Plan
from grpo_kit.preflight.plan.policy import plan_policy
from grpo_kit.preflight.plan.reward import plan_reward
from grpo_kit.preflight.plan.speed import Speed, speed_of

PARTS: dict[str, Callable[[Config, Speed], Part]] = {
    "policy": lambda config, speed: plan_policy(config, speed.dtype),
    "generator": lambda config, speed: plan_generator(config, speed.dtype),
    "reward": lambda config, speed: plan_reward(config),
}


def plan(config: Config, device: str | None = None, memory: float | None = None, speed: Speed | None = None) -> Plan:
    """What a config needs, without any weights; a `KitError` where a model or a device is not known here.

    Args:
        device: a named accelerator, or a device of this machine; None is the config's own.
        memory: bytes to plan for; None is all that the device has.
        speed: of the device, where it is known already.
    """
    settings = config.model_settings
    speed = speed or speed_of(device or settings.device, settings.dtype, memory)
    parts = tuple(plan_part(config, speed) for plan_part in PARTS.values())
    return Plan(parts, speed, config.training_settings.num_iterations)


def planned_again(before: Plan, config: Config, name: str) -> Plan:
    """A plan after a change to the settings of one part alone; the other parts are taken over."""
    parts = tuple(PARTS[name](config, before.speed) if part.name == name else part for part in before.parts)
    return replace(before, parts=parts)
