"""How many threads of torch share one operator.

Threads that share the operators of a small model wait for each other longer than they compute; where another program
holds a core, they wait for the scheduler too, ten times as long. Small models compute with one thread each, on any
machine, so their numbers do not depend on how many cores it has.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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
