"""What a loss pushes at: minus its gradient by log-probabilities, for a single token and for a recorded step."""

from dataclasses import dataclass
from inspect import signature

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from grpo_kit.config import KitError, TrainingSettings
from grpo_kit.grpo import group_advantages, grpo_loss, token_weights
from grpo_kit.rewards.bad_rewards import usable_rewards

OLD_PROBABILITY = 0.25  # of a single token when it was sampled: so that a ratio of 3 is still a probability
NEEDED = ("completion_ids", "old_logprobs", "ref_logprobs", "new_logprobs")
LOSS_SETTINGS = [name for name in signature(grpo_loss).parameters if name in TrainingSettings.model_fields]


def loss_and_push(ratios: torch.Tensor, advantage: float, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one token's loss at each ratio, and the push on its log-probability there.

    Both come from `grpo_loss`, which takes the settings, and autograd: every ratio (K,), new over old probability, is a
    row with one token and weight 1. The gradient with respect to the weights is each row's own loss.
    """
    old = torch.full((len(ratios), 1), OLD_PROBABILITY, dtype=ratios.dtype).log()
    logprobs = (old + ratios.unsqueeze(1).log()).requires_grad_()
    weights = torch.ones_like(old).requires_grad_()
    sampled = torch.full_like(ratios, advantage), torch.ones_like(old, dtype=torch.bool)
    output = grpo_loss(logprobs, *sampled, old_logprobs=old, weights=weights, **settings)
    gradient, losses = torch.autograd.grad(output.loss, [logprobs, weights])
    return losses.flatten(), -gradient.flatten()


@dataclass(frozen=True)
class Pushes:
    """What a step does to each of N samples: advantage, weight of one of its tokens, and the push on all of them."""

    advantages: np.ndarray
    weights: np.ndarray
    pushes: np.ndarray

    @property
    def total(self) -> float:
        """All pushes together, whatever their signs."""
        return float(np.abs(self.pushes).sum())

    @property
    def shares(self) -> np.ndarray:
        """(N,) each push as a share of the whole step's, with its sign; 0 where the step does nothing."""
        return self.pushes / self.total if self.total else np.zeros_like(self.pushes)


def recompute(
    rollout: pd.DataFrame, settings: TrainingSettings, max_new_tokens: int | None = None, after: bool = False
) -> Pushes:
    """Compute advantages, weights and pushes of a whole recorded rollout, as other settings would have had them.

    The rollout holds all rows of an iteration, since a batch's weights and standard deviation need them; a `KitError`
    where it was kept without log-probabilities. The policy stands at the start of the step, where every ratio is 1, or
    `after` it, where ratios differ and the clip may hold. "dr_grpo" divides by `max_new_tokens`, the longest rewrite
    that was allowed.
    """
    missing = [name for name in NEEDED if name not in rollout]
    if missing:
        raise KitError(f"rollout: found no {', '.join(missing)}. Record the run again; this kit keeps them.")
    rewards = torch.tensor(rollout["reward"].to_numpy(float))
    groups = torch.tensor(rollout["group_id"].to_numpy())
    usable = usable_rewards(rewards, groups, settings.on_bad_reward)
    scaling = dict(scale_rewards=settings.scale_rewards, baseline=settings.baseline, eps=settings.advantage_eps)
    advantages = group_advantages(usable, groups, **scaling, noise_floor=settings.reward_noise_floor)
    kept = ~usable.isnan()
    rows, weights, pushes = rollout[kept.numpy()], torch.zeros_like(rewards), torch.zeros_like(rewards)
    old, reference, new = (  # (N, T), with 0 after the rows' ends
        pad_sequence([torch.tensor(np.asarray(row, dtype=float)) for row in rows[name]], batch_first=True)
        for name in ("old_logprobs", "ref_logprobs", "new_logprobs")
    )
    mask = torch.arange(old.shape[1]) < torch.tensor(rows["completion_ids"].map(len).to_numpy()).unsqueeze(1)
    logprobs = (new if after else old).clone().requires_grad_()
    token = token_weights(mask, settings.loss_type, max_new_tokens).double()
    others = {name: getattr(settings, name) for name in LOSS_SETTINGS}
    known = dict(old_logprobs=old, ref_logprobs=reference, weights=token)
    output = grpo_loss(logprobs, advantages[kept], mask, **known, **others)
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    weights[kept], pushes[kept] = token.amax(dim=1), -gradient.sum(dim=1)
    return Pushes(advantages.numpy(), weights.numpy(), pushes.numpy())
