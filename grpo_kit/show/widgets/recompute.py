"""What would the step have done under other settings? A recorded rollout put through advantages and loss again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import torch

from grpo_kit.config import KitError
from grpo_kit.grpo import group_advantages, grpo_loss, token_weights
from grpo_kit.rewards.usable import usable_rewards

NEEDED = ("completion_ids", "old_logprobs", "ref_logprobs", "new_logprobs")


@dataclass(frozen=True)
class StepSettings:
    """The settings that turn a rollout's rewards into a gradient, under the config's names."""

    scale_rewards: str = "group"
    baseline: str = "mean"
    advantage_eps: float = 1e-4
    reward_noise_floor: float = 0.0
    on_bad_reward: str = "drop_sample"
    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = False
    max_new_tokens: int | None = None  # dr_grpo divides by it


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


def recorded_settings(config: Mapping) -> StepSettings:
    """Return the settings that a run trained with; what its config does not name has the default."""
    known = {**config.get("training_settings", {}), **config.get("generation_settings", {})}
    return StepSettings(**{field.name: known[field.name] for field in fields(StepSettings) if field.name in known})


def recompute(rollout: pd.DataFrame, settings: StepSettings, after: bool = False) -> Pushes:
    """Compute advantages, weights and pushes of a whole recorded rollout.

    Args:
        rollout: all rows of an iteration: a batch's weights and spread need them all.
        settings: what to compute with.
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
    advantages = group_advantages(
        usable,
        groups,
        scale_rewards=settings.scale_rewards,
        baseline=settings.baseline,
        eps=settings.advantage_eps,
        noise_floor=settings.reward_noise_floor,
    )
    kept = ~usable.isnan()
    weights, pushes = (torch.zeros_like(rewards) for _ in range(2))
    weights[kept], pushes[kept] = _pushes(rollout[kept.numpy()], advantages[kept], settings, after)
    return Pushes(advantages.numpy(), weights.numpy(), pushes.numpy())


def _pushes(
    rows: pd.DataFrame, advantages: torch.Tensor, settings: StepSettings, after: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N,) the weight of one token and (N,) the push of each row."""
    old, mask = _padded(rows["old_logprobs"])
    reference, _ = _padded(rows["ref_logprobs"])
    logprobs = (_padded(rows["new_logprobs"])[0] if after else old.clone()).requires_grad_()
    weights = token_weights(mask, settings.loss_type, settings.max_new_tokens).double()
    output = grpo_loss(
        logprobs,
        advantages,
        mask,
        old_logprobs=old,
        ref_logprobs=reference,
        weights=weights,
        **{name: getattr(settings, name) for name in LOSS_SETTINGS},
    )
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    return weights.amax(dim=1), -gradient.sum(dim=1)


LOSS_SETTINGS = (
    "loss_type",
    "importance_sampling_level",
    "epsilon",
    "epsilon_high",
    "delta",
    "beta",
    "kl_estimator",
    "use_bias_correction_kl",
)


def _padded(rows: pd.Series) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lists of different lengths as (N, T) with 0 after their ends, and True where there is a value."""
    values = [torch.tensor(np.asarray(row, dtype=float)) for row in rows]
    lengths = torch.tensor([len(row) for row in values])
    padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
