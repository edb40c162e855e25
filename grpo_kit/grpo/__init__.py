"""GRPO as pure functions on tensors, in reading order: advantages, logprobs, loss, step."""

from grpo_kit.grpo.advantages import group_advantages, group_spread
from grpo_kit.grpo.logprobs import completion_mask, kl_divergence, token_logprobs
from grpo_kit.grpo.loss import CLIPPED_LOSS_TYPES, LOSS_TYPES, LossOutput, grpo_loss, token_weights

__all__ = [
    "CLIPPED_LOSS_TYPES",
    "LOSS_TYPES",
    "LossOutput",
    "completion_mask",
    "group_advantages",
    "group_spread",
    "grpo_loss",
    "kl_divergence",
    "token_logprobs",
    "token_weights",
]
