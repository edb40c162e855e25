"""What a reward is, what it may ask for and what it returns.

A reward is any callable `(images, prompts, enhanced_prompts) -> N numbers`, NaN where it cannot score. One whose
signature also names `group_ids` (which prompt a row belongs to) or `image_seeds` (the latent seed of its image) is
given those by keyword, as (N,) int64 tensors.
"""

import inspect
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from grpo_kit.config import KitError, one_line

Images = Sequence[Image.Image]  # N; images that came out unusable are left out before a reward is called
Texts = Sequence[str]  # N
Reward = Callable[..., object]  # (images, prompts, enhanced_prompts[, group_ids=…][, image_seeds=…]) → N numbers
CONTEXT = ("group_ids", "image_seeds")
LARGEST = torch.finfo(torch.float32).max  # the step computes in float32, where a larger number is infinite


class RewardError(KitError):
    """A reward that fails, or does not return what a reward must."""


def context_of(reward: Reward) -> tuple[str, ...]:
    """Which of `group_ids` and `image_seeds` a reward's signature names."""
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):  # a built-in without a signature
        return ()
    return tuple(name for name in CONTEXT if name in parameters)


def as_column(values: object, count: int) -> torch.Tensor:
    """What a reward returned as (count,) float64, NaN where a number is not finite in float32.

    Raises:
        RewardError: it is no column of `count` numbers.
    """
    try:
        column = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise RewardError(f"found {type(values).__name__}, {count} numbers are needed ({one_line(error)})") from error
    if column.is_complex():
        raise RewardError(f"found complex numbers, {count} real ones are needed")
    if column.shape != (count,):
        raise RewardError(f"found shape {tuple(column.shape)}, needed ({count},): one number an image")
    column = column.to(torch.float64)
    return column.where(column.abs() <= LARGEST, torch.nan)


def failed_reward(name: str, error: Exception) -> RewardError:
    """One line for a reward that failed: which, how, and in which line of code."""
    if isinstance(error, RewardError):
        return RewardError(f"reward {name!r}: {error}")
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return RewardError(
        f"reward {name!r}: {one_line(f'{type(error).__name__}: {error}', 300)}{place}; correct it, or set "
        "training_settings.on_bad_reward to drop_sample or drop_group, which go on without its numbers"
    )
