"""Seconds, memory and growth of sides that take turns, with intervals.

The sides alternate in one process (A B A B …), so that a slow moment of the machine falls on all of them, and a figure
is the median of the paired ratios. Intervals are bootstrap intervals of 95 %.
"""

import gc
import random
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

from benchmarks.speed.results import BenchmarkError, Figure
from grpo_kit.config.hardware import give_back_memory

CONFIDENCE = 0.95
RESAMPLES = 9999
CLOCKS = ("cpu", "wall")


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval of 95 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Seconds:
    """What one call took: processor seconds of all threads and finished child processes, and on the wall's clock."""

    cpu: float
    wall: float


Timings = dict[str, list[Seconds]]  # side → one entry a round


def timed(work: Callable[[], object]) -> Seconds:
    """Call `work` once, with the garbage of earlier calls collected."""
    gc.collect()
    wall, cpu = time.perf_counter(), processor_seconds()
    work()
    return Seconds(processor_seconds() - cpu, time.perf_counter() - wall)


def processor_seconds() -> float:
    """Processor seconds so far, of all threads of this process and of its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def alternate(
    sides: Mapping[str, Callable[[int], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    label: str = "",
    shuffled: bool = False,
) -> Timings:
    """Let the sides take turns: each is called with the round's number, and every one is timed in every round.

    Args:
        sides: name → what to do; both do the same work when given the same number.
        rounds: how many are kept.
        warm_up: rounds before them that are not kept; their numbers are negative.
        shuffled: another order in each round, for sides of different sizes: memory that a large one leaves behind
            spares the next one some page faults.
    """
    timings: Timings = {name: [] for name in sides}
    gc.collect()
    gc.freeze()  # what is there already need not be looked through again before each call
    for number in tqdm(range(-warm_up, rounds), desc=label, leave=False, disable=None):
        order = list(sides.items())
        if shuffled:
            random.Random(number).shuffle(order)
        for name, work in order:
            seconds = timed(lambda work=work, number=number: work(number))
            if number >= 0:
                timings[name].append(seconds)
    gc.unfreeze()
    return timings


def paired_ratios(slower: Sequence[Seconds], quicker: Sequence[Seconds], clock: str = "cpu") -> np.ndarray:
    """How many times as long one side took as the other, round by round: (rounds,)."""
    if len(slower) != len(quicker) or not slower:
        raise BenchmarkError(f"pairs: found {len(slower)} and {len(quicker)} rounds, both sides need the same ones")
    return np.array([getattr(a, clock) / getattr(b, clock) for a, b in zip(slower, quicker, strict=True)])


def median(values: Sequence[float]) -> Interval:
    """The median of some rounds."""
    return _bootstrapped((np.asarray(values, dtype=float),), lambda sample, axis=-1: np.median(sample, axis=axis))


def ratio_figure(
    title: str, slower: Sequence[Seconds], quicker: Sequence[Seconds], *goals: float | None, **options: object
) -> Figure:
    """The median ratio of two sides by both clocks, as a figure; goals are must and aim."""
    found, wall = (median(paired_ratios(slower, quicker, clock)) for clock in CLOCKS)
    return Figure(title, *vars(found).values(), *goals, wall=wall.value, **options)


def geometric_mean(cases: Sequence[np.ndarray]) -> Interval:
    """The geometric mean over cases of each case's median; rounds are resampled within their case."""

    def mean_of_medians(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.exp(np.mean([np.log(np.median(sample, axis=axis)) for sample in samples], axis=0))

    return _bootstrapped(tuple(np.asarray(case, dtype=float) for case in cases), mean_of_medians)


def exponent(sizes: Sequence[float], rounds: np.ndarray) -> Interval:
    """The power with which seconds grow: the slope of log seconds on log size by least squares.

    Args:
        sizes: (S,) sizes, growing.
        rounds: (R, S) seconds, one row a round, in which every size was measured once.

    Returns:
        The median of the rounds' slopes.
    """
    x = np.log(np.asarray(sizes, dtype=float))
    x = x - x.mean()
    return median(np.log(rounds) @ x / (x @ x))


def slope(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Growth a step by Theil and Sen's estimator, the median of all pairs' slopes: one odd value does not move it."""
    found = stats.theilslopes(values, np.arange(len(values)), alpha=confidence)
    return Interval(float(found.slope), float(found.low_slope), float(found.high_slope))


def _bootstrapped(samples: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray]) -> Interval:
    estimate = float(statistic(*samples))
    if min(len(sample) for sample in samples) < 2:
        return Interval(estimate, estimate, estimate)
    found = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=0
    ).confidence_interval
    return Interval(estimate, float(found.low), float(found.high))


def raw(timings: Timings) -> dict[str, dict[str, list[float]]]:
    """All rounds, for the record: side → clock → seconds."""
    return {
        name: {clock: [round(asdict(seconds)[clock], 6) for seconds in rounds] for clock in CLOCKS}
        for name, rounds in timings.items()
    }


# --- memory -----------------------------------------------------------------------------------------------------------


def resident_mb() -> float:
    """The memory that this process holds now, in MB, after what is free has been given back."""
    gc.collect()
    give_back_memory()
    return _status("VmRSS")


def peak_growth_mb(work: Callable[[], object]) -> float:
    """By how much the most memory held during `work` exceeds what was held before, in MB (Linux)."""
    before = resident_mb()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    work()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def in_fresh_process(work: Callable[..., object], *arguments: object) -> object:
    """What `work(*arguments)` returns in a process of its own, where nothing else has touched the memory."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()
