"""What a reward is, what it may ask for and what it returns.

A reward is any callable `(images, prompts, enhanced_prompts) -> N numbers`, NaN where it cannot score, None where it
abstains: the row (or, for None alone, every row) is none of its business. It may be a coroutine function. What its
signature names beside these it is given by keyword: `group_ids` (which prompt a row belongs to) and `image_seeds` (the
latent seed of its image), (N,) int64 tensors; `metadata`, N dicts with the further fields of a row's prompt; and
`references`, N lists of the row's own pictures, None where it has none. TRL's signature
`(prompts, completions, **kwargs)` works too: completions are the enhanced prompts, and the fields of the prompts come
as N values each.
"""

import asyncio
import inspect
import math
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from grpo_kit.config import KitError, one_line, shown

Images = Sequence[Image.Image]  # N; images that came out unusable are left out before a reward is called
Texts = Sequence[str]  # N
References = Sequence[Sequence[Image.Image] | None]  # N: the rows' own pictures
Reward = Callable[..., object]  # (images, prompts, enhanced_prompts[, what of CONTEXT it names]) → N numbers
COLUMNS = ("images", "prompts", "enhanced_prompts")
CONTEXT = ("group_ids", "image_seeds", "metadata", "references")
WANTED = (
    f"(images, prompts, enhanced_prompts) with any of {', '.join(CONTEXT)}, or TRL's (prompts, completions, **kwargs); "
    "it returns one number an image, NaN where it cannot score, None where it abstains"
)
LARGEST = torch.finfo(torch.float32).max  # the step computes in float32, where a larger number is infinite
ABSTAINED = math.inf  # in a column of scores: none of the reward's business


class RewardError(KitError):
    """A reward that fails, or does not return what a reward must."""


class RewardContractError(RewardError):
    """A reward that cannot be called as rewards are, or returns something else than N numbers."""


# --- calling it -------------------------------------------------------------------------------------------------------


def context_of(reward: Reward) -> tuple[str, ...]:
    """What of `CONTEXT` a reward's signature names."""
    signature = _signature(reward)
    return tuple(name for name in CONTEXT if signature and name in signature.parameters)


def call(reward: Reward, batch: Mapping[str, Any]) -> object:
    """What a reward answers to a batch, handed what its signature names; a coroutine is run to its end.

    Args:
        batch: N values each of `COLUMNS` and `CONTEXT`; None for a tensor that is not known.
    """
    columns, named = _arguments(reward, batch)
    return finished(reward(*columns, **named))


def some_rows(values: Sequence | torch.Tensor | None, rows: list[int]) -> Any:
    """The values at some rows of a batch, in a list or a tensor like the given one; None where there are none."""
    if values is None or isinstance(values, torch.Tensor):
        return None if values is None else values[rows]
    return [values[row] for row in rows]


def text_of(fields: Mapping[str, Any], name: str) -> str | None:
    """A text in a row's metadata, None where the row has none; `RewardError` for anything else."""
    value = fields.get(name)
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise RewardError(f"metadata {name}: found {shown(value)}, allowed: text. Correct the prompt's row")
    return value


def require_callable(name: str, reward: Reward) -> None:
    """Refuse, without calling it, what cannot be called as rewards are: `RewardContractError` with both signatures."""
    if not callable(reward):
        raise RewardContractError(f"reward {name!r}: found {type(reward).__name__}, needed: a function {WANTED}")
    signature = _signature(reward)
    if signature is None or "completions" in signature.parameters:  # TRL's, whose fields depend on the prompts
        return
    columns, named = _arguments(reward, dict.fromkeys((*COLUMNS, *CONTEXT)))
    try:
        signature.bind(*columns, **named)
    except TypeError as error:
        found = f"found the signature {signature} ({error})"
        raise RewardContractError(f"reward {name!r}: {found}, needed: {WANTED}") from None


def _signature(reward: Reward) -> inspect.Signature | None:
    try:
        return inspect.signature(reward)
    except (TypeError, ValueError):  # a built-in without a signature
        return None


