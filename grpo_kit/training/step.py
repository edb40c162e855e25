"""One GRPO step: from a rollout's rewards to changed weights."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from grpo_kit.config import Config, TrainingSettings
from grpo_kit.grpo.advantages import group_advantages, usable_rewards
from grpo_kit.grpo.finite import (
    NotFinite,
    carrier,
    full_tensor,
    gradient_trouble,
    loss_trouble,
    rows_not_finite,
    step_or_restore,
    weight_trouble,
)
from grpo_kit.grpo.loss import LossOutput, grpo_loss, token_weights
from grpo_kit.models.policy import Policy, Scores
from grpo_kit.rollout import Rollout
from grpo_kit.training.processes import ALONE, Processes


@dataclass(frozen=True)
class StepStats:
    """What a step did: metrics under TRL's names, the advantages it used, whether the optimizer ran each time."""

    metrics: dict[str, float]
    advantages: torch.Tensor  # (N,)
    updates: int  # optimizer steps made
    skipped: int  # optimizer steps left out because something was not finite
    trouble: NotFinite | None = None  # what, in the first of them


@dataclass(frozen=True)
class _Batch:
    """The scored rows of a rollout with all that the loss needs; every tensor (N, …)."""

    rows: torch.Tensor  # their places in the rollout
    mask: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor | None
    ref_logprobs: torch.Tensor | None
    weights: torch.Tensor | None  # of the tokens in the whole batch

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "_Batch":
        """The batch with every tensor changed."""
        return replace(self, **{name: change(value) for name, value in vars(self).items() if value is not None})


def grpo_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    config: Config,
    processes: Processes = ALONE,
) -> StepStats:
    """Update the policy on a rollout: advantages, then `updates_per_rollout` times loss, gradient and optimizer step.

    Rows without a usable reward are left out as `on_bad_reward` says. Where no advantage differs from 0 and beta is 0
    there is nothing to learn: the optimizer is not run, so that momentum and weight decay cannot move the weights.
    Where something is not finite, in sampling, scoring, loss, gradient or the optimizer's result, or no sample has a
    usable reward, the update is skipped: weights and momentum stay as they are, bit for bit. Micro-batches weigh their
    tokens as the whole batch does, so that the gradient does not depend on their size. Several processes share the
    rows by whole groups in the same way: each adds its own rows' gradient, weighed as in the whole batch.

    Raises:
        BadRewardError: a reward is not finite and `on_bad_reward` is "raise".
        ValueError: shapes that do not fit each other.
    """
    settings = config.training_settings
    bad = settings.on_bad_reward
    rewards = usable_rewards(rollout.rewards, rollout.group_ids, bad, rollout.reward_parts)
    advantages = group_advantages(
        rewards,
        rollout.group_ids,
        scale_rewards=settings.scale_rewards,
        baseline=settings.baseline,
        eps=settings.advantage_eps,
        noise_floor=settings.reward_noise_floor,
    )
    kept = ~rewards.isnan()
    metrics = rollout.metrics() | {"unscored": float((~kept).sum())}
    idle = settings.beta == 0 and not advantages.any() and not rows_not_finite(rollout.old_logprobs)
    if idle or not kept.any():
        skipped, trouble = (0, None) if kept.any() else (settings.updates_per_rollout, _unscored(rollout))
        metrics |= {"loss": 0.0, "grad_norm": 0.0} | _skip_metrics(skipped, trouble)
        return StepStats(metrics, advantages, 0, skipped, trouble)
    optimizer.zero_grad(set_to_none=True)  # an interrupted step leaves a gradient behind
    try:
        updates, found, troubles = _update(policy, optimizer, rollout, advantages, kept, settings, processes)
    finally:
        optimizer.zero_grad(set_to_none=True)
    skipped, trouble = len(troubles), next(iter(troubles), None)
    metrics |= found | _overall(updates) | {"skipped_updates": 0.0} | _skip_metrics(skipped, trouble)
    return StepStats(metrics, advantages, len(updates) - skipped, skipped, trouble)


