"""How long operations take: speeds measured on this machine in a few seconds, or stated for a named accelerator.

An operation takes the time to start it, and the longer of computing and waiting for memory: the roofline model
(Williams et al., CACM 52(4), 2009). Speeds depend on size, so they are measured at several.
"""

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from psutil import virtual_memory
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_kit.config.hardware import choose_device, choose_dtype
from grpo_kit.preflight.plan.architectures import PlanError
from grpo_kit.preflight.plan.tracing import KINDS, Cost, cost_of

_SHARE = 0.4  # of a stated speed that whole models reach: a supposition, which the plan says
_SECONDS = 0.1  # that one speed is measured for
_BYTES = tuple(4**power for power in range(7, 15))  # 16 kB to 268 MB
_RUNTIME = 700e6  # bytes that CUDA and its libraries take beside the tensors
_OF_THE_HOST = 1 / 3  # of an Apple computer's memory, which macOS does not give to its GPU

Curve = tuple[tuple[float, float], ...]  # (size, speed), sizes growing
Clock = Callable[[], float]


def at(curve: Curve, size: float) -> float:
    """The speed at a size: between two sizes the logarithms lie on a line, beyond the last it stays."""
    sizes, speeds = zip(*curve, strict=True)
    return math.exp(np.interp(math.log(max(size, 1)), np.log(sizes), np.log(speeds)))


@dataclass(frozen=True)
class Speed:
    """What a device does in a second."""

    name: str
    source: str
    dtype: torch.dtype
    compute: Mapping[tuple[str, torch.dtype], Curve]  # kind, dtype → operations a second, by `Operation.rows`
    bandwidth: Curve  # bytes a second that are read or written, by the bytes of one operation
    start: float  # seconds before an operation begins
    memory: float  # bytes
    taken: float = 0.0  # bytes of them that the libraries take
    shares_host: bool = False  # its memory is the host's, so the pictures lie in it too

    def seconds(self, cost: Cost) -> float:
        """How long an amount of work takes."""
        total = 0.0
        for operation, times in cost.operations.items():
            rates = self.compute.get((operation.kind, operation.dtype))
            computing = operation.flops / at(rates, operation.rows) if rates else 0.0
            waiting = operation.moved / at(self.bandwidth, operation.moved)
            total += (self.start + max(computing, waiting)) * times
        return total


@dataclass(frozen=True)
class DataSheet:
    """What a maker states of an accelerator."""

    memory: float  # GB
    float32: float  # TFLOP/s, dense
    half: float  # TFLOP/s in bfloat16 (in float16 where there is none), dense, sums in float32
    bandwidth: float  # GB/s
    bfloat16: bool = True
    shares_host: bool = False


_SHEETS = json.loads(Path(__file__).with_name("accelerators.json").read_text(encoding="utf-8"))
ACCELERATORS = {name: DataSheet(**sheet) for name, sheet in _SHEETS.items()}


def speed_of(device: str, dtype: str, memory: float | None = None) -> Speed:
    """The speed of a named accelerator, as stated, or of a device of this machine, measured.

    Args:
        device: a name in `ACCELERATORS`, or auto, cpu, mps, cuda:N.
        dtype: of `model_settings.dtype`; "auto" is what the kit would take there.
        memory: bytes to plan for; None is what the device has.

    Raises:
        PlanError: neither.
        ConfigError: this machine has no such device.
    """
    if device == "auto" or device.split(":")[0] in ("cpu", "mps", "cuda"):
        return calibrate(device, dtype, memory)
    if device not in ACCELERATORS:
        allowed = ", ".join(("auto", "cpu", "mps", "cuda:N", *ACCELERATORS))
        raise PlanError(f"--device: found {device!r:.60}, allowed: {allowed}")
    sheet = ACCELERATORS[device]
    chosen = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if sheet.bfloat16 else torch.float32
    rates = {torch.float32: sheet.float32, torch.float16: sheet.half}
    rates[torch.bfloat16] = sheet.half if sheet.bfloat16 else sheet.float32 / 2  # emulated
    memory = memory or sheet.memory * 1e9
    return Speed(
        name=device,
        source=f"stated speed, of which {_SHARE:.0%} is supposed to be reached",
        dtype=chosen,
        compute={(kind, t): ((1, _SHARE * rate * 1e12),) for t, rate in rates.items() for kind in KINDS.values()},
        bandwidth=((1, 2 * _SHARE * sheet.bandwidth * 1e9),),
        start=1e-5,
        memory=memory,
        taken=memory * _OF_THE_HOST if sheet.shares_host else _RUNTIME,
        shares_host=sheet.shares_host,
    )