def _arguments(reward: Reward, batch: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """What a reward is called with, by place and by name."""
    signature = _signature(reward)
    parameters = list(signature.parameters.values()) if signature else []
    kinds = {one.kind for one in parameters}
    names = [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    required = [one.name for one in parameters if one.name in names and one.default is one.empty]
    if "completions" in names:
        keys = dict.fromkeys(key for row in batch["metadata"] for key in row)
        fields = {key: [row.get(key) for row in batch["metadata"]] for key in keys}
        given = {**fields, **batch, "completions": batch["enhanced_prompts"]}
        if absent := [name for name in required if name not in given]:
            raise RewardContractError(f"found no prompt with the field {absent[0]!r}, which its signature asks for")
        wanted = given if inspect.Parameter.VAR_KEYWORD in kinds else names
        return [], {name: given[name] for name in wanted if name in given}
    in_place = names[:3] == [*COLUMNS] or inspect.Parameter.VAR_POSITIONAL in kinds
    if required and not in_place and batch.keys() >= set(required):  # such as (images, prompts, metadata)
        return [], {name: batch[name] for name in names if name in batch}
    return [batch[name] for name in COLUMNS], {name: batch[name] for name in CONTEXT if name in names}


def finished(answer: object) -> object:
    """An answer, awaited where it is a coroutine: also under a notebook's running loop, and always in the same one."""
    if not inspect.isawaitable(answer):
        return answer

    async def wait() -> object:
        return await answer

    running = asyncio.run_coroutine_threadsafe(wait(), _event_loop())
    try:
        return running.result()
    finally:
        running.cancel()  # where an interrupt came


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


# --- what it returns --------------------------------------------------------------------------------------------------


def as_column(values: object, count: int) -> torch.Tensor:
    """What a reward returned, N numbers or (N, 1), as (count,) float64; `RewardContractError` for anything else.

    NaN where a number is not finite in float32, `ABSTAINED` for None.
    """
    rows = [None] * count if values is None else values
    try:
        if not isinstance(rows, torch.Tensor) and hasattr(rows, "__array__"):
            rows = np.array(rows)
        is_plain = isinstance(rows, list | tuple) or getattr(rows, "dtype", None) == np.dtype(object)
        rows = list(rows) if is_plain else rows
        abstained = [row is None for row in rows] if is_plain else []
        if any(abstained):
            rows = [math.nan if row is None else row for row in rows]
        column = torch.as_tensor(rows).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise RewardContractError(
            f"found {type(values).__name__}, {count} numbers are needed ({one_line(error)})"
        ) from error
    if column.is_complex():
        raise RewardContractError(f"found complex numbers, {count} real ones are needed")
    if column.shape == (count, 1):
        column = column[:, 0]
    if column.shape != (count,):
        raise RewardContractError(f"found shape {tuple(column.shape)}, needed ({count},): one number an image")
    column = column.to(torch.float64)
    column = column.where(column.abs() <= LARGEST, torch.nan)
    return column.masked_fill(torch.tensor(abstained), ABSTAINED) if any(abstained) else column


def as_answer(column: torch.Tensor) -> torch.Tensor | list[float | None]:
    """A column as a reward may return it: one that calls another passes on where that abstained."""
    values = column.tolist()
    return [None if value == ABSTAINED else value for value in values] if ABSTAINED in values else column


def failed_reward(name: str, error: Exception) -> RewardError:
    """One line for a reward that failed: which, how, and in which line of code."""
    if type(error) is RewardContractError:
        return RewardContractError(f"reward {name!r}: {error}. A reward is a function {WANTED}")
    if isinstance(error, RewardError):
        return RewardError(f"reward {name!r}: {error}")
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return RewardError(
        f"reward {name!r}: {one_line(f'{type(error).__name__}: {error}', 300)}{place}; correct it, or set "
        "training_settings.on_bad_reward to drop_sample or drop_group, which go on without its numbers"
    )