def _update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantages: torch.Tensor,
    kept: torch.Tensor,
    settings: TrainingSettings,
    processes: Processes,
) -> tuple[list[dict[str, float]], dict[str, float], list[NotFinite]]:
    """Loss, gradient and optimizer step, `updates_per_rollout` times.

    Returns:
        What each update measured, what is measured once, and why updates were skipped.
    """
    started = time.perf_counter()
    batch = _make_batch(policy, rollout, advantages, kept, settings, processes)
    once = {"time/reference": time.perf_counter() - started}
    updates, troubles = [], []
    for update in range(settings.updates_per_rollout):
        measured, own = _accumulate(policy, rollout, batch, settings, processes, first=update == 0)
        if update == 0:
            once |= _disagreement(own, batch)
            batch = replace(batch, old_logprobs=_settled(own, batch.old_logprobs, policy))
        started = time.perf_counter()
        parameters = policy.trainable_parameters()
        norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        measured["grad_norm"] = float(norm)
        if not math.isfinite(measured["grad_norm"]) or not math.isfinite(measured["loss"]):
            troubles.append(_diagnose(policy, rollout, batch, own, measured))
        else:
            torch.nn.utils.clip_grads_with_norm_(parameters, settings.max_grad_norm, norm)
            if not step_or_restore(optimizer, lambda sound: all(processes.gather(lambda: sound))):
                found = weight_trouble(dict(policy.model.named_parameters()))  # as they were before
                troubles.append(found or NotFinite("optimizer", "weights or momentum after the optimizer's step"))
        optimizer.zero_grad(set_to_none=True)
        measured["time/backward"] += time.perf_counter() - started
        updates.append(measured)
    return updates, once, troubles


def _diagnose(
    policy: Policy, rollout: Rollout, batch: _Batch, own: torch.Tensor, measured: dict[str, float]
) -> NotFinite:
    """Why an update cannot be made; only asked where it is known that something is not finite."""
    parameters = dict(policy.model.named_parameters())
    recorded = None if rollout.old_logprobs is None else rollout.old_logprobs[batch.rows.cpu()]
    return (
        weight_trouble(parameters)
        or loss_trouble(recorded, batch.ref_logprobs, own, measured["loss"])
        or gradient_trouble(parameters, measured["grad_norm"])
    )


def _unscored(rollout: Rollout) -> NotFinite:
    """Why no sample of a rollout has a usable reward."""
    if rows := rows_not_finite(rollout.old_logprobs):
        return NotFinite("sampling", f"log-probabilities in sampling ({rows} of {len(rollout.rewards)} completions)")
    if not any(image is not None for images in rollout.images for image in images):
        return NotFinite("pictures", f"the pictures (all {len(rollout.rewards)} are blank or not finite)")
    bad = [name for name, values in rollout.reward_parts.items() if values.isnan().all()]
    return NotFinite("rewards", f"the rewards (no sample has one; {', '.join(bad) or 'their parts'} gave no number)")


def _skip_metrics(skipped: int, trouble: NotFinite | None) -> dict[str, float]:
    """How many updates were skipped, and under the name of the first part that was not finite."""
    if trouble is None:
        return {}
    return {"skipped_updates": float(skipped), f"skipped_updates/{trouble.part}": float(skipped)}


