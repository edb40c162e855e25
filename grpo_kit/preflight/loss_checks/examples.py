"""Examples of losses to examine: TRL's own, and the formula that many small VLM-GRPO trainers share."""

import importlib
from collections import defaultdict
from types import SimpleNamespace

import torch

from grpo_kit.config import KitError
from grpo_kit.grpo.loss import LossOutput


def trl_loss(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    max_completion_length: int | None = None,
    num_items_in_batch: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> LossOutput:
    """The loss that TRL's GRPOTrainer computes, with the defaults of its GRPOConfig (TRL 1.16).

    TRL's own code runs, on a trainer that was never initialised: the log-probabilities are handed to it instead of a
    model. One process, no accumulation of gradients, no vLLM.

    Raises:
        KitError: TRL is not installed.
    """
    trainer = object.__new__(_trl_trainer())
    trainer.args = SimpleNamespace(
        delta=delta, use_bias_correction_kl=use_bias_correction_kl,
        sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos, vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg, vespo_lambda_neg=vespo_lambda_neg,
    )  # fmt: skip
    trainer.model = SimpleNamespace(training=False)  # TRL's name for: not divided by the accumulation steps
    trainer.accelerator = SimpleNamespace(
        num_processes=1, gather=lambda values: values, reduce=lambda values, reduction: values
    )
    trainer.loss_type, trainer.importance_sampling_level = loss_type, importance_sampling_level
    trainer.epsilon_low, trainer.epsilon_high = epsilon, epsilon if epsilon_high is None else epsilon_high
    trainer.beta, trainer.max_completion_length = beta, max_completion_length or mask.shape[1]
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
    trainer.use_vllm = trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = False
    trainer._metrics = {"eval": defaultdict(list)}
    scored = (logprobs, torch.zeros_like(logprobs), None)
    trainer._get_per_token_logps_and_entropies = lambda *args, **options: scored
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    tokens = mask.sum() if num_items_in_batch is None else num_items_in_batch
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old_logprobs, "ref_per_token_logps": ref_logprobs,
        "num_items_in_batch": torch.as_tensor(tokens),
    }  # fmt: skip
    loss = trainer._compute_loss(None, inputs)
    return LossOutput(loss, {name: values[-1] for name, values in trainer._metrics["eval"].items()})


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


def _trl_trainer() -> type:
    try:
        return importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer  # an optional library
    except ImportError as error:
        raise KitError(f"trl: cannot be imported ({error}). Install it: pip install 'trl>=1.16,<2'") from error
