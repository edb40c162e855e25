"""What would the step have done under other settings? A recorded rollout put through advantages and loss again."""

from dataclasses import dataclass
from inspect import signature

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from grpo_kit.config import KitError, TrainingSettings
from grpo_kit.grpo import group_advantages, grpo_loss, token_weights
from grpo_kit.rewards.bad_rewards import usable_rewards

NEEDED = ("completion_ids", "old_logprobs", "ref_logprobs", "new_logprobs")
LOSS_SETTINGS = [name for name in signature(grpo_loss).parameters if name in TrainingSettings.model_fields]


@dataclass(frozen=True)
class Pushes:
    """What a step does to each of N samples: advantage, weight of one of its tokens, and push on its log-probability.

    The push is minus the gradient of the loss, added up over the sample's tokens.
    """

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
    """Compute advantages, weights and pushes of a whole recorded rollout.

    Args:
        rollout: all rows of an iteration: a batch's weights and standard deviation need them all.
        settings: what to compute with; only what turns rewards into a gradient is read.
        max_new_tokens: the longest rewrite that was allowed, which "dr_grpo" divides by.
        after: where the policy stands. False: at the start of the step, where every ratio is 1. True: after the
            recorded step, where ratios differ and the clip may hold.

    Raises:
        KitError: the rollout was kept without its tokens' log-probabilities.
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
