"""What surrounds the method in a step: micro-batches, several processes, numbers that are not finite, clocks.

A part's tokens weigh as in the whole batch, and what is measured of it is its share of the batch's mean, so that
neither gradient nor metrics depend on how the batch is divided.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from grpo_kit.config import TrainingSettings
from grpo_kit.grpo.finite import (
    NonFinite,
    full_tensor,
    nan_unless_finite,
    non_finite_gradient,
    non_finite_loss,
    non_finite_weight,
    rows_not_finite,
    step_or_restore,
)
from grpo_kit.grpo.loss import LossOutput, token_weights
from grpo_kit.models.policy import Policy, Scores
from grpo_kit.rollout import Rollout, score_rows
from grpo_kit.training.processes import Processes


@dataclass(frozen=True)
class Part:
    """Rows of a rollout with all that their loss needs; every tensor (rows, …), on the policy's device."""

    rows: torch.Tensor  # their places in the rollout
    mask: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor | None
    ref_logprobs: torch.Tensor | None = None
    weights: torch.Tensor | None = None  # of the tokens in the whole batch

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Part":
        """The same with every tensor changed."""
        return replace(self, **{name: change(value) for name, value in vars(self).items() if value is not None})


@dataclass(eq=False)
class Accumulation:
    """The batch of a step: hands out its parts, adds up their gradients and what is measured of them.

    As a context it sees that no gradient is left on the parameters, before and afterwards.
    """

    policy: Policy
    optimizer: torch.optim.Optimizer
    rollout: Rollout
    advantages: torch.Tensor  # (N,) of all rows
    kept: torch.Tensor  # (N,) bool: the rows that take part
    settings: TrainingSettings
    processes: Processes

    def __post_init__(self) -> None:
        self.module = self.processes.module(self.policy)
        self.ref_logprobs = self.rollout.ref_logprobs
        self.non_finite: list[NonFinite] = []  # why updates were skipped
        self._once, self._updates = {}, []  # what is measured once, and in each update: name → number

    def __enter__(self) -> "Accumulation":
        self.optimizer.zero_grad(set_to_none=True)  # an interrupted step leaves a gradient behind
        started = time.perf_counter()
        policy, rollout = self.policy, self.rollout
        columns = Part(
            rows=torch.arange(len(self.kept)),
            mask=trained_tokens(rollout, self.settings),
            advantages=self.advantages.float(),
            old_logprobs=rollout.old_logprobs,
        ).map(lambda tensor: tensor.to(policy.device))
        if self.settings.beta != 0:
            if self.ref_logprobs is None:
                parts, own = self._divided(columns)
                with torch.no_grad():
                    scores = [score_rows(self.module, rollout, part.rows, reference=True).logprobs for part in parts]
                self.ref_logprobs = self._whole_column(scores[:own])
            columns = replace(columns, ref_logprobs=self.ref_logprobs.to(policy.device))
        batch = columns.map(lambda tensor: tensor[self.kept.to(policy.device)])
        weights = token_weights(batch.mask, self.settings.loss_type, policy.max_new_tokens)
        self._batch = replace(batch, weights=weights)
        self._once["time/reference"] = time.perf_counter() - started
        return self

    def __exit__(self, *error: object) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    # --- one update ---------------------------------------------------------------------------------------------------

    def parts(self) -> Iterator[Part]:
        """This process's rows in micro-batches; `backward` is to be called on each before the next."""
        parts, own = self._divided(self._batch)
        self._totals: dict[str, float] = {}
        self._logprobs: list[torch.Tensor] = []
        for number, self._part in enumerate(parts, start=1):
            with self.processes.accumulating(last=number == len(parts)):
                self._started = time.perf_counter()
                yield self._part
        totals = self.processes.gather(lambda: self._totals)
        self._measured = {
            name: value if name.startswith("time/") else sum(share[name] for share in totals)
            for name, value in self._totals.items()  # seconds stay this process's own
        }
        self._scored = self._whole_column(self._logprobs[:own])
        if not self._updates:
            scored, recorded = self._scored, self._batch.old_logprobs
            # the first scoring and the sampler's record differ by rounding, or training and rollout disagree
            gap = torch.zeros_like(scored) if recorded is None else (scored - recorded).abs()
            self._once["sampling/sampling_logp_difference/mean"] = float(gap[self._batch.mask].mean())
            self._once["sampling/sampling_logp_difference/max"] = float(gap.max())
            self._batch = replace(self._batch, old_logprobs=_old_up_to_rounding(scored, recorded, self.policy))

    def old_logprobs(self, part: Part, scores: Scores) -> torch.Tensor:
        """(rows, T) under the policy that sampled; before the first update its record up to rounding."""
        if self._updates:
            return part.old_logprobs
        return _old_up_to_rounding(scores.logprobs.detach(), part.old_logprobs, self.policy)

    def backward(self, loss: LossOutput, scores: Scores) -> None:
        """Add the gradient of the newest part's loss, NaN where anything that went into it is not finite."""
        part, batch = self._part, self._batch
        scored = time.perf_counter()
        value = loss.loss * nan_unless_finite(scores.logprobs, part.old_logprobs, part.ref_logprobs)
        self.processes.backward(value)
        self._logprobs.append(scores.logprobs.detach())
        by_tokens, by_rows = float(part.mask.sum() / batch.mask.sum()), len(part.rows) / len(batch.rows)
        of_ratios = by_rows if self.settings.importance_sampling_level == "sequence" else by_tokens  # one ratio a row
        measured = {n: v * (of_ratios if n.startswith("clip_ratio") else by_tokens) for n, v in loss.metrics.items()}
        measured |= {
            "loss": float(value.detach()),
            "entropy": float((scores.entropy * part.mask).sum() / batch.mask.sum()),
            "time/scoring": scored - self._started,
            "time/backward": time.perf_counter() - scored,
        }
        self._totals = {name: self._totals.get(name, 0.0) + share for name, share in measured.items()}

    def update(self, learning_rate: float | None = None) -> None:
        """Clip the whole gradient to `max_grad_norm` and run the optimizer, at this rate where one is given.

        Weights and momentum stay as they are where loss, gradient or the optimizer's result is not finite.
        """
        started, measured = time.perf_counter(), self._measured
        set_rate(self.optimizer, learning_rate)
        trainable, parameters = self.policy.trainable_parameters(), dict(self.policy.model.named_parameters())
        norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None]))
        measured["grad_norm"] = float(norm)
        if not math.isfinite(measured["grad_norm"]) or not math.isfinite(measured["loss"]):
            recorded = self.rollout.old_logprobs
            recorded = None if recorded is None else recorded[self._batch.rows.cpu()]
            self.non_finite.append(
                non_finite_weight(parameters)
                or non_finite_loss(recorded, self._batch.ref_logprobs, self._scored, measured["loss"])
                or non_finite_gradient(parameters, measured["grad_norm"])
            )
        else:
            torch.nn.utils.clip_grads_with_norm_(trainable, self.settings.max_grad_norm, norm)
            if not step_or_restore(self.optimizer, lambda sound: all(self.processes.gather(lambda: sound))):
                found = non_finite_weight(parameters)  # as they were before
                after = NonFinite("optimizer", "weights or momentum after the optimizer's step")
                self.non_finite.append(found or after)
        self.optimizer.zero_grad(set_to_none=True)
        measured["time/backward"] += time.perf_counter() - started
        self._updates.append(measured)

    def metrics(self) -> dict[str, float]:
        """What was measured: means over the inner updates; seconds are added up."""
        totals = {name: sum(update[name] for update in self._updates) for name in self._updates[0]}
        count = len(self._updates)
        means = {name: value if name.startswith("time/") else value / count for name, value in totals.items()}
        return self._once | means

    # --- dividing the batch -------------------------------------------------------------------------------------------

    def _divided(self, batch: Part) -> tuple[list[Part], int]:
        """This process's rows in micro-batches, and how many such parts there are.

        Every process has as many parts, since FSDP gathers weights in each: one with fewer rows goes on with parts that
        weigh nothing, beyond that number.
        """
        groups, size = self.rollout.group_ids[batch.rows.cpu()], self.settings.micro_batch_size or len(batch.rows)
        shards = self.processes.shards(len(self.rollout.prompts))
        rows = [((groups >= shard.start) & (groups < shard.stop)).nonzero().flatten() for shard in shards]
        divided = [micro_batches(some, groups, size) for some in rows]
        mine = divided[self.processes.rank]
        own = [batch.map(lambda tensor, some=some: tensor[some.to(tensor.device)]) for some in mine]
        idle = batch.map(lambda tensor: tensor[:1])
        idle = replace(idle, mask=idle.mask & False, weights=None if idle.weights is None else 0 * idle.weights)
        return own + [idle] * (max(map(len, divided)) - len(own)), len(own)

    def _whole_column(self, own: list[torch.Tensor]) -> torch.Tensor:
        """(rows, T) values of all processes' rows: the shards are in the batch's order."""
        if self.processes.count == 1:
            return torch.cat(own)
        shares = self.processes.gather(lambda: [values.cpu() for values in own])
        return torch.cat([values for share in shares for values in share]).to(self.policy.device)


