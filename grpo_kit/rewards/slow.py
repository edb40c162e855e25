"""Slow rewards: a batch split among threads, and a limit on the time that a call takes."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from functools import wraps

import torch

from grpo_kit.config.threads import started
from grpo_kit.rewards.protocol import Reward, RewardError, as_answer, as_column, finished, some_rows


def in_threads(reward: Reward, workers: int) -> Reward:
    """A reward whose batch is split among threads; it gives the same numbers in the same order.

    For rewards that wait (for a server, a disk) or compute outside of Python's lock. The reward must be thread-safe and
    score each image by itself; one that takes `group_ids` gets whole groups, or all rows at once where they are None.
    The first error of a part is raised once all parts have ended.
    """
    if workers < 1:
        raise RewardError(f"workers: found {workers}, allowed: at least 1")

    @wraps(reward, updated=())
    def split(*columns: Sequence, **named: Sequence | None) -> object:
        count = len(next(values for values in (*columns, *named.values()) if values is not None))
        parts, calls = list(_parts(count, workers, named)), []
        for rows in parts:
            given = {name: some_rows(values, rows) for name, values in named.items()}
            calls.append(started(_answer, reward, *(some_rows(values, rows) for values in columns), **given))
        wait(calls)
        result = torch.empty(count, dtype=torch.float64)
        for rows, call in zip(parts, calls, strict=True):
            result[rows] = as_column(call.result(), len(rows))
        return as_answer(result)

    return split


def with_time_limit(reward: Reward, seconds: float) -> Reward:
    """A reward that fails with a `RewardError` where a call takes longer than `seconds`.

    The call runs in a thread, which cannot be stopped: after the limit it goes on, its result is thrown away, and it
    does not keep the program from ending. The next call may run beside it.
    """
    if not seconds > 0:
        raise RewardError(f"seconds: found {seconds}, allowed: more than 0")

    @wraps(reward, updated=())
    def limited(*columns: Sequence, **named: Sequence | None) -> object:
        call = started(_answer, reward, *columns, **named)
        try:
            return call.result(seconds)
        except TimeoutError:
            if call.done():  # the reward's own error
                raise
            raise RewardError(f"no answer within {seconds:g} s; its thread goes on: it cannot be stopped") from None

    return limited


def _answer(reward: Reward, *columns: Sequence, **named: Sequence | None) -> object:
    return finished(reward(*columns, **named))


def _parts(count: int, workers: int, context: Mapping[str, Sequence | None]) -> Iterator[list[int]]:
    """Rows for each thread: slices of the batch, or whole groups where the reward takes `group_ids`."""
    if "group_ids" not in context:
        yield from (rows.tolist() for rows in torch.arange(count).chunk(workers))
    elif context["group_ids"] is None:
        yield list(range(count))
    else:
        ids = torch.as_tensor(context["group_ids"])
        yield from (torch.isin(ids, some).nonzero().flatten().tolist() for some in ids.unique().chunk(workers))
