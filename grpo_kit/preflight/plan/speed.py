"""How long operations take: speeds measured on this machine in a few seconds, or stated for a named accelerator.

An operation takes the longer of computing (its operations by the speed of its kind) and waiting for memory (bytes by
the bandwidth): the roofline model (Williams et al., CACM 52(4), 2009). Added is the time to start it. Speeds depend on
size, so they are measured at several.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_kit.config.hardware import choose_device, choose_dtype
from grpo_kit.preflight.plan.architectures import PlanError
from grpo_kit.preflight.plan.tracing import Cost, Operation, Trace

_SHARE = 0.4  # of a stated speed that whole models reach: a supposition, which the plan says
_KINDS = ("matmul", "conv", "attention")
_SECONDS = 0.1  # that one speed is measured for
_ROWS = (1, 4, 16, 64, 256, 1024)
_TOKENS = (1, 8, 64, 256, 1024)
_SIDES = (3, 6, 12, 24, 48, 96)
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
    """What a device does in a second.

    Args:
        compute: floating-point operations a second by (kind, dtype): matmul by its rows, conv by its places, attention
            by its queries.
        bandwidth: bytes a second that are read or written, by the bytes of one operation.
        start: seconds before an operation begins.
        memory: bytes of the device.
        taken: bytes of them that the libraries take.
        shares_host: its memory is the host's, so the pictures lie in it too.
    """

    name: str
    source: str
    dtype: torch.dtype
    compute: Mapping[tuple[str, torch.dtype], Curve]
    bandwidth: Curve
    start: float
    memory: float
    taken: float = 0.0
    shares_host: bool = False

    def seconds(self, cost: Cost) -> float:
        """How long an amount of work takes."""
        return sum(self._seconds(operation) * times for operation, times in cost.operations.items())

    def _seconds(self, operation: Operation) -> float:
        rates = self.compute.get((operation.kind, operation.dtype))
        computing = operation.flops / at(rates, operation.rows) if rates else 0.0
        waiting = operation.moved / at(self.bandwidth, operation.moved)
        return self.start + max(computing, waiting)


# --- named accelerators, by their makers' data sheets -----------------------------------------------------------------


@dataclass(frozen=True)
class _Stated:
    memory: float  # GB
    float32: float  # TFLOP/s, dense
    half: float  # TFLOP/s in bfloat16 (in float16 where there is none), dense, sums in float32
    bandwidth: float  # GB/s
    bfloat16: bool = True
    shares_host: bool = False


ACCELERATORS = {
    "t4": _Stated(16, 8.1, 65, 320, bfloat16=False),
    "l4": _Stated(24, 30.3, 121, 300),
    "a10": _Stated(24, 31.2, 125, 600),
    "rtx3090": _Stated(24, 35.6, 71, 936),
    "rtx4090": _Stated(24, 82.6, 165, 1008),
    "a100": _Stated(80, 19.5, 312, 2039),
    "h100": _Stated(80, 67, 989, 3350),
    "m1": _Stated(16, 2.6, 2.6, 68, bfloat16=False, shares_host=True),
    "m1-max": _Stated(32, 10.4, 10.4, 400, bfloat16=False, shares_host=True),
}


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
    if device in ACCELERATORS:
        return _stated(device, ACCELERATORS[device], dtype, memory)
    if device != "auto" and device.split(":")[0] not in ("cpu", "mps", "cuda"):
        allowed = ", ".join(("auto", "cpu", "mps", "cuda:N", *ACCELERATORS))
        raise PlanError(f"--device: found {device!r:.60}, allowed: {allowed}")
    return calibrate(device, dtype, memory)


def _stated(name: str, sheet: _Stated, dtype: str, memory: float | None) -> Speed:
    half = torch.bfloat16 if sheet.bfloat16 else torch.float16
    chosen = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
    rates = {torch.float32: sheet.float32, torch.bfloat16: sheet.half, torch.float16: sheet.half}
    if not sheet.bfloat16:
        rates[torch.bfloat16] = sheet.float32 / 2  # emulated
    return Speed(
        name=name,
        source=f"stated speed, of which {_SHARE:.0%} is supposed to be reached",
        dtype=chosen or (half if sheet.bfloat16 else torch.float32),
        compute={(kind, t): ((1, _SHARE * rate * 1e12),) for t, rate in rates.items() for kind in _KINDS},
        bandwidth=((1, 2 * _SHARE * sheet.bandwidth * 1e9),),
        start=1e-5,
        memory=memory or sheet.memory * 1e9,
        taken=(memory or sheet.memory * 1e9) * _OF_THE_HOST if sheet.shares_host else _RUNTIME,
        shares_host=sheet.shares_host,
    )


# --- calibration ------------------------------------------------------------------------------------------------------


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
    stopwatch = _Stopwatch(chosen, clock)
    compute = {}
    for floating in {kind, torch.float32}:
        compute["matmul", floating] = tuple((rows, _matmul(rows, floating, stopwatch)) for rows in _ROWS)
        compute["conv", floating] = tuple((2 * side**2, _conv(side, floating, stopwatch)) for side in _SIDES)
        compute["attention", floating] = tuple((tokens, _attention(tokens, floating, stopwatch)) for tokens in _TOKENS)
    return Speed(
        name=str(chosen),
        source="measured on this machine",
        dtype=kind,
        compute=compute,
        bandwidth=tuple((size, _bandwidth(size, stopwatch)) for size in _BYTES),
        start=_start(stopwatch),
        memory=memory or _memory(chosen),
        taken=0.0 if chosen.type == "cpu" else _RUNTIME,
        shares_host=chosen.type != "cuda",
    )


def _matmul(rows: int, dtype: torch.dtype, stopwatch: "_Stopwatch") -> float:
    """Floating-point operations a second of so many rows times weights as large as a model's: a cache holds few."""
    given = torch.randn(rows, 1024, device=stopwatch.device).to(dtype)
    weights = [torch.randn(2048, 1024, device=stopwatch.device).to(dtype) for _ in range(32)]
    seconds = stopwatch(lambda: [functional.linear(given, weight) for weight in weights])
    return 2 * rows * 1024 * 2048 * len(weights) / seconds


