"""Several rewards as one: each part kept raw, the total their weighted sum."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from grpo_kit.config import KitError

Reward = Callable[[Sequence[Image.Image], Sequence[str], Sequence[str]], object]  # → N numbers


class RewardError(KitError):
    """A reward that does not return what a reward must."""


@dataclass(frozen=True)
class Rewards:
    """Named rewards with weights, and monitors, which are scored and logged but never rewarded.

    Args:
        parts: name → reward; any callable `(images, prompts, enhanced_prompts) -> (N,)`.
        weights: name → weight in the total.
        monitors: name → reward, without weight.
    """

    parts: Mapping[str, Reward]
    weights: Mapping[str, float]
    monitors: Mapping[str, Reward] = field(default_factory=dict)

    def score(
        self, images: Sequence[Image.Image | None], prompts: Sequence[str], enhanced_prompts: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Each part and monitor, raw: {name: (N,) float64}, NaN where there is no image or the part could not score."""
        drawn = [i for i, image in enumerate(images) if image is not None]
        columns = [[values[i] for i in drawn] for values in (images, prompts, enhanced_prompts)]
        scores = {}
        for name, reward in {**self.parts, **self.monitors}.items():
            scores[name] = torch.full((len(images),), torch.nan, dtype=torch.float64)
            if drawn:
                scores[name][drawn] = _as_column(name, reward(*columns), len(drawn))
        return scores

    def total(self, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(N,) weighted sum of the parts; NaN where any weighted part is NaN."""
        return sum(self.weights[name] * scores[name] for name in self.parts)

    def __call__(
        self,
        images: Sequence[Image.Image | None],
        prompts: Sequence[str],
        enhanced_prompts: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """(N,) totals of images drawn for users' prompts."""
        return self.total(self.score(images, prompts, prompts if enhanced_prompts is None else enhanced_prompts))

    def calculate_reward(self, image: Image.Image, prompt: str, enhanced_prompt: str | None = None) -> float:
        """The total of one image for one user's prompt."""
        return float(self([image], [prompt], None if enhanced_prompt is None else [enhanced_prompt])[0])


def _as_column(name: str, values: object, count: int) -> torch.Tensor:
    try:
        column = torch.as_tensor(values).detach().cpu().to(torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"reward {name!r}: found {type(values).__name__}, {count} numbers are needed ({error})"
        ) from error
    if column.shape != (count,):
        raise RewardError(f"reward {name!r}: found shape {tuple(column.shape)}, needed ({count},): one number an image")
    return column.where(column.isfinite(), torch.nan)
