"""TRL's own loss, called as this kit's is: the oracle for the loss types, and an example for `grpo-kit doctor`."""

from collections import defaultdict
from types import SimpleNamespace

import torch

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
    """
    from trl.trainer.grpo_trainer import GRPOTrainer  # an optional library

    trainer = object.__new__(GRPOTrainer)
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
