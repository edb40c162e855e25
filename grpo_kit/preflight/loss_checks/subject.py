"""Somebody's loss function, called by the names of the arguments that it has."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from grpo_kit.preflight.loss_checks.cases import Batch, drifted

TENSORS = ("logprobs", "old_logprobs", "ref_logprobs", "advantages", "rewards", "group_ids", "mask")
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")
ADVANTAGE_SHAPES: dict[str, Callable[[Batch], torch.Tensor]] = {
    "(N,)": lambda batch: batch.advantages,
    "(N, 1)": lambda batch: batch.advantages.unsqueeze(1),
    "(N, T)": lambda batch: batch.advantages.unsqueeze(1).expand(batch.mask.shape).clone(),
}


class NotAsked(Exception):
    """A property that a function gives no chance to test; the text says why."""


@dataclass(frozen=True)
class Answer:
    """What a loss function said to a batch: the loss, its gradient by the log-probabilities (N, T), its metrics."""

    loss: torch.Tensor
    gradient: torch.Tensor
    metrics: dict[str, float]


@dataclass(frozen=True)
class Subject:
    """A loss function and what is known of how to call it; perhaps an advantage function beside it."""

    name: str
    loss: Callable | None
    takes: frozenset[str]
    advantages: Callable | None = None
    advantages_take: frozenset[str] = frozenset()
    mask_dtype: torch.dtype = torch.bool
    advantages_shape: str = "(N,)"

    def run(self, batch: Batch, **settings: object) -> Answer:
        """Call the loss; beta is 0 unless given, what else is not given is the function's own default."""
        leaf = batch.logprobs.detach().clone().requires_grad_()
        with _default_dtype(leaf.dtype):
            output = self.loss(**self._arguments(replace(batch, logprobs=leaf), settings))
        value = getattr(output, "loss", output)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise TypeError(f"returned {described(value)}, allowed: a scalar tensor, or an object with one in .loss")
        gradient = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] if value.requires_grad else None
        metrics = getattr(output, "metrics", None)
        return Answer(
            value.detach().reshape(()),
            torch.zeros_like(leaf) if gradient is None else gradient,
            metrics if isinstance(metrics, dict) else {},
        )

    def _arguments(self, batch: Batch, settings: dict[str, object]) -> dict[str, object]:
        known = {name: getattr(batch, name) for name in TENSORS}
        known["mask"] = batch.mask.to(self.mask_dtype)
        known["advantages"] = ADVANTAGE_SHAPES[self.advantages_shape](batch)
        known |= {"beta": 0.0, "num_items_in_batch": float(batch.mask.sum())}
        known |= {"max_completion_length": batch.mask.shape[1]} | settings
        return {name: value for name, value in known.items() if name in self.takes}

    def weigh(self, rewards: torch.Tensor, group_ids: torch.Tensor, **settings: object) -> torch.Tensor:
        """(N,) what each row is weighed by: its advantage, or, up to a factor, what the loss's gradient implies."""
        if self.advantages is not None:
            given = {"rewards": rewards, "group_ids": group_ids} | settings
            with _default_dtype(rewards.dtype):
                return self.advantages(**{name: value for name, value in given.items() if name in self.advantages_take})
        self.need_rewards()
        logprobs = torch.linspace(-2, -1, 3 * len(rewards), dtype=rewards.dtype).reshape(-1, 3)
        mask = torch.ones(len(rewards), 3, dtype=torch.bool)
        batch = Batch(logprobs, logprobs, logprobs, mask, rewards, group_ids, torch.zeros_like(rewards))
        return -self.run(batch).gradient.sum(dim=1)

    @property
    def weighs_exactly(self) -> bool:
        """`weigh` returns advantages themselves, not what a gradient implies."""
        return self.advantages is not None

    @property
    def knows_groups(self) -> bool:
        """What weighs the rows is told which belong together."""
        return "group_ids" in (self.takes if self.advantages is None else self.advantages_take)

    def need(self, name: str, why: str = "") -> None:
        """Leave a property out where the function does not take an argument."""
        if name not in self.takes:
            raise NotAsked(f"takes no {name}{why and f': {why}'}")

    def need_rewards(self) -> None:
        """Leave a property of advantages out where the function takes them as they are."""
        if self.advantages is None and (self.loss is None or "advantages" in self.takes):
            raise NotAsked("takes advantages, not rewards; give --advantages to ask it of them")

    def has(self, name: str, value: object) -> bool:
        """The function takes this value of a setting without an error."""
        return name in self.takes and self.works(beta=0.1, **{name: value})

    def works(self, **settings: object) -> bool:
        """The function takes these settings without an error."""
        try:
            self.run(drifted(), **settings)
        except Exception:  # it does not have such a value: that is the answer
            return False
        return True

    def forms(self) -> dict[str, dict[str, object]]:
        """Settings of each known loss type that the function has, by its name; {"": {}} where it has none."""
        names = [name for name in LOSS_TYPES if self.has("loss_type", name)]
        forms = {name: {"loss_type": name} for name in names} or {"": {}}
        if "cispo" in forms and "epsilon_high" in self.takes:
            forms["cispo"]["epsilon_high"] = 5.0  # CISPO bounds the ratio itself, not its distance from 1
        return forms

    def variants(self) -> list[dict[str, object]]:
        """The settings that change the form of the loss, in all combinations that the function offers."""
        level = "importance_sampling_level"
        levels = [{level: name} for name in LEVELS if self.has(level, name)] or [{}]
        return [one | other for one, other in itertools.product(self.forms().values(), levels)]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Tensors that a function makes by itself are of the batch's type, as they are in training."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def described(value: object) -> str:
    """What a function returned, in words."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