@torch.no_grad()
def calibrate(
    device: str = "auto", dtype: str = "auto", memory: float | None = None, clock: Clock = time.perf_counter
) -> Speed:
    """Measure the speeds of one device of this machine; some seconds.

    Args:
        clock: in seconds; `time.process_time` leaves out what other programs take of the processor.
    """
    chosen, _ = choose_device(device)
    kind, _ = choose_dtype(chosen, dtype)
    seconds = partial(_seconds, chosen, clock)
    compute: dict[tuple[str, torch.dtype], Curve] = defaultdict(tuple)
    for floating in {kind, torch.float32}:
        for name, size, flops, work in _timed_work(chosen, floating):
            compute[name, floating] += ((size, flops / seconds(work)),)
    bandwidth: Curve = ()
    for size in _BYTES:  # of a function of every value, which reads and writes each
        values = torch.randn(size // 8, device=chosen)
        bandwidth += ((size, size / seconds(partial(torch.ops.aten.silu.out, values, out=torch.empty_like(values)))),)
    own = torch.cuda.get_device_properties(chosen).total_memory if chosen.type == "cuda" else virtual_memory().total
    return Speed(
        name=str(chosen),
        source="measured on this machine",
        dtype=kind,
        compute=dict(compute),
        bandwidth=bandwidth,
        start=_start(chosen, seconds),
        memory=memory or own,
        taken=0.0 if chosen.type == "cpu" else _RUNTIME,
        shares_host=chosen.type != "cuda",
    )


def _timed_work(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, int, int, Callable[[], object]]]:
    """What is timed: its kind, its size as in `Speed.compute`, its floating-point operations, and the call."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    weights = [random(2048, 1024) for _ in range(32)]  # as large as a model's: a cache holds few of them
    for rows in (1, 4, 16, 64, 256, 1024):
        work = partial(_each, functional.linear, random(rows, 1024), weights)
        yield "matmul", rows, 2 * rows * 1024 * 2048 * len(weights), work
    kernels = [random(256, 256, 3, 3) for _ in range(4)]
    for side in (3, 6, 12, 24, 48, 96):
        work = partial(_each, partial(functional.conv2d, padding=1), random(2, 256, side, side), kernels)
        yield "conv", 2 * side**2, 2 * 2 * side**2 * 256**2 * 9 * len(kernels), work
    for tokens in (1, 8, 64, 256, 1024):
        queries, keys = (random(8, 8, count, 64) for count in (tokens, max(tokens, 64)))
        work = partial(functional.scaled_dot_product_attention, queries, keys, keys)
        yield "attention", tokens, 4 * queries.numel() * keys.shape[-2], work


def _each(function: Callable, given: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [function(given, weight) for weight in weights]


def _start(device: torch.device, seconds: Callable[[Callable[[], object]], float]) -> float:
    """Seconds for which an operation of a model's code occupies the program; this one computes next to nothing."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 16}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes)).to(device).eval()
    ids = torch.ones(1, 1, dtype=torch.long, device=device)
    operations = cost_of(lambda: model(ids)).operations
    return seconds(lambda: model(ids)) / sum(operations.values())


def _seconds(device: torch.device, clock: Clock, work: Callable[[], object]) -> float:
    """Seconds of one call, the median of several; the first only warms up."""
    taken: list[float] = []
    while sum(taken[1:]) < _SECONDS or len(taken) < 4:
        started = clock()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(clock() - started)
    return statistics.median(taken[1:])