def micro_batches(rows: torch.Tensor, groups: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Divide rows into parts of at most `size`, whole groups where they fit, since a part runs its groups' prompts.

    Args:
        rows: places of rows, group-major.
        groups: the group of each place.
    """
    parts: list[torch.Tensor] = []
    for group in rows.split(groups[rows].unique_consecutive(return_counts=True)[1].tolist()) if len(rows) else []:
        if parts and len(parts[-1]) + len(group) <= size:
            parts[-1] = torch.cat([parts[-1], group])
        else:
            parts.extend(group.tensor_split(math.ceil(len(group) / size)))
    return parts


def _old_up_to_rounding(scored: torch.Tensor, recorded: torch.Tensor | None, policy: Policy) -> torch.Tensor:
    """Log-probabilities under the policy that sampled: the first scoring's, in rows where the sampler's record agrees.

    Sampling and scoring add up the same numbers in another order. Taken for a change of the policy, that rounding would
    be a ratio that is not 1 before anything was learned. A row that differs by more keeps its record.
    """
    if recorded is None:
        return scored
    rounding = torch.finfo(policy.model.dtype).eps ** (2 / 3)  # 2e-5 in float32; what is seen is a tenth of it
    agrees = (scored - recorded).abs().amax(dim=1, keepdim=True) <= rounding
    return torch.where(agrees, scored, recorded)


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float | None) -> None:
    """Let the next update have that learning rate; None leaves the optimizer its own."""
    if learning_rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


# --- steps that are left out ------------------------------------------------------------------------------------------


def trained_tokens(rollout: Rollout, settings: TrainingSettings) -> torch.Tensor:
    """(N, T) bool: the tokens that carry loss; none of a truncated completion where these are masked."""
    mask = rollout.completion_mask
    return mask & ~rollout.truncated[:, None] if settings.mask_truncated_completions else mask


def is_idle(rollout: Rollout, advantages: torch.Tensor, kept: torch.Tensor, settings: TrainingSettings) -> bool:
    """Whether there is nothing to learn, and sampling was sound: no advantage and no KL term pulls at any token."""
    tokens = trained_tokens(rollout, settings)[kept]
    pulled = tokens if settings.beta != 0 else tokens & (advantages[kept] != 0)[:, None]
    return not pulled.any() and not rows_not_finite(rollout.old_logprobs)


def why_unscored(rollout: Rollout) -> NonFinite:
    """Why no sample of a rollout has a usable reward."""
    if rows := rows_not_finite(rollout.old_logprobs):
        return NonFinite("sampling", f"log-probabilities in sampling ({rows} of {len(rollout.rewards)} completions)")
    if not any(image is not None for images in rollout.images for image in images):
        return NonFinite("pictures", f"the pictures (all {len(rollout.rewards)} are blank or not finite)")
    said = {name: "abstained" if v.isinf().all() else "gave no number" for name, v in rollout.reward_parts.items()}
    bad = [f"{name} {said[name]}" for name, values in rollout.reward_parts.items() if not values.isfinite().any()]
    return NonFinite("rewards", f"the rewards (no sample has one; {', '.join(bad) or 'their parts gave no number'})")


def skip_metrics(skipped: int, reason: NonFinite | None) -> dict[str, float]:
    """How many updates were skipped, and under the name of the first part that was not finite."""
    if reason is None:
        return {}
    return {"skipped_updates": float(skipped), f"skipped_updates/{reason.part}": float(skipped)}
