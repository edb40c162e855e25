"""The GRPO loss and its relatives: what each token's log-probability is pushed by, and how the tokens are averaged."""

from dataclasses import dataclass

import torch

from grpo_kit.grpo.logprobs import bounded_exp, kl_divergence

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
CLIPPED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # those with a clipped ratio


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss that carries gradient, and plain numbers for the log."""

    loss: torch.Tensor
    metrics: dict[str, float]

    def __repr__(self) -> str:
        parts = (f"{name}={value:.4g}" for name, value in {"loss": self.loss.item(), **self.metrics}.items())
        return f"LossOutput({', '.join(parts)}"[:199] + ")"


def token_weights(
    mask: torch.Tensor,
    loss_type: str = "grpo",
    max_completion_length: int | None = None,
    num_items_in_batch: float | None = None,
) -> torch.Tensor:
    """What each token counts for, so that loss = Σ weight · token loss.

    With N rows and Lᵢ tokens in row i: grpo and sapo 1 / (N Lᵢ); dr_grpo 1 / (N · max_completion_length); luspo 1 / N;
    bnpo, dapo, cispo and vespo 1 / Σ Lᵢ, where (but for bnpo) `num_items_in_batch` gives the sum of a larger batch.

    Args:
        mask: (N, T), True at tokens that count.

    Returns:
        (N, T), 0 outside the mask.
    """
    mask = mask.float()
    rows = mask.shape[0]
    if loss_type in ("grpo", "sapo"):
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / rows
    if loss_type == "dr_grpo":
        return mask / (rows * (max_completion_length or mask.shape[1]))
    if loss_type == "luspo":
        return mask / rows
    if loss_type in LOSS_TYPES:
        own = num_items_in_batch is None or loss_type == "bnpo"
        total = mask.sum().clamp(min=1) if own else max(1.0, float(num_items_in_batch))
        return mask / total
    raise ValueError(f"loss_type: found {loss_type!r}, allowed: {', '.join(LOSS_TYPES)}")


def grpo_loss(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    loss_type: str = "grpo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False,
    max_completion_length: int | None = None,
    num_items_in_batch: float | None = None,
    weights: torch.Tensor | None = None,
    **constants: float,
) -> LossOutput:
    """The loss of one batch of sampled tokens, as TRL's GRPOTrainer defines it.

    With ratio ρ = exp(logprobs - old_logprobs), per token: -min(ρ A, clip(ρ, 1 - epsilon, 1 + epsilon_high) A)
    + beta · KL (GRPO, arXiv 2402.03300), averaged as `token_weights` says.

    Args:
        logprobs: (N, T) of the sampled tokens under the policy being trained; carries gradient.
        advantages: (N,) or (N, T).
        mask: (N, T), True at tokens that count.
        old_logprobs: (N, T) under the policy that sampled; None means the same policy (ratio 1).
        ref_logprobs: (N, T) under the reference, needed when beta is not 0.
        importance_sampling_level: "token", or "sequence": one ratio a row, from its mean log-ratio (GSPO, 2507.18071).
        delta: upper bound of the unclipped ratio, so that a negative advantage cannot push without limit.
        use_bias_correction_kl: multiply the KL estimate by ρ (arXiv 2512.02556). Off-policy the estimate is biased
            without it; the gradient of k3 becomes that of KL(policy || reference).
        weights: (N, T) from `token_weights` of the whole batch that these rows are a part of; None computes them here.
        constants: those of `_soft_gated` (sapo) and `_gamma_weight` (vespo).
    """
    _check_settings(loss_type, beta, ref_logprobs, constants)
    weights = token_weights(mask, loss_type, max_completion_length, num_items_in_batch) if weights is None else weights
    advantages = advantages.unsqueeze(1) if advantages.ndim == 1 else advantages
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = bounded_exp(_at_level(log_ratio, mask, importance_sampling_level))
    high = epsilon if epsilon_high is None else epsilon_high
    bounded = ratio if delta is None else ratio.clamp(max=delta)  # the side that clipping leaves open (2505.07291)
    if loss_type in CLIPPED_LOSS_TYPES:  # PPO's pessimistic choice
        per_token = -torch.min(bounded * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)
    elif loss_type == "sapo":
        per_token = _soft_gated(ratio, advantages, **constants)
    elif loss_type == "cispo":  # these two weigh the log-probability itself, by a weight without gradient
        per_token = -ratio.clamp(max=high).detach() * advantages * logprobs
    else:
        per_token = -_gamma_weight(log_ratio, advantages, mask, **constants) * advantages * logprobs
    metrics = _clip_metrics(ratio, bounded, advantages, mask, loss_type, epsilon, high)
    if beta != 0.0:
        kl = kl_divergence(*(torch.where(mask, values, 0.0) for values in (logprobs, ref_logprobs)), kl_estimator)
        kl = kl * ratio if use_bias_correction_kl else kl
        per_token, metrics["kl"] = per_token + beta * kl, _masked_mean(kl, mask)
    return LossOutput((torch.where(mask, per_token, 0.0) * weights).sum(), metrics)


def _check_settings(loss_type: str, beta: float, ref_logprobs: torch.Tensor | None, constants: dict) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type: found {loss_type!r}, allowed: {', '.join(LOSS_TYPES)}")
    if constants and loss_type not in ("sapo", "vespo"):
        raise TypeError(f"{min(constants)}: unknown to loss_type {loss_type!r}; only sapo and vespo have constants")
    if beta != 0.0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: found None, needed because beta is {beta}; pass them or set beta to 0")


def _at_level(log_ratio: torch.Tensor, mask: torch.Tensor, level: str) -> torch.Tensor:
    if level == "token":
        return log_ratio
    if level == "sequence":
        return log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    raise ValueError(f"importance_sampling_level: found {level!r}, allowed: 'token', 'sequence'")


def _soft_gated(
    ratio: torch.Tensor, advantages: torch.Tensor, sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05
) -> torch.Tensor:
    """A smooth gate 4 σ(τ (ρ - 1)) / τ instead of a clip (SAPO, arXiv 2511.20347)."""
    temperature = torch.where(advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
    return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages


@torch.no_grad()
def _gamma_weight(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> torch.Tensor:
    """VESPO's weight e^λ wᵏ e^(-λ w) of the sequence ratio w, 1 at w = 1."""
    total = (log_ratio.clamp(-20, 20) * mask).sum(dim=1, keepdim=True)
    log_w = total.clamp(-18.420680743952367, 20)  # log 1e-8, as the authors' code has it
    k = torch.where(advantages >= 0, vespo_k_pos, vespo_k_neg)
    rate = torch.where(advantages >= 0, vespo_lambda_pos, vespo_lambda_neg).clamp(min=1e-4)
    return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@torch.no_grad()
def _clip_metrics(ratio, bounded, advantages, mask, loss_type: str, low: float, high: float) -> dict[str, float]:
    """Shares of tokens (of rows, at sequence level) whose clip is active: the side that the advantage leans on."""
    if loss_type == "cispo":
        return {"cispo_clip_ratio": _masked_mean((ratio > high) & (advantages > 0), mask)}
    if loss_type not in CLIPPED_LOSS_TYPES:
        return {}
    is_low = (bounded < 1 - low) & (advantages < 0)
    is_high = (bounded > 1 + high) & (advantages > 0)
    names = {"low_mean": is_low, "high_mean": is_high, "region_mean": is_low | is_high}
    return {f"clip_ratio/{name}": _masked_mean(active, mask) for name, active in names.items()}


@torch.no_grad()
def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> float:
    values = values.float()
    if values.shape[1] == 1 != mask.shape[1]:
        return float(values.mean())
    return float((values * mask).sum() / mask.sum().clamp(min=1))
