"""One run in several processes: who does what, and how they come to know the same.

Processes share the prompts of an iteration by whole groups, and everything that is computed from rewards is computed
from all of them, in every process alike. accelerate starts the processes; DistributedDataParallel, or FSDP where the
launch asks for it, adds up their gradients.

How they are started and how they end is told in `launch.py`.
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, TypeVar, Unpack

import torch

from grpo_kit.config import Config, KitError, one_line
from grpo_kit.config.prompts import Prompt
from grpo_kit.grpo.finite import full_tensor
from grpo_kit.models.generator import Generator
from grpo_kit.models.policy import Policy, Scores
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rollout import Rollout, SampleOptions, Samples, collect_rollout, collect_samples, joined, with_rewards

if TYPE_CHECKING:
    from accelerate import Accelerator

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


def _shards(items: int, count: int) -> list[range]:
    bounds = [items * rank // count for rank in range(count + 1)]
    return [range(*pair) for pair in pairwise(bounds)]


class Processes:
    """The single-process implementation: this process does all the work.

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
        return _shards(items, self.count)

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

    def prepare(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Let the gradients of the policy be shared from now on; the optimizer keeps its state."""

    def module(self, policy: Policy) -> Callable[..., Scores]:
        """The policy as it is to be called in training, so that its gradients are shared."""
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
        result, text, error = _attempt(work)
        outcomes: list = [None] * self.count
        torch.distributed.all_gather_object(outcomes, (result, text))
        self._raise_failure([text for _, text in outcomes], error)
        return [result for result, _ in outcomes]

    def gather_on_main(self, item: Result) -> list[Result | None]:
        """As `Processes.gather_on_main`."""
        items: list = [None] * self.count
        torch.distributed.gather_object(item, items if self.is_main else None)
        items[self.rank] = item
        return items

    def on_main(self, work: Callable[[], Result]) -> Result:
        """As `Processes.on_main`; the result travels pickled."""
        result, text, error = _attempt(work) if self.is_main else (None, None, None)
        outcome = [(result, text)]
        torch.distributed.broadcast_object_list(outcome)
        self._raise_failure([outcome[0][1]], error)
        return outcome[0][0]

    def only_main(self, work: Callable[[], Result]) -> Result | None:
        """As `Processes.only_main`; nothing travels but an error."""
        kept: list[Result] = []
        self.on_main(lambda: kept.append(work()))
        return kept[0] if kept else None

    def _raise_failure(self, failures: list[str | None], own: Exception | None) -> None:
        """Raise where any process failed: an unforeseen error, with its traceback, only in the process that has it."""
        if own is not None and not isinstance(own, KitError):
            raise own
        for rank, text in enumerate(failures):
            if text is not None:
                raise ProcessError(f"process {rank} of {self.count}: {text}" if rank else text) from own

    # --- one step -----------------------------------------------------------------------------------------------------

    def prepare(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Wrap the policy for DDP, or spread its weights and the optimizer's state (FSDP)."""
        self._module = policy if self.sharded else self.accelerator.prepare_model(policy)
        if self.sharded:
            self._shards = _shard(policy, optimizer, self.count)

    def module(self, policy: Policy) -> Callable[..., Scores]:
        """As prepared."""
        return self._module

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


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, str | None, Exception | None]:
    """What `work` gives, or its error: as one line for the other processes, and itself."""
    try:
        return work(), None, None
    except Exception as error:  # whatever it is, the other processes wait to hear of it
        foreseen = isinstance(error, KitError)
        return None, str(error) if foreseen else one_line(f"{type(error).__name__}: {error}", 300), error


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
    shards = [layer for layer in policy.modules() if type(layer).__name__ in kinds] + [policy]
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
    with torch.no_grad():  # FSDP takes the first module that runs for the outermost one, and sampling runs an inner one
        ids = torch.tensor([[policy.eos_token_ids[0]]])
        policy(["a"], torch.zeros(1, dtype=torch.long), ids, torch.ones_like(ids, dtype=torch.bool))
    return shards


def _mapped(state: object, change: Callable[[torch.Tensor], torch.Tensor]) -> object:
    """The same nested dict with every tensor changed."""
    if isinstance(state, dict):
        return {key: _mapped(value, change) for key, value in state.items()}
    return change(state) if isinstance(state, torch.Tensor) else state


# --- a rollout that processes share -----------------------------------------------------------------------------------


def collect_shared_rollout(
    processes: Processes,
    policy: Policy,
    generator: Generator,
    rewards: Rewards,
    prompts: Sequence[Prompt],
    num_generations: int,
    seed: int,
    truncation_penalty: float = 0.0,
    **options: Unpack[SampleOptions],
) -> Rollout:
    """`collect_rollout` by several processes, each of which collects some groups and then has all of them.

    Only the main process has all pictures. Where there are fewer prompts than processes, some collect nothing.

    Raises:
        ProcessError: one of them failed.
    """
    if processes.count == 1:
        return collect_rollout(
            policy, generator, rewards, prompts, num_generations, seed, truncation_penalty, **options
        )
    shard = _shards(len(prompts), processes.count)[processes.rank]
    own: list[Samples] = []

    def without_pictures() -> Samples | None:
        if not shard:
            return None
        share, first = prompts[shard.start : shard.stop], shard.start
        samples = collect_samples(
            policy, generator, rewards, share, num_generations, seed, first_prompt=first, **options
        )
        own.append(samples)
        return replace(samples, images=[], encoded=None)

    gathered = processes.gather(without_pictures)
    shares = [share for share in gathered if share is not None]
    pictures = processes.gather_on_main(own[0].images if own else [])
    nothing = [None] * shares[0].image_seeds.shape[1]
    images = [
        found or [nothing] * len(share.group_ids)
        for found, share in zip(pictures, gathered, strict=True)
        if share is not None
    ]
    both = joined(shares, policy.tokenizer.pad_token_id)
    seconds = own[0].seconds if own else {}
    return with_rewards(replace(both, images=list(chain(*images)), seconds=seconds), rewards, truncation_penalty)