def _conv(side: int, dtype: torch.dtype, stopwatch: "_Stopwatch") -> float:
    """Floating-point operations a second of a convolution of two square maps."""
    pixels = torch.randn(2, 256, side, side, device=stopwatch.device).to(dtype)
    kernels = [torch.randn(256, 256, 3, 3, device=stopwatch.device).to(dtype) for _ in range(4)]
    seconds = stopwatch(lambda: [functional.conv2d(pixels, kernel, padding=1) for kernel in kernels])
    return 2 * 2 * side**2 * 256**2 * 9 * len(kernels) / seconds


def _attention(tokens: int, dtype: torch.dtype, stopwatch: "_Stopwatch") -> float:
    """Floating-point operations a second of so many queries that look at as many keys, or at 64."""
    queries, keys = (
        torch.randn(8, 8, count, 64, device=stopwatch.device).to(dtype) for count in (tokens, max(tokens, 64))
    )
    seconds = stopwatch(lambda: functional.scaled_dot_product_attention(queries, keys, keys))
    return 4 * queries.numel() * keys.shape[-2] / seconds


def _bandwidth(size: int, stopwatch: "_Stopwatch") -> float:
    """Bytes a second of a function of every value, which reads and writes `size` bytes in all."""
    values = torch.randn(size // 8, device=stopwatch.device)
    out = torch.empty_like(values)
    return size / stopwatch(lambda: torch.ops.aten.silu.out(values, out=out))


def _start(stopwatch: "_Stopwatch") -> float:
    """Seconds for which an operation of a model's code occupies the program; this one computes next to nothing."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 16}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes)).to(stopwatch.device).eval()
    ids = torch.ones(1, 1, dtype=torch.long, device=stopwatch.device)
    with Trace() as trace:
        model(ids)
    return stopwatch(lambda: model(ids)) / sum(trace.cost.operations.values())


@dataclass(frozen=True)
class _Stopwatch:
    """Seconds of one call, the median of several."""

    device: torch.device
    clock: Clock

    def __call__(self, work: Callable[[], object]) -> float:
        self._once(work)
        seconds: list[float] = []
        while sum(seconds) < _SECONDS or len(seconds) < 3:
            seconds.append(self._once(work))
        return statistics.median(seconds)

    def _once(self, work: Callable[[], object]) -> float:
        started = self.clock()
        work()
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return self.clock() - started


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
