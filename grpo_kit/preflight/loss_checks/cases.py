"""Random batches on which a loss is examined (valid log-probabilities, unequal lengths), and how far figures differ."""

import math
from dataclasses import dataclass, replace

import torch

LENGTHS = (7, 1, 4, 6, 2, 5)  # other numbers of rows and of tokens, so that a wrong broadcast is an error
EQUAL = (5,) * 6
ROUNDING = 1e-5  # relative: cases are float64, but a function may well compute in float32
_HIGHEST = -1e-3  # the largest log-probability that a case holds


@dataclass(frozen=True)
class Batch:
    """What a loss function is called with."""

    logprobs: torch.Tensor  # (N, T), as the next three
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    mask: torch.Tensor  # of bool
    rewards: torch.Tensor  # (N,), as the next two
    group_ids: torch.Tensor
    advantages: torch.Tensor  # the rewards less their group's mean

    def rows(self, keep: torch.Tensor) -> "Batch":
        """Some of the rows, their groups numbered from 0 again."""
        part = Batch(**{name: tensor[keep] for name, tensor in vars(self).items()})
        return replace(part, group_ids=part.group_ids.unique(return_inverse=True)[1])

    def rewarded(self, rewards: torch.Tensor) -> "Batch":
        """The batch with these rewards (N,), and with the advantages that follow from them."""
        baseline = torch.stack([rewards[self.group_ids == group].mean() for group in self.group_ids])
        return replace(self, rewards=rewards, advantages=rewards - baseline)

    def in_float32(self) -> "Batch":
        """The batch in single precision."""
        return replace(self, **{name: t.float() for name, t in vars(self).items() if t.is_floating_point()})


def drifted(seed: int = 0, drift: float = 0.3, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    """Groups of three whose policy has moved by `drift` (nats a token) since it sampled; the reference is another."""
    shape = (len(lengths), max(lengths))
    kind = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
    old = -0.05 - 4 * torch.rand(shape, **kind)
    new, reference = ((old + scale * torch.randn(shape, **kind)).clamp(max=_HIGHEST) for scale in (drift, 0.5))
    mask = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)
    rewards = torch.randn(shape[0], **kind)
    return Batch(new, old, reference, mask, rewards, torch.arange(shape[0]) // 3, rewards).rewarded(rewards)


def on_policy(lengths: tuple[int, ...] = EQUAL) -> Batch:
    """A batch before the first update: the policy is the one that sampled; the reference is another."""
    batch = drifted(lengths=lengths)
    return replace(batch, logprobs=batch.old_logprobs)


def at_ratios(log_ratios: list[float], advantages: list[float]) -> Batch:
    """Rows, in pairs, of three equal log-ratios of the policy to the one that sampled; that is the reference too."""
    rewards, rows = torch.tensor(advantages, dtype=torch.float64), len(advantages)
    new = torch.linspace(-2.0, -1.0, rows * 3, dtype=torch.float64).reshape(rows, 3)
    old = new - torch.tensor(log_ratios, dtype=torch.float64).unsqueeze(1)
    shift = (old.max() - _HIGHEST).clamp(min=0)  # a probability is at most 1
    mask, groups = torch.ones_like(new, dtype=torch.bool), torch.arange(rows) // 2
    return Batch(new - shift, old - shift, old - shift, mask, rewards, groups, rewards).rewarded(rewards)


def unlike_groups(seed: int, groups: int = 4, size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards (N,) of groups with unlike means and deviations, and the group that each belongs to (N,)."""
    source = torch.Generator().manual_seed(seed)
    level, scale = torch.randn(groups, 1, generator=source), torch.rand(groups, 1, generator=source) + 0.1
    rewards = level + scale * torch.randn(groups, size, generator=source)
    return rewards.double().flatten(), torch.arange(groups).repeat_interleave(size)


@dataclass(frozen=True)
class Enumerable:
    """A softmax policy over a few actions, and a batch of one-token rows over which a mean is an exact expectation.

    Action a stands in `counts[a]` of the N rows, so that the sampler's probability of it is counts[a] / N.
    """

    logits: torch.Tensor  # (actions,) of the policy, a leaf with gradient
    reference: torch.Tensor  # (actions,) log-probabilities
    actions: torch.Tensor  # (N,)
    batch: Batch

    def gradient(self, by_row: torch.Tensor) -> torch.Tensor:
        """(actions,) gradient by the logits, from that by the rows' log-probabilities (N, 1)."""
        chosen = self.logits.log_softmax(0)[self.actions]
        return torch.autograd.grad(chosen, self.logits, by_row.squeeze(1))[0]

    def kl_gradient(self, forward: bool) -> torch.Tensor:
        """(actions,) of KL(reference || policy) where `forward`, else of KL(policy || reference)."""
        p, q = self.logits.log_softmax(0), self.reference
        value = (q.exp() * (q - p)).sum() if forward else (p.exp() * (p - q)).sum()
        return torch.autograd.grad(value, self.logits)[0]


def enumerable(off_policy: bool = False) -> Enumerable:
    """A policy over five actions that sampled the rows itself, or has moved since it did."""
    source = torch.Generator().manual_seed(0)
    counts = torch.tensor([1, 2, 3, 4, 6])
    actions = torch.arange(5).repeat_interleave(counts)
    old = (counts / counts.sum()).double().log()
    moved, reference, rewards = (torch.randn(n, generator=source, dtype=torch.float64) for n in (5, 5, len(actions)))
    logits = (old + off_policy * 0.5 * moved).requires_grad_()
    reference = reference.log_softmax(0)
    rows = [values[actions].unsqueeze(1) for values in (logits.detach().log_softmax(0), old, reference)]
    batch = Batch(*rows, torch.ones(16, 1, dtype=torch.bool), rewards, torch.zeros(16, dtype=torch.int64), rewards)
    return Enumerable(logits, reference, actions, batch.rewarded(rewards))


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value; infinite where something is not a number."""
    if torch.equal(found, expected):
        return 0.0
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
    return math.inf if math.isnan(difference) else difference


def percent(share: float) -> str:
    """A relative difference in words."""
    if not math.isfinite(share):
        return "nan"
    if share >= 10:
        return f"{share:.2g} times its size"
    return f"{share:.0%}" if share >= 0.005 else f"{100 * share:.1g}%"


def exactly(share: float) -> str:
    """Whether nothing differed at all, as the end of a sentence."""
    return ", bit for bit" if share == 0 else ""


def within(settings: dict[str, object]) -> str:
    """Under which settings something was found, as the end of a sentence; nothing where there are none."""
    names = [value for value in settings.values() if isinstance(value, str)]
    return f" ({', '.join(names)})" if names else ""