def _overall(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over the inner updates; seconds are added up."""
    totals = {name: sum(update[name] for update in updates) for name in updates[0]}
    return {name: value if name.startswith("time/") else value / len(updates) for name, value in totals.items()}


def _make_batch(
    policy: Policy,
    rollout: Rollout,
    advantages: torch.Tensor,
    kept: torch.Tensor,
    settings: TrainingSettings,
    processes: Processes,
) -> _Batch:
    """Move the kept rows to the policy's device; score them under the reference where the KL term needs it."""
    batch = _Batch(
        rows=torch.arange(len(kept)),
        mask=rollout.completion_mask,
        advantages=advantages.float(),
        old_logprobs=rollout.old_logprobs,
        ref_logprobs=None if settings.beta == 0 else rollout.ref_logprobs,
        weights=None,
    ).map(lambda tensor: tensor[kept].to(policy.device))
    batch = replace(batch, weights=token_weights(batch.mask, settings.loss_type, policy.max_new_tokens))
    if settings.beta != 0 and batch.ref_logprobs is None:
        parts, own = _parts(batch, rollout, settings.micro_batch_size, processes)
        scorer = processes.scorer(policy)
        with torch.no_grad():
            scores = [rollout.score(scorer, part.rows, reference=True).logprobs for part in parts]
        batch = replace(batch, ref_logprobs=_whole_column(scores[:own], batch, processes))
    return batch


def _accumulate(
    policy: Policy,
    rollout: Rollout,
    batch: _Batch,
    settings: TrainingSettings,
    processes: Processes,
    first: bool,
) -> tuple[dict[str, float], torch.Tensor]:
    """Leave the whole batch's gradient on the parameters.

    Returns:
        Loss, entropy, KL, clip shares and seconds; and the log-probabilities (N, T) that were found.
    """
    totals: dict[str, float] = {}
    found = []
    scorer = processes.scorer(policy)
    parts, own = _parts(batch, rollout, settings.micro_batch_size, processes)
    for number, part in enumerate(parts, start=1):
        with processes.accumulating(last=number == len(parts)):
            started = time.perf_counter()
            scores = rollout.score(scorer, part.rows)
            scored = time.perf_counter()
            found.append(scores.logprobs.detach())
            if first:
                part = replace(part, old_logprobs=_settled(found[-1], part.old_logprobs, policy))
            output = _loss(scores, part, settings)
            loss = output.loss * carrier(scores.logprobs, part.old_logprobs, part.ref_logprobs)
            processes.backward(loss)
        measured = _shares(output.metrics, part, batch, settings.importance_sampling_level == "sequence") | {
            "loss": float(loss.detach()),
            "entropy": float((scores.entropy * part.mask).sum() / batch.mask.sum()),
            "time/scoring": scored - started,
            "time/backward": time.perf_counter() - scored,
        }
        totals = {name: totals.get(name, 0.0) + value for name, value in measured.items()}
    return _summed(totals, processes), _whole_column(found[:own], batch, processes)


def _parts(batch: _Batch, rollout: Rollout, size: int | None, processes: Processes) -> tuple[list[_Batch], int]:
    """This process's rows, `size` at a time, and how many such parts there are.

    Every process has as many parts, since FSDP gathers weights in each: one with fewer rows goes on with parts that
    weigh nothing, so the list may be longer than the number beside it.
    """
    groups, size = rollout.group_ids[batch.rows.cpu()], size or len(batch.rows)
    shards = processes.shards(len(rollout.prompts))
    rows = [((groups >= shard.start) & (groups < shard.stop)).nonzero().flatten() for shard in shards]
    own = [
        batch.map(lambda tensor, keep=keep: tensor[keep.to(tensor.device)])
        for keep in rows[processes.rank].split(size)
        if len(keep)
    ]
    first = batch.map(lambda tensor: tensor[:1])
    idle = replace(first, mask=torch.zeros_like(first.mask), weights=torch.zeros_like(first.weights))
    most = max(math.ceil(len(some) / size) for some in rows)
    return own + [idle] * (most - len(own)), len(own)


def _whole_column(own: list[torch.Tensor], batch: _Batch, processes: Processes) -> torch.Tensor:
    """(N, T) values of all rows, from what each process found for its own: the shards are in the batch's order."""
    if processes.count == 1:
        return torch.cat(own)
    shares = processes.gather(lambda: [values.cpu() for values in own])
    return torch.cat([values for share in shares for values in share]).to(batch.mask.device)


def _summed(totals: dict[str, float], processes: Processes) -> dict[str, float]:
    """Shares of the batch's means added up over processes; seconds stay this process's own."""
    shares = processes.gather(lambda: totals)
    return {
        name: value if name.startswith("time/") else sum(share[name] for share in shares)
        for name, value in totals.items()
    }


def _settled(own: torch.Tensor, recorded: torch.Tensor | None, policy: Policy) -> torch.Tensor:
    """Log-probabilities under the policy that sampled: the first scoring's, in rows where the sampler's record agrees.

    Sampling and scoring add up the same numbers in another order. Taken for a change of the policy, that rounding would
    be a ratio that is not 1 before anything was learned. A row that differs by more keeps its record.
    """
    if recorded is None:
        return own
    rounding = torch.finfo(policy.model.dtype).eps ** (2 / 3)  # 2e-5 in float32; what is seen is a tenth of it
    agrees = (own - recorded).abs().amax(dim=1, keepdim=True) <= rounding
    return torch.where(agrees, own, recorded)


def _disagreement(own: torch.Tensor, batch: _Batch) -> dict[str, float]:
    """How far the first scoring lies from the sampler's record: rounding, or training and rollout disagree."""
    gap = torch.zeros_like(own) if batch.old_logprobs is None else (own - batch.old_logprobs).abs()
    means = {"mean": gap[batch.mask].mean(), "max": gap.max()}
    return {f"sampling/sampling_logp_difference/{name}": float(value) for name, value in means.items()}


def _shares(metrics: dict[str, float], part: _Batch, batch: _Batch, by_row: bool) -> dict[str, float]:
    """A micro-batch's means as shares of the whole batch's: by tokens, or by rows where a row has a single ratio."""
    rows, tokens = len(part.rows) / len(batch.rows), float(part.mask.sum() / batch.mask.sum())
    return {
        name: value * (rows if by_row and name.startswith("clip_ratio") else tokens) for name, value in metrics.items()
    }


def _loss(scores: Scores, batch: _Batch, settings: TrainingSettings) -> LossOutput:
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
        use_bias_correction_kl=settings.use_bias_correction_kl,
        weights=batch.weights,
    )
