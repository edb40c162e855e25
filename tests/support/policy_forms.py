"""The forms of the embedded policy that a trap must be avoided in: words and pictures, all weights and an adapter."""

import copy
from dataclasses import dataclass

import torch

from grpo_kit.config import load_config
from grpo_kit.experiment import Experiment
from grpo_kit.models.policy import Policy, load_policy
from grpo_kit.rollout import Rollout, collect_rollout

LORA = {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
FORMS = {  # name → has an adapter, sees pictures
    "words": (False, False),
    "pictures": (False, True),
    "adapter": (True, False),
    "adapter-pictures": (True, True),
}


@dataclass(frozen=True)
class Form:
    """A policy, and four rewrites of each of three prompts that it sampled."""

    policy: Policy
    rollout: Rollout

    def own(self) -> "Form":
        """With a policy that may be trained."""
        return Form(copy.deepcopy(self.policy), self.rollout)


def sampled_form(kit: Experiment, name: str) -> Form:
    """The embedded policy in one of its forms, with dropout, left in training mode as a training loop leaves it."""
    has_adapter, sees = FORMS[name]
    policy = with_moved_adapter(new_adapter(kit)) if has_adapter else copy.deepcopy(kit.policy)
    with_attention_dropout(policy).model.train()
    return Form(
        policy, collect_rollout(policy, kit.generator, kit.rewards, kit.train_prompts[:3], 4, 0, use_image=sees)
    )


def new_adapter(kit: Experiment) -> Policy:
    """The embedded policy with an adapter that adds nothing yet, and has dropout."""
    return load_policy(load_config(kit.config, {"model_settings.lora": LORA}))


def with_moved_adapter(policy: Policy) -> Policy:
    """As if its adapter had been trained, so that it and its dropout change what the policy says."""
    source = torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=source)
    return policy


def with_attention_dropout(policy: Policy, share: float = 0.1) -> Policy:
    """Dropout in the model itself, which many pretrained configurations have."""
    for module in policy.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = share
    return policy
