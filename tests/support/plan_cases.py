"""The small configuration that the tests of the planner plan, and what they look at."""

import torch

from grpo_kit.config import Config, load_config
from grpo_kit.preflight.plan.parts import Part
from grpo_kit.preflight.plan.policy import plan_policy
from grpo_kit.preflight.plan.tracing import Cost

SMALL = {
    "model_settings.device": "cpu",
    "training_settings.group_size": 2,
    "training_settings.prompts_per_iteration": 2,
    "training_settings.updates_per_rollout": 1,
    "generation_settings.max_new_tokens": 5,
    "generation_settings.num_inference_steps": 2,
    "reward_settings.monitors": [],
}


def small_config(**changes: object) -> Config:
    """The small config with settings changed, a section's dot written as two underlines."""
    return load_config("tiny", SMALL | {name.replace("__", "."): value for name, value in changes.items()})


def policy_part(**changes: object) -> Part:
    """The policy's part of its plan."""
    return plan_policy(small_config(**changes), torch.float32)


def phase_cost(part: Part, name: str) -> Cost:
    """What one of a part's phases takes."""
    return next(phase.cost for phase in part.phases if phase.name == name)
