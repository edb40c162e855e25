"""The loss of a single token, as `grpo_loss` and autograd have it: what the figures of the loss draw."""

from dataclasses import dataclass

import torch

from grpo_kit.grpo import CLIPPED_LOSS_TYPES, grpo_loss

OLD_PROBABILITY = 0.25  # of the token when it was sampled: so that a ratio of 3 is still a probability


@dataclass(frozen=True)
class TokenSettings:
    """What decides the loss of a single token."""

    loss_type: str = "grpo"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None

    @property
    def open_range(self) -> tuple[float, float]:
        """The ratios between the bounds; empty where the loss type has none."""
        if self.loss_type in CLIPPED_LOSS_TYPES:
            return 1 - self.epsilon, 1 + self.epsilon_high
        return 0.0, self.epsilon_high if self.loss_type == "cispo" else 0.0


def loss_and_push(ratios: torch.Tensor, advantage: float, settings: TokenSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one token's loss at each ratio, and the push on its log-probability there: minus the gradient.

    Both come from `grpo_loss` and autograd: every ratio is a row with one token and weight 1. The gradient with respect
    to the weights is each row's own loss.

    Args:
        ratios: (K,) new over old probability, above 0, as float64.
        advantage: of the token's sample.
        settings: the loss type with its bounds.
    """
    old = torch.full((len(ratios), 1), OLD_PROBABILITY, dtype=ratios.dtype).log()
    logprobs = (old + ratios.unsqueeze(1).log()).requires_grad_()
    weights = torch.ones_like(old).requires_grad_()
    output = grpo_loss(
        logprobs,
        torch.full_like(ratios, advantage),
        torch.ones_like(old, dtype=torch.bool),
        old_logprobs=old,
        weights=weights,
        **vars(settings),
    )
    gradient, losses = torch.autograd.grad(output.loss, [logprobs, weights])
    return losses.flatten(), -gradient.flatten()
