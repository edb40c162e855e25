"""How many threads of torch share one operator, and calls in threads of their own.

Threads that share the operators of a small model wait for each other longer than they compute; where another program
holds a core, they wait for the scheduler too, ten times as long. Small models compute with one thread each, on any
machine, so their numbers do not depend on how many cores it has.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager

import torch

SMALL = 100_000_000  # parameters


def computes_best_alone(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether these models, taken together, are on a CPU and so small that one thread computes them best."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return on_cpu and 0 < sum(parameter.numel() for parameter in parameters) < SMALL


@contextmanager
def fitting_threads(*modules: torch.nn.Module) -> Iterator[None]:
    """Compute with one thread where `computes_best_alone`; torch's setting is as it was afterwards."""
    before = torch.get_num_threads()
    if before > 1 and computes_best_alone(modules):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def started(function: Callable[..., object], *args: object, **options: object) -> Future:
    """The future of a call in a daemon thread: one that hangs lets the program end, unlike an executor's.

    Gradients and autocast, which torch keeps for each thread, are on or off as they are for the caller.
    """
    future, gradients = Future(), torch.is_grad_enabled()
    autocast = [kind for kind in ("cpu", "cuda", "mps") if torch.is_autocast_enabled(kind)]
    dtypes = {kind: torch.get_autocast_dtype(kind) for kind in autocast}

    def run() -> None:
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.set_grad_enabled(gradients))
                for kind, dtype in dtypes.items():
                    stack.enter_context(torch.autocast(kind, dtype))
                future.set_result(function(*args, **options))
        except BaseException as error:  # an interrupt too is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return future
