"""The gates: for the same tokens, kit and TRL must find the same log-probabilities, advantages and gradients."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from trl import GRPOTrainer
from trl.trainer.utils import pad

from benchmarks.speed.results import Gate
from grpo_kit.config import Config, load_config
from grpo_kit.models.policy import Policy
from grpo_kit.rollout import Rollout
from grpo_kit.training.step import grpo_step

LOGPROBS, GRADIENTS, ADVANTAGES = 1e-5, 1e-4, 1e-6
_NO_LIMIT = 1e9


class _Recorder(torch.optim.SGD):
    """Keeps the gradient that it is given, and changes nothing."""

    def step(self, closure: None = None) -> None:
        self.gradient = gradient_of(self.param_groups[0]["params"])


def gates(
    policy: Policy, trainer: GRPOTrainer, rollout: Rollout, config: Config, prompt_ids: Sequence[Sequence[int]]
) -> list[Gate]:
    """Compare both sides on one rollout, with policies that have left the reference, then put the policies back.

    Args:
        rollout: sampled by the kit's policy; its ids serve both sides.
        prompt_ids: what TRL's own tokenisation of each prompt gives.
    """
    states = [copy.deepcopy(model.state_dict()) for model in (policy.model, trainer.model)]
    _leave_reference(policy.model)
    trainer.model.load_state_dict(policy.model.state_dict())
    with torch.no_grad():
        scores = policy.score(rollout.asked(), rollout.group_ids, rollout.completion_ids, rollout.completion_mask)
    rollout = replace(rollout, old_logprobs=scores.logprobs)
    unclipped = load_config(config, {"training_settings.max_grad_norm": _NO_LIMIT})
    recorder = _Recorder(policy.trainable_parameters(), lr=0.0)
    stats = grpo_step(policy, recorder, rollout, unclipped)
    inputs = _inputs(trainer, rollout, prompt_ids)
    found = _logprobs(trainer, trainer.model, inputs)
    gradient = _peer_gradient(trainer, inputs)
    for model, state in zip((policy.model, trainer.model), states, strict=True):
        model.load_state_dict(state)
    mask = rollout.completion_mask
    return [
        Gate("log-probabilities", float((found - scores.logprobs)[mask].abs().max()), LOGPROBS),
        Gate("advantages", float((inputs["advantages"] - stats.advantages).abs().max()), ADVANTAGES),
        Gate("gradient, relative", float((recorder.gradient - gradient).norm() / gradient.norm()), GRADIENTS),
    ]


def _leave_reference(model: torch.nn.Module) -> None:
    """Move every weight a little, so that the KL term has a value and a gradient."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=source)


def _inputs(trainer: GRPOTrainer, rollout: Rollout, prompt_ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """TRL's batch of exactly the rollout's tokens, with advantages as TRL computes them."""
    prompts = [torch.tensor(prompt_ids[group]) for group in rollout.group_ids.tolist()]
    masks = [torch.ones_like(prompt) for prompt in prompts]
    grouped = rollout.rewards.view(len(rollout.prompts), -1)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    inputs = {
        "prompt_ids": pad(prompts, trainer._tokenizer.pad_token_id, padding_side="left"),
        "prompt_mask": pad(masks, 0, padding_side="left"),
        "completion_ids": rollout.completion_ids,
        "completion_mask": rollout.completion_mask.long(),
        "advantages": (centred / (grouped.std(dim=1, keepdim=True) + 1e-4)).flatten().float(),
        "num_items_in_batch": rollout.completion_mask.sum(),
    }
    if trainer.ref_model is not None:
        with torch.no_grad():
            inputs["ref_per_token_logps"] = _logprobs(trainer, trainer.ref_model, inputs)
    return inputs


@torch.no_grad()
def _logprobs(trainer: GRPOTrainer, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return trainer._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])[0]


def _peer_gradient(trainer: GRPOTrainer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, inputs).backward()
    gradient = gradient_of(trainer.model.parameters())
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    return gradient


def gradient_of(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """All gradients in one vector; zeros where a weight took no part."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
