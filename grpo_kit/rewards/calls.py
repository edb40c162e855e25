"""Calling a slow reward: its batch split among threads, and a limit on the time that a call takes."""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack

import torch
from PIL import Image

from grpo_kit.rewards.protocol import Reward, RewardError, as_column


class InThreads:
    """A reward whose batch is split among threads; its numbers are the same, in the same order.

    For functions that wait (for a server, a disk) or compute outside of Python's lock. The reward must be thread-safe
    and score each image by itself; one that takes `group_ids` gets whole groups, or all at once where it gets none.
    """

    def __init__(self, reward: Reward, workers: int) -> None:
        if workers < 1:
            raise RewardError(f"workers: found {workers}, allowed: at least 1")
        self.reward, self.workers = reward, workers
        _look_like(self, reward)

    def __call__(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        enhanced_prompts: Sequence[str],
        **context: torch.Tensor | None,
    ) -> torch.Tensor:
        """(N,) float64 numbers; the first error of a part, once all parts have ended."""
        parts = list(_parts(len(images), self.workers, context))
        calls = []
        for rows in parts:
            columns = [[column[row] for row in rows] for column in (images, prompts, enhanced_prompts)]
            given = {name: None if values is None else values[rows] for name, values in context.items()}
            calls.append(started(self.reward, *columns, **given))
        wait(calls)
        result = torch.empty(len(images), dtype=torch.float64)
        for rows, call in zip(parts, calls, strict=True):
            result[rows] = as_column(call.result(), len(rows))
        return result


class WithTimeLimit:
    """A reward that fails where a call takes longer than `seconds`.

    The call runs in a thread. A thread cannot be stopped from outside: after the limit it goes on by itself, its result
    is thrown away, and it does not keep the program from ending. So the next call may run beside it.
    """

    def __init__(self, reward: Reward, seconds: float) -> None:
        if not seconds > 0:
            raise RewardError(f"seconds: found {seconds}, allowed: more than 0")
        self.reward, self.seconds = reward, seconds
        _look_like(self, reward)

    def __call__(self, *columns: Sequence, **context: torch.Tensor | None) -> object:
        """What the reward returns.

        Raises:
            RewardError: the limit is over.
        """
        call = started(self.reward, *columns, **context)
        try:
            return call.result(self.seconds)
        except TimeoutError:
            if call.done():  # the reward's own error
                raise
            raise RewardError(
                f"no answer within {self.seconds:g} s; its thread goes on, since it cannot be stopped"
            ) from None


def in_threads(reward: Reward, workers: int) -> InThreads:
    """A slow reward whose batch is split among `workers` threads (see `InThreads`); it must be thread-safe."""
    return InThreads(reward, workers)


def with_time_limit(reward: Reward, seconds: float) -> WithTimeLimit:
    """A reward that fails where a call takes longer than `seconds` (see `WithTimeLimit`)."""
    return WithTimeLimit(reward, seconds)


def _look_like(wrapper: object, reward: Reward) -> None:
    """Show the reward's own signature, so that it is handed what it asks for."""
    try:
        wrapper.__signature__ = inspect.signature(reward)
    except (TypeError, ValueError):  # a built-in, which has none
        wrapper.__signature__ = inspect.signature(lambda images, prompts, enhanced_prompts: None)


def started(function: Callable[..., object], *args: object, **options: object) -> Future:
    """The future of a call in a daemon thread: unlike an executor's, one that hangs lets the program end.

    Gradients and autocast are on or off as they are for the caller; torch keeps that for each thread.
    """
    future, enter_modes = Future(), _torch_modes()

    def run() -> None:
        try:
            with ExitStack() as stack:
                enter_modes(stack)
                future.set_result(function(*args, **options))
        except BaseException as error:  # an interrupt too is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return future


def _torch_modes() -> Callable[[ExitStack], None]:
    """What brings another thread into the modes of this one, until the stack is closed."""
    gradients = torch.is_grad_enabled()
    kinds = [kind for kind in ("cpu", "cuda", "mps") if torch.is_autocast_enabled(kind)]
    lower = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds]

    def enter(stack: ExitStack) -> None:
        stack.enter_context(torch.set_grad_enabled(gradients))
        for kind, dtype in lower:
            stack.enter_context(torch.autocast(kind, dtype))

    return enter


def _parts(count: int, workers: int, context: dict[str, torch.Tensor | None]) -> Iterator[list[int]]:
    """Rows for each thread: slices of the batch, or whole groups where the reward looks at groups."""
    if "group_ids" not in context:
        yield from (rows.tolist() for rows in torch.arange(count).chunk(workers))
    elif context["group_ids"] is None:
        yield list(range(count))
    else:
        ids = torch.as_tensor(context["group_ids"])
        yield from (torch.isin(ids, some).nonzero().flatten().tolist() for some in ids.unique().chunk(workers))
