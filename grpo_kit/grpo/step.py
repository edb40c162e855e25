"""One GRPO step: from a rollout's rewards to changed weights."""

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from grpo_kit.config import Config, TrainingSettings
from grpo_kit.grpo.advantages import group_advantages, group_spread
from grpo_kit.grpo.loss import LossOutput, grpo_loss, token_weights

if TYPE_CHECKING:
    from grpo_kit.models.policy import Policy, Scores
    from grpo_kit.rollout import Rollout


@dataclass(frozen=True)
class StepStats:
    """What a step did: metrics under TRL's names, the advantages it used, whether the optimizer ran each time."""

    metrics: dict[str, float]
    advantages: torch.Tensor  # (N,)
    updates: int  # optimizer steps made
    skipped: int  # optimizer steps left out because the gradient was not finite


@dataclass(frozen=True)
class _Batch:
    """The scored rows of a rollout with all that the loss needs; every tensor (N, …)."""

    group_ids: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    weights: torch.Tensor

    def rows(self, keep: torch.Tensor) -> "_Batch":
        """Some of the rows."""
        parts = {name: value[keep] for name, value in vars(self).items() if value is not None}
        return replace(self, **parts)


def grpo_step(policy: "Policy", optimizer: torch.optim.Optimizer, rollout: "Rollout", config: Config) -> StepStats:
    """Update the policy on a rollout: advantages, then `updates_per_rollout` times loss, gradient and optimizer step.

    Rows without a reward are left out. Where no advantage differs from 0 and beta is 0 there is nothing to learn: the
    optimizer is not run, so that momentum and weight decay cannot move the weights. A gradient that is not finite is
    not applied. Micro-batches are cut along groups and weigh their tokens as the whole batch does, so the gradient does
    not depend on their size.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    settings = config.training_settings
    advantages = group_advantages(
        rollout.rewards,
        rollout.group_ids,
        scale_rewards=settings.scale_rewards,
        baseline=settings.baseline,
        eps=settings.advantage_eps,
    )
    metrics = _group_metrics(rollout)
    scored = rollout.rewards.isfinite()
    if not scored.any() or (settings.beta == 0 and not advantages.any()):
        return StepStats(metrics | {"loss": 0.0, "grad_norm": 0.0}, advantages, 0, 0)
    started = time.perf_counter()
    batch = _make_batch(policy, rollout, advantages, scored, settings)
    metrics["time/scoring"] = time.perf_counter() - started
    metrics["time/backward"] = 0.0
    made = skipped = 0
    for update in range(settings.updates_per_rollout):
        measured = _accumulate(policy, rollout, batch, settings)
        started = time.perf_counter()
        norm = torch.nn.utils.clip_grad_norm_(policy.trainable_parameters(), settings.max_grad_norm)
        if norm.isfinite():
            optimizer.step()
            made += 1
        else:
            skipped += 1
        optimizer.zero_grad(set_to_none=True)
        metrics["time/backward"] += measured.pop("time/backward") + time.perf_counter() - started
        metrics["time/scoring"] += measured.pop("time/scoring")
        metrics |= _averaged(metrics, measured | {"grad_norm": float(norm)}, update)
    return StepStats(metrics | {"skipped_updates": float(skipped)}, advantages, made, skipped)


def _averaged(before: dict[str, float], new: dict[str, float], count: int) -> dict[str, float]:
    """Running means over the inner updates."""
    return {name: (before.get(name, 0.0) * count + value) / (count + 1) for name, value in new.items()}


def _make_batch(
    policy: "Policy", rollout: "Rollout", advantages: torch.Tensor, scored: torch.Tensor, settings: TrainingSettings
) -> _Batch:
    """Move the scored rows to the policy's device; score them under the reference where the KL term needs it."""
    rows = {
        "group_ids": rollout.group_ids[scored],
        "ids": rollout.completion_ids[scored],
        "mask": rollout.completion_mask[scored],
        "advantages": advantages[scored].float(),
        "old_logprobs": rollout.old_logprobs[scored],
    }
    rows = {name: value.to(policy.device) for name, value in rows.items()}
    reference = None
    if settings.beta != 0 and rollout.ref_logprobs is not None:
        reference = rollout.ref_logprobs[scored].to(policy.device)
    elif settings.beta != 0:
        with torch.no_grad():
            parts = [
                _score(policy, rollout, rows["group_ids"][part], rows["ids"][part], rows["mask"][part], reference=True)
                for part in _micro_batches(rows["group_ids"], settings.micro_batch_size)
            ]
        reference = torch.cat([part.logprobs for part in parts])
    weights = token_weights(rows["mask"], settings.loss_type, policy.max_new_tokens)
    return _Batch(**rows, ref_logprobs=reference, weights=weights)


