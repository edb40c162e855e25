"""One run in several processes: who does what, and how they come to know the same.

Processes share the prompts of an iteration by whole groups; what is computed from rewards is computed from all of them,
in every process alike. DistributedDataParallel, or FSDP where the launch asks for it, adds up their gradients.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.utils._pytree import tree_map_only

from grpo_kit.config import Config, KitError, one_line
from grpo_kit.grpo.finite import full_tensor
from grpo_kit.models.policy import Policy, Scores

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")


class ProcessError(KitError):
    """What ended all processes of a run: an error in one of them, or its death. Only the first of them tells it."""


def require_sharable(config: Config, processes: int) -> None:
    """A `ProcessError` for what several processes cannot share: fewer prompts than they are, weights in 8 bits."""
    prompts = config.training_settings.prompts_per_iteration
    if prompts < processes:  # a group is not divided
        raise ProcessError(
            f"processes: found {processes}, allowed: at most {prompts}, one for each prompt of an iteration. Start "
            "fewer, or raise training_settings.prompts_per_iteration"
        )
    if processes > 1 and config.model_settings.base_8bit:
        raise ProcessError(
            "model_settings.base_8bit: found true, allowed with one process: torchao's weights cannot be handed to "
            "others. Set false, or start one"
        )


class Processes:
    """The processes that an accelerator started, this one among them; without one, this process does all the work.

    `rank` is this process's place, `count` how many there are; the one with rank 0 writes all files. `sharded` says
    whether the weights are spread over them (FSDP).
    """

    def __init__(self, accelerator: "Accelerator | None" = None) -> None:
        self.accelerator, self.rank, self.count, self.sharded = accelerator, 0, 1, False
        if accelerator is not None:
            self.rank, self.count = accelerator.process_index, accelerator.num_processes
            self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        self._module: torch.nn.Module | None = None
        self._layers: list[torch.nn.Module] = []  # those whose weights are spread

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, logs and validates."""
        return self.rank == 0

    def shards(self, items: int) -> list[range]:
        """Which of the items each process has: contiguous, as even as can be; some have none where there are fewer."""
        bounds = [items * rank // self.count for rank in range(self.count + 1)]
        return [range(*pair) for pair in pairwise(bounds)]

    # --- knowing the same ---------------------------------------------------------------------------------------------

    def gather(self, work: Callable[[], Result]) -> list[Result]:
        """What `work` gives in each process, pickled, in every process; where it fails in one, all raise.

        An unforeseen error is raised, with its traceback, only in the process that has it.
        """
        if self.count == 1:
            return [work()]
        result, text, own = None, None, None
        try:
            result = work()
        except Exception as error:  # whatever it is, the other processes wait to hear of it
            foreseen, own = isinstance(error, KitError), error
            text = str(error) if foreseen else one_line(f"{type(error).__name__}: {error}", 300)
        outcomes: list = [None] * self.count
        torch.distributed.all_gather_object(outcomes, (result, text))
        if own is not None and not foreseen:
            raise own
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise ProcessError(f"process {rank} of {self.count}: {failure}" if rank else failure) from own
        return [result for result, _ in outcomes]

    def gather_on_main(self, item: Result) -> list[Result | None]:
        """Each process's item in the main process; in the others only their own, and None for the rest."""
        items: list = [None] * self.count
        if self.count > 1:
            torch.distributed.gather_object(item, items if self.is_main else None)
        items[self.rank] = item
        return items

    def on_main(self, work: Callable[[], Result]) -> Result:
        """What `work` gives in the main process, pickled, in every process; where it fails there, all raise."""
        return self.gather(lambda: work() if self.is_main else None)[0]

    def only_main(self, work: Callable[[], Result]) -> Result | None:
        """What `work` gives in the main process, None in the others; where it fails there, all raise."""
        kept: list[Result] = []
        self.on_main(lambda: kept.append(work()))
        return kept[0] if kept else None

    # --- one step -----------------------------------------------------------------------------------------------------

    def prepare(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Share the policy's gradients from now on (DDP), or its weights and the optimizer's state too (FSDP)."""
        if self.sharded:
            self._module, self._layers = policy, _shard(policy, optimizer, self.count)
        elif self.count > 1:
            self._module = self.accelerator.prepare_model(policy)

    def module(self, policy: Policy) -> Callable[..., Scores]:
        """The policy as it is to be called in training, so that its gradients are shared."""
        return policy if self._module is None else self._module

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around the scoring and backward pass of a micro-batch: DDP shares gradients after the last one alone.

        FSDP adds up after each, which needs less memory.
        """
        return nullcontext() if last or self.sharded or self.count == 1 else self._module.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradient: summed over all processes, of which DDP and FSDP take the mean."""
        (loss * self.count).backward()

    @contextmanager
    def whole_policy(self) -> Iterator[None]:
        """Around sampling: every process has all weights, so that one may run the policy more often than another."""
        for layer in self._layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        try:
            yield
        finally:
            for layer in self._layers:
                layer.reshard()
                layer.set_reshard_after_forward(True, recurse=False)

    def full(self, state: dict) -> dict:
        """A state dict with every tensor whole, on the CPU where weights are spread; all processes have to ask."""
        return tree_map_only(torch.Tensor, lambda part: full_tensor(part).cpu(), state) if self.sharded else state


ALONE = Processes()


def _shard(policy: Policy, optimizer: torch.optim.Optimizer, count: int) -> list[torch.nn.Module]:
    """Spread a policy's weights and its optimizer's state over the processes, layer by layer (FSDP2).

    accelerate prepares FSDP only where there are accelerators; torch's own `fully_shard` is the same on a CPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    state = optimizer.state_dict()
    mesh = init_device_mesh(policy.device.type, (count,))
    kinds = set(getattr(policy.model, "_no_split_modules", None) or ())
    policy.reference = copy.deepcopy(policy.reference)  # may share weights with the policy, which FSDP does not allow
    layers = [layer for layer in policy.modules() if type(layer).__name__ in kinds] + [policy]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    for group, names in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group["params"] = policy.trainable_parameters()[: len(names["params"])]
    optimizer.state.clear()
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    with torch.no_grad():  # FSDP takes the first module that runs for the outermost one, and sampling runs an inner one
        ids = torch.tensor([[policy.eos_token_ids[0]]])
        policy(["a"], torch.zeros(1, dtype=torch.long), ids, torch.ones_like(ids, dtype=torch.bool))
    return layers
