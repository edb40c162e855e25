"""Masks, log-probabilities and KL estimates of sampled tokens."""

from collections.abc import Sequence

import torch
from torch.autograd.function import FunctionCtx

_LARGEST_LOG_RATIO = 20.0  # exp(20) = 5e8: far outside any useful ratio, far inside float32


def completion_mask(completion_ids: torch.Tensor, eos_token_id: int | Sequence[int]) -> torch.Tensor:
    """(N, T) bool: True through the first end-of-sequence token, which counts; without one True throughout.

    Args:
        completion_ids: (N, T) sampled ids.
        eos_token_id: one id, or several.
    """
    ends = torch.as_tensor(eos_token_id, device=completion_ids.device).reshape(-1)
    is_end = torch.isin(completion_ids, ends).int()
    return (is_end.cumsum(dim=1) - is_end) == 0


def is_truncated(completion_ids: torch.Tensor, mask: torch.Tensor, eos_token_id: int | Sequence[int]) -> torch.Tensor:
    """(N,) bool: whether the length limit ended a completion; ids and `completion_mask` are (N, T)."""
    ends = torch.as_tensor(eos_token_id, device=completion_ids.device).reshape(-1)
    return ~(torch.isin(completion_ids, ends) & mask).any(dim=1)


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """(N, T) log softmax(logits / temperature) at the sampled ids, computed in at least float32.

    Args:
        logits: (N, T, V), the t-th row predicting the t-th id; more or fewer leading axes will do.
        ids: (N, T).
        temperature: the one that the ids were sampled with.
    """
    return _tempered(logits, temperature).log_softmax(dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def logprobs_and_entropy(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs`, and without gradient the entropy in nats, (N, T) each; half the time and memory of apart.

    There can be one backward only.
    """
    return _LogprobsAndEntropy.apply(_tempered(logits, temperature), ids)


class _LogprobsAndEntropy(torch.autograd.Function):
    """Keeps one (N, T, V) buffer, the probabilities p; backward turns it into the gradient 1[chosen] - p in place."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the ids and entropy, (N, T) each."""
        logprobs, ids = logits.log_softmax(dim=-1), ids.unsqueeze(-1)
        chosen, probabilities = logprobs.gather(-1, ids).squeeze(-1), logprobs.exp()
        entropy = -logprobs.mul_(probabilities).sum(dim=-1)
        ctx.save_for_backward(probabilities, ids)
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient of the logits, (N, T, V)."""
        probabilities, ids = ctx.saved_tensors  # a second backward is refused here: they have been changed
        gradient = gradient.unsqueeze(-1)
        return probabilities.mul_(-gradient).scatter_add_(-1, ids, gradient), None


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits / temperature  # no copy for nothing


def bounded_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp, finite (and with a finite gradient) however large its argument; unchanged within ±20."""
    return log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()


def kl_divergence(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str = "k3") -> torch.Tensor:
    """(N, T) estimate of KL(policy || reference) from one sample each (Schulman, "Approximating KL divergence").

    With r = reference / policy probability: k1 = -log r, k2 = (log r)² / 2, k3 = r - 1 - log r. All have (nearly) the
    right value. As a *loss* they differ: on-policy the gradient of k1 is 0 on average, that of k2 is the gradient of
    KL(policy || reference), that of k3 the gradient of KL(reference || policy) (arXiv 2510.01555).

    Args:
        logprobs, ref_logprobs: (N, T).
        estimator: "k1", "k2" or "k3" (GRPO's, never negative).
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return bounded_exp(log_ratio) - 1 - log_ratio
    raise ValueError(f"kl_estimator: found {estimator!r}, allowed: 'k1', 'k2', 'k3'")