def _score(
    policy: "Policy", rollout: "Rollout", group_ids: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, **options
) -> "Scores":
    """Score rows with only the prompts that they answer."""
    groups, local = group_ids.unique(return_inverse=True)
    chosen = groups.tolist()
    images = None if rollout.prompt_images is None else [rollout.prompt_images[g] for g in chosen]
    prompts = [rollout.prompts[g].user_prompt for g in chosen]
    return policy.score(prompts, local, ids, mask, images=images, **options)


def _micro_batches(group_ids: torch.Tensor, size: int | None) -> list[torch.Tensor]:
    """Row indices, in order, `size` at a time; all at once where `size` is None."""
    return list(torch.arange(len(group_ids), device=group_ids.device).split(size or len(group_ids)))


def _accumulate(policy: "Policy", rollout: "Rollout", batch: _Batch, settings: TrainingSettings) -> dict[str, float]:
    """Leave the whole batch's gradient on the parameters; returns loss, entropy, KL, clip shares and seconds."""
    totals: dict[str, float] = {}
    for keep in _micro_batches(batch.group_ids, settings.micro_batch_size):
        part = batch.rows(keep)
        started = time.perf_counter()
        scores = _score(policy, rollout, part.group_ids, part.ids, part.mask)
        scored = time.perf_counter()
        output = _loss(scores, part, settings)
        output.loss.backward()
        shares = {True: len(keep) / len(batch.ids), False: float(part.mask.sum() / batch.mask.sum())}
        by_row = settings.importance_sampling_level == "sequence"  # then a row is clipped as a whole
        measured = {
            name: value * shares[by_row and name.startswith("clip_ratio")] for name, value in output.metrics.items()
        }
        measured["entropy"] = float(scores.entropy.sum() / batch.mask.sum())
        measured["loss"] = float(output.loss.detach())
        measured["time/scoring"] = scored - started
        measured["time/backward"] = time.perf_counter() - scored
        totals = {name: totals.get(name, 0.0) + value for name, value in measured.items()}
    return totals


def _loss(scores: "Scores", batch: _Batch, settings: TrainingSettings) -> LossOutput:
    return grpo_loss(
        scores.logprobs,
        batch.advantages,
        batch.mask,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        loss_type=settings.loss_type,
        importance_sampling_level=settings.importance_sampling_level,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        delta=settings.delta,
        beta=settings.beta,
        kl_estimator=settings.kl_estimator,
        weights=batch.weights,
    )


def _group_metrics(rollout: "Rollout") -> dict[str, float]:
    """Rewards and lengths of a rollout, under TRL's names."""
    rewards = rollout.rewards[rollout.rewards.isfinite()]
    spread = group_spread(rollout.rewards, rollout.group_ids)
    lengths = rollout.completion_mask.sum(dim=1).float()
    metrics = {
        "reward": float(rewards.mean()) if len(rewards) else float("nan"),
        "reward_std": _within_group_std(rollout),
        "frac_reward_zero_std": float((spread == 0).float().mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/clipped_ratio": float(rollout.truncated.float().mean()),
        "unscored": float(len(rollout.rewards) - len(rewards)),
    }
    for name, values in rollout.reward_parts.items():
        kept = values[values.isfinite()]
        metrics[f"rewards/{name}/mean"] = float(kept.mean()) if len(kept) else float("nan")
        metrics[f"rewards/{name}/std"] = float(kept.std()) if len(kept) > 1 else 0.0
    return metrics


def _within_group_std(rollout: "Rollout") -> float:
    """Mean over groups of the unbiased standard deviation of the scored rewards."""
    groups = [rollout.rewards[rollout.group_ids == g] for g in rollout.group_ids.unique()]
    deviations = [float(group[group.isfinite()].std()) for group in groups if group.isfinite().sum() > 1]
    return sum(deviations) / len(deviations) if deviations else 0.0
