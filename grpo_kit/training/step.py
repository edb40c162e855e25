"""One GRPO step: from a rollout's rewards to changed weights.

`grpo_step` reads as the method does for one process and a whole batch. What surrounds it is in `training.accumulation`:
micro-batches weigh their tokens as the whole batch does, so that the gradient does not depend on their size; several
processes share the rows by whole groups in the same way; numbers that are not finite skip an update; clocks run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grpo_kit.config import Config, TrainingSettings
from grpo_kit.config.display import Shown
from grpo_kit.config.quiet import quiet_libraries
from grpo_kit.config.threads import fitting_threads
from grpo_kit.grpo.advantages import group_advantages
from grpo_kit.grpo.finite import NonFinite
from grpo_kit.grpo.loss import grpo_loss
from grpo_kit.models.policy import Policy
from grpo_kit.rewards.bad_rewards import usable_rewards
from grpo_kit.rollout import Rollout, score_rows, with_encoded
from grpo_kit.training.accumulation import Accumulation, is_idle, skip_metrics, why_unscored
from grpo_kit.training.processes import ALONE, Processes


@dataclass(frozen=True, repr=False)
class StepStats(Shown):
    """What a step did: metrics under TRL's names, the advantages it used, whether the optimizer ran each time."""

    metrics: dict[str, float]
    advantages: torch.Tensor  # (N,)
    updates: int  # optimizer steps made
    skipped: int  # optimizer steps left out because something was not finite
    non_finite: NonFinite | None = None  # what, in the first of them
    ref_logprobs: torch.Tensor | None = None  # (N, T) under the reference, where the loss needed them

    def _shown(self) -> dict[str, object]:
        return {"updates": self.updates, "skipped": self.skipped, **self.metrics}


def rollout_advantages(rollout: Rollout, settings: TrainingSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) advantages, and (N,) bool which rows take part; raises what `usable_rewards` raises."""
    rewards = usable_rewards(rollout.rewards, rollout.group_ids, settings.on_bad_reward, rollout.reward_parts)
    advantages = group_advantages(
        rewards,
        rollout.group_ids,
        scale_rewards=settings.scale_rewards,
        baseline=settings.baseline,
        eps=settings.advantage_eps,
        noise_floor=settings.reward_noise_floor,
    )
    return advantages, ~rewards.isnan()


@quiet_libraries()
@torch.enable_grad()
def grpo_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    config: Config,
    processes: Processes = ALONE,
    learning_rates: Sequence[float] | None = None,
) -> StepStats:
    """Update the policy on a rollout: advantages, then `updates_per_rollout` times loss, gradient and optimizer step.

    Rows without a usable reward are left out as `on_bad_reward` says. Where no advantage differs from 0 and beta is 0,
    the optimizer is not run, so that momentum and weight decay cannot move the weights. Where something is not finite,
    or no sample has a usable reward, the update is skipped: weights and momentum stay as they are, bit for bit.

    Args:
        learning_rates: of each update; None leaves the optimizer its own.

    Raises:
        BadRewardError: a reward is not finite and `on_bad_reward` is "raise".
        ValueError: shapes that do not fit each other.
    """
    settings = config.training_settings
    advantages, kept = rollout_advantages(rollout, settings)
    metrics = rollout.metrics() | {"unscored": float((~kept).sum())}
    if not kept.any() or is_idle(rollout, advantages, kept, settings):
        skipped, reason = (0, None) if kept.any() else (settings.updates_per_rollout, why_unscored(rollout))
        metrics |= {"loss": 0.0, "grad_norm": 0.0} | skip_metrics(skipped, reason)
        return StepStats(metrics, advantages, 0, skipped, reason)

    rollout = with_encoded(rollout, policy)
    batch = Accumulation(policy, optimizer, rollout, advantages, kept, settings, processes)
    with fitting_threads(policy.model), batch:
        for rate in learning_rates or [None] * settings.updates_per_rollout:
            for part in batch.parts():  # with one process and without micro-batches a single part: the batch
                scores = score_rows(batch.module, rollout, part.rows)  # log-probabilities with gradient
                loss = grpo_loss(
                    scores.logprobs,
                    part.advantages,
                    part.mask,
                    old_logprobs=batch.old_logprobs(part, scores),
                    ref_logprobs=part.ref_logprobs,
                    weights=part.weights,
                    loss_type=settings.loss_type,
                    importance_sampling_level=settings.importance_sampling_level,
                    epsilon=settings.epsilon,
                    epsilon_high=settings.epsilon_high,
                    delta=settings.delta,
                    beta=settings.beta,
                    kl_estimator=settings.kl_estimator,
                    use_bias_correction_kl=settings.use_bias_correction_kl,
                )
                batch.backward(loss, scores)
            batch.update(rate)  # the gradient is clipped, and the optimizer runs
    skipped, reason = len(batch.non_finite), next(iter(batch.non_finite), None)
    metrics |= batch.metrics() | {"skipped_updates": 0.0} | skip_metrics(skipped, reason)
    return StepStats(metrics, advantages, settings.updates_per_rollout - skipped, skipped, reason, batch.ref_logprobs)
