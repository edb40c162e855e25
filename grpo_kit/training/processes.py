"""One run in several processes: who does what, and how they come to know the same.

Processes share the prompts of an iteration by whole groups, and everything that is computed from rewards is computed
from all of them, in every process alike. accelerate starts the processes; DistributedDataParallel, or FSDP where the
launch asks for it, adds up their gradients.

How they are started and how they end is told in `launch.py`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch

from grpo_kit.config import Config, KitError
from grpo_kit.grpo.finite import full_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

    from grpo_kit.models.policy import Policy, Scores

Result = TypeVar("Result")


class ProcessError(KitError):
    """What ended all processes of a run: an error in one of them, or its death. Only the first of them tells it."""


def require_enough(prompts: int, processes: int) -> None:
    """Refuse more processes than an iteration has prompts: a group is not divided.

    Raises:
        ProcessError: there are more.
    """
    if prompts < processes:
        raise ProcessError(
            f"processes: found {processes}, allowed: at most {prompts}, one for each prompt of an iteration. Start "
            "fewer, or raise training_settings.prompts_per_iteration"
        )


def require_sharable(config: Config, processes: int) -> None:
    """Refuse what several processes cannot share: fewer prompts than they are, weights in 8 bits.

    Raises:
        ProcessError: the settings ask for that.
    """
    require_enough(config.training_settings.prompts_per_iteration, processes)
    if processes > 1 and config.model_settings.base_8bit:
        raise ProcessError(
            "model_settings.base_8bit: found true, allowed with one process: torchao's weights cannot be handed to "
            "others. Set false, or start one"
        )


class Processes:
    """This process alone: what each method is where nobody shares the work.

    `rank` is this process's place, `count` how many there are; the one with rank 0 writes all files.
    """

    rank, count = 0, 1
    sharded = False  # whether the weights are spread over the processes (FSDP)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, logs and validates."""
        return self.rank == 0

    def shards(self, items: int) -> list[range]:
        """Which of the items each process has: contiguous, as even as can be.

        Raises:
            ProcessError: there are fewer items than processes.
        """
        require_enough(items, self.count)
        bounds = [items * rank // self.count for rank in range(self.count + 1)]
        return [range(*pair) for pair in pairwise(bounds)]

    def gather(self, work: Callable[[], Result]) -> list[Result]:
        """What `work` gives in each process, in every process; where it fails in one, all raise."""
        return [work()]

    def gather_on_main(self, item: Result) -> list[Result | None]:
        """Each process's item in the main process; in the others only their own, and None for the rest."""
        return [item]

    def on_main(self, work: Callable[[], Result]) -> Result:
        """What `work` gives in the main process, in every process; where it fails there, all raise."""
        return work()

    def only_main(self, work: Callable[[], Result]) -> Result | None:
        """What `work` gives in the main process, None in the others; where it fails there, all raise."""
        return work()

    def prepare(self, policy: "Policy", optimizer: torch.optim.Optimizer) -> None:
        """Let the gradients of `score` be shared from now on; the optimizer keeps its state."""

    def scorer(self, policy: "Policy") -> "Policy":
        """What scores in training: its `score` gives numbers whose gradients are shared."""
        return policy

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around the scoring and backward pass of a micro-batch: gradients are shared after the last one."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradient; over all processes the gradients of their losses are summed."""
        loss.backward()

    def whole_policy(self) -> AbstractContextManager:
        """Around sampling: every process has all weights, so that one may run the policy more often than another."""
        return nullcontext()

    def full(self, state: dict) -> dict:
        """A state dict with every tensor whole; all processes have to ask."""
        return state


ALONE = Processes()


class _Scoring(torch.nn.Module):
    """The scoring of a policy as a module's forward pass, which is where DDP and FSDP come in."""

    def __init__(self, policy: "Policy") -> None:
        super().__init__()
        self.model = policy.model
        self._score = policy.score

    def forward(self, *columns: object, **options: object) -> "Scores":
        """As `Policy.score`."""
        return self._score(*columns, **options)


class _Scorer:
    """A prepared module under the name that a policy's scoring has."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def score(self, *columns: object, **options: object) -> "Scores":
        """As `Policy.score`."""
        return self.module(*columns, **options)


class Launched(Processes):
    """The processes that accelerate (or torchrun) started, this one among them."""

    def __init__(self, accelerator: "Accelerator") -> None:
        self.accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        self._module: torch.nn.Module | None = None
        self._shards: list[torch.nn.Module] = []

    # --- knowing the same ---------------------------------------------------------------------------------------------

    def gather(self, work: Callable[[], Result]) -> list[Result]:
        """As `Processes.gather`; results travel pickled, an error as its text."""
        result, error = _attempt(work)
        outcomes: list = [None] * self.count
        torch.distributed.all_gather_object(outcomes, (result, _told(error)))
        self._raise_failure([told for _, told in outcomes], error)
        return [result for result, _ in outcomes]

    def gather_on_main(self, item: Result) -> list[Result | None]:
        """As `Processes.gather_on_main`."""
        items: list = [None] * self.count
        torch.distributed.gather_object(item, items if self.is_main else None)
        items[self.rank] = item
        return items

    def on_main(self, work: Callable[[], Result]) -> Result:
        """As `Processes.on_main`; the result travels pickled."""
        result, error = _attempt(work) if self.is_main else (None, None)
        outcome = [(result, _told(error))]
        torch.distributed.broadcast_object_list(outcome)
        self._raise_failure([outcome[0][1]], error)
        return outcome[0][0]

    def only_main(self, work: Callable[[], Result]) -> Result | None:
        """As `Processes.only_main`; nothing travels but an error."""
        kept: list[Result] = []
        self.on_main(lambda: kept.append(work()))
        return kept[0] if kept else None

    def _raise_failure(self, told: list[str | None], own: Exception | None) -> None:
        """Raise where any process failed: an unforeseen error, with its traceback, only in the process that has it."""
        if own is not None and not isinstance(own, KitError):
            raise own
        for rank, text in enumerate(told):
            if text is not None:
                raise ProcessError(f"process {rank} of {self.count}: {text}" if rank else text) from own

    # --- one step -----------------------------------------------------------------------------------------------------

    def prepare(self, policy: "Policy", optimizer: torch.optim.Optimizer) -> None:
        """Wrap the policy's scoring for DDP, or spread its weights and the optimizer's state (FSDP)."""
        module = _Scoring(policy)
        if self.sharded:
            self._shards = _shard(module, policy, optimizer, self.count)
        else:
            module = self.accelerator.prepare_model(module)
        self._module = module

    def scorer(self, policy: "Policy") -> "Policy":
        """The prepared scoring."""
        return _Scorer(self._module)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """DDP waits for the last micro-batch; FSDP adds up after each, which needs less memory."""
        return nullcontext() if last or self.sharded else self._module.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        """DDP and FSDP take the mean over processes, the batch's gradient is the sum."""
        (loss * self.count).backward()

    @contextmanager
    def whole_policy(self) -> Iterator[None]:
        """Gather the spread weights, and spread them again."""
        for module in self._shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in self._shards:
                module.reshard()
                module.set_reshard_after_forward(True, recurse=False)

    def full(self, state: dict) -> dict:
        """As `Processes.full`, on the CPU where weights are spread."""
        return _mapped(state, lambda tensor: full_tensor(tensor).cpu()) if self.sharded else state


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # whatever it is, the other processes wait to hear of it
        return None, error


def _told(error: Exception | None) -> str | None:
    """An error as one line for the other processes."""
    if error is None or isinstance(error, KitError):
        return error and str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _shard(
    module: torch.nn.Module, policy: "Policy", optimizer: torch.optim.Optimizer, count: int
) -> list[torch.nn.Module]:
    """Spread a policy's weights and its optimizer's state over the processes, layer by layer (FSDP2).

    accelerate prepares FSDP only where there are accelerators; torch's own `fully_shard` is the same on a CPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    state = optimizer.state_dict()
    mesh = init_device_mesh(policy.device.type, (count,))
    kinds = set(getattr(policy.model, "_no_split_modules", None) or ())
    shards = [layer for layer in module.modules() if type(layer).__name__ in kinds] + [module]
    for layer in shards:
        fully_shard(layer, mesh=mesh)
    for group, names in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group["params"] = policy.trainable_parameters()[: len(names["params"])]
    optimizer.state.clear()
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    _settle(module, policy)
    return shards


@torch.no_grad()
def _settle(module: torch.nn.Module, policy: "Policy") -> None:
    """Run it once: FSDP takes the first module that runs for the outermost one, and sampling runs an inner one."""
    ids = torch.tensor([[policy.eos_token_ids[0]]])
    module(["a"], torch.zeros(1, dtype=torch.long), ids, torch.ones_like(ids, dtype=torch.bool))


def _mapped(state: object, change: Callable[[torch.Tensor], torch.Tensor]) -> object:
    """The same nested dict with every tensor changed."""
    if isinstance(state, dict):
        return {key: _mapped(value, change) for key, value in state.items()}
    return change(state) if isinstance(state, torch.Tensor) else state
