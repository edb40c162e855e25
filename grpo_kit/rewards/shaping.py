"""What becomes of a reward before it is weighted: clipped, scaled, and brought to a common unit."""

from dataclasses import dataclass

import torch

from grpo_kit.grpo.advantages import group_advantages
from grpo_kit.rewards.protocol import RewardError

_EPS = 1e-4  # added to a deviation, as TRL does
NORMALIZATIONS = ("none", "running", "group")


@dataclass(frozen=True)
class Shaping:
    """Clip, then scale, then normalise: less the mean, over the deviation."""

    normalize: str = "none"  # or "running": by all values seen so far; "group": by those of the same prompt
    clip: tuple[float, float] | None = None  # lowest and highest value, in the reward's own units
    scale: float = 1.0  # a factor, with almost no effect on a normalised reward

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZATIONS:
            raise RewardError(f"normalize: found {self.normalize!r}, allowed: {', '.join(NORMALIZATIONS)}")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise RewardError(f"clip: found {list(self.clip)}, allowed: [low, high] with low < high, or None")

    def bounded(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) values clipped and scaled, not yet normalised; the same tensor where there is nothing to do."""
        if self.clip is not None:
            values = values.clamp(*self.clip)
        return values if self.scale == 1 else values * self.scale


def within_groups(values: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """(N,) values less their group's mean, over its unbiased standard deviation + 1e-4; NaN stays NaN.

    Equal values give exactly 0, and so does the only scored one of its group. This is the normalisation of GDPO
    (arXiv 2601.05242) and of TRL's `multi_objective_aggregation="normalize_then_sum"`.
    """
    return group_advantages(values, group_ids, eps=_EPS).masked_fill(values.isnan(), torch.nan)


class RunningMoments:
    """Mean and variance of all values so far, as Welford's sums (in the batch form of Chan, Golub and LeVeque)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0  # squares: the sum of squared distances from the mean

    def update(self, values: torch.Tensor) -> None:
        """Take in (N,) values; NaN is left out."""
        kept = values[values.isfinite()].to(torch.float64)
        if not len(kept):
            return
        mean = float(kept.mean())
        squares = float((kept - mean).square().sum())
        total, distance = self.count + len(kept), mean - self.mean
        self.squares += squares + distance**2 * self.count * len(kept) / total
        self.mean += distance * len(kept) / total
        self.count = total

    def normalized(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) values less the mean so far, over the unbiased deviation so far + 1e-4; 0 while there is one value."""
        if self.count < 2:
            return values - self.mean
        return (values - self.mean) / ((self.squares / (self.count - 1)) ** 0.5 + _EPS)

    def state(self) -> torch.Tensor:
        """(3,) float64: count, mean, sum of squared distances."""
        return torch.tensor([self.count, self.mean, self.squares], dtype=torch.float64)

    def load(self, state: torch.Tensor) -> None:
        """Continue from what `state` gave."""
        self.count, self.mean, self.squares = state.tolist()
