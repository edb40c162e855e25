"""The formula that many small VLM-GRPO trainers share, as an example of a loss to examine."""

import torch


def classic_loss(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, rewards: torch.Tensor, beta: float = 0.01
) -> torch.Tensor:
    """The classic VLM-GRPO formula, to be examined and not to be used.

    ratio = π_θ / π_ref, advantage = reward less the mean of all rewards given, loss = -mean(ratio · advantage)
    + beta · mean(log π_θ - log π_ref). Small trainers that teach a vision-language model to write image prompts compute
    this (some clip the ratio as well), over all positions of the padded batch and whichever prompts are in it.

    Args:
        logprobs, ref_logprobs: (N, T).
        rewards: (N,).
    """
    log_ratio = logprobs - ref_logprobs
    advantages = rewards - rewards.mean()
    return -(log_ratio.exp() * advantages.unsqueeze(1)).mean() + beta * log_ratio.mean()
