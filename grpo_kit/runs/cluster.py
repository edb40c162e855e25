"""Grids past one machine: each trial is a task of a Ray cluster, https://docs.ray.io (the extra `ray`).

Ray decides where a trial runs, by the CPUs and GPUs that it takes. Every machine has to see the grid's folder, and the
kit with its notebooks, at the same path. A trial that fails by its own doing (a cell's error, a cell that takes too
long) would fail again; one that dies (its kernel, its worker, its machine) is started again, and its training goes on.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import grpo_kit
from grpo_kit.config import one_line, printable
from grpo_kit.runs.grid import GridError, PlannedTrial, TrialResult, run_trial

if TYPE_CHECKING:
    from ray import ObjectRef

LOCAL = "local"  # an address: a cluster of this machine alone, which ends with the command
RETRIES = 2  # how often a trial that died is started again
_LOCAL_STORE = 100_000_000  # bytes; trials and their results are small, and Ray would take a third of the memory
_STARTS = 3  # Ray gives a part of it 15 s to start, which a busy machine can exceed: ray-project/ray issue 65983
_PROBE_SECONDS = 120  # how long a machine may take to start a worker
_CANCEL_SECONDS = 20  # how long a trial may take to end its kernel


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, what a trial takes of it as Ray counts it, and how many trials run at once."""

    address: str = LOCAL  # or what `ray.init` takes: `auto`, `host:port`
    cpus: float = 1.0  # of a trial; a share of one is fine
    gpus: float = 0.0  # of a trial; with 0 it sees none
    workers: int | None = None  # trials at once; None: as many as there is room for


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[str]:
    """Connect to a Ray cluster, or start one of this machine; yield what it has; a `GridError` where there is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics to Ray's makers
    try:
        import ray
    except ImportError:
        raise GridError("--ray: Ray is not installed. Install it: pip install 'ray>=2.60,<3'") from None
    try:
        _connect(ray, cluster)
        has = ray.cluster_resources()
        machines = sum(name.startswith("node:") and "__internal" not in name for name in has)
        room = f"{machines} machine{'s' * (machines != 1)}, {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs"
        yield f"Ray: {room}; a trial takes {cluster.cpus:g} and {cluster.gpus:g} (--cpus, --gpus)"
    finally:
        ray.shutdown()


def _connect(ray: ModuleType, cluster: Cluster) -> None:
    """Call `ray.init`, a local cluster's more than once; keep what this process does on SIGTERM, which Ray replaces."""
    options: dict[str, object] = {"address": cluster.address, "log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address == LOCAL:
        options |= {"include_dashboard": False, "object_store_memory": _LOCAL_STORE}
        options |= {} if cluster.workers is None else {"num_cpus": max(1, math.ceil(cluster.workers * cluster.cpus))}
    before = signal.getsignal(signal.SIGTERM)
    for left in reversed(range(_STARTS if cluster.address == LOCAL else 1)):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises many, its bare Exception among them
            ray.shutdown()
            if not left:
                what = f"--ray {cluster.address!r:.100}: no cluster there ({_text(error)})"
                raise GridError(f"{what}. Start one (ray start --head) and give its host:port, or {LOCAL}") from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def probe_file(folder: Path) -> Iterator[Path]:
    """Keep a file of a random name, with the kit's version, in a grid's folder: who finds it sees that very folder."""
    probe = Path(folder).resolve() / f".seen-{secrets.token_hex(16)}"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.write_text(grpo_kit.__version__, encoding="utf-8")
    try:
        yield probe
    finally:
        probe.unlink(missing_ok=True)


def check_machines(cluster: Cluster, probe: Path, notebooks: Sequence[Path]) -> None:
    """A `GridError` where no machine has what a trial takes, or one sees another folder, or other notebooks."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive, takes = [node for node in ray.nodes() if node["Alive"]], {"CPU": cluster.cpus, "GPU": cluster.gpus}
    able = [node for node in alive if all(node["Resources"].get(name, 0) >= count for name, count in takes.items())]
    if not able:
        most = {name: max(node["Resources"].get(name, 0) for node in alive) for name in takes}
        asked = f"--cpus {cluster.cpus:g}, --gpus {cluster.gpus:g}: no machine of the cluster has that for one trial"
        raise GridError(f"{asked}, allowed: up to {most['CPU']:g} CPUs, {most['GPU']:g} GPUs. Ask for less")
    task = ray.remote(num_cpus=0, max_retries=RETRIES)(check_here)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in able]
    answers = [task.options(scheduling_strategy=place).remote(probe, notebooks) for place in places]
    for node, answer in zip(able, answers, strict=True):
        try:
            ray.get(answer, timeout=_PROBE_SECONDS)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error  # what the task raised, in place of Ray's account of it
            if isinstance(cause, GridError):
                raise cause from None
            here = f"Ray's machine {node['NodeManagerHostname']}"
            raise GridError(f"{here}: cannot run a trial ({_text(cause)}). Install the kit there, as here") from None


def check_here(probe: Path, notebooks: Sequence[Path]) -> None:
    """Raise a `GridError` where this machine does not see the grid's folder and notebooks, or has another version."""
    here, shared = f"Ray's machine {socket.gethostname()}", "on a disk that all machines share, at the same path"
    if not probe.is_file():
        raise GridError(f"{here}: does not see the grid's folder {probe.parent}. Give --run-dir a folder {shared}")
    if absent := [path for path in notebooks if not path.is_file()]:
        raise GridError(f"{here}: has no {absent[0]}. Put the kit {shared}")
    if (version := probe.read_text(encoding="utf-8")) != (own := grpo_kit.__version__):
        raise GridError(f"{here}: has grpo_kit {own}, allowed: {version}, as here. Install that there")


def run_trials_on_ray(
    trials: Sequence[PlannedTrial], probe: Path, cluster: Cluster, minutes_per_cell: float = 60.0
) -> Iterator[TrialResult]:
    """Run trials on the connected cluster and yield each result when it is there; closed early, it cancels the rest."""
    import ray

    task = ray.remote(max_retries=0, num_cpus=cluster.cpus, num_gpus=cluster.gpus)(_run_here)
    waiting = deque((trial, 0) for trial in trials)  # with how often it has died
    running: dict[ObjectRef, tuple[PlannedTrial, int]] = {}

    def fill() -> None:
        while waiting and len(running) < (cluster.workers or len(trials)):
            trial, died = waiting.popleft()
            running[task.remote(trial, minutes_per_cell, probe)] = trial, died

    try:
        fill()
        while running:
            (ready,), _ = ray.wait(list(running))
            trial, died = running.pop(ready)
            result, death = _outcome(ready, trial)
            again = death is not None and died < RETRIES
            if again:
                waiting.appendleft((trial, died + 1))
                print(f"      {trial.name} is started again: {death}", file=sys.stderr, flush=True)
            fill()  # before what is done with a result takes its time
            if not again:
                yield result
    finally:
        for ref in running:  # interrupted, each trial ends its kernel and says in its notebook that it was stopped
            ray.cancel(ref)
        if running:
            _, unresponsive = ray.wait(list(running), num_returns=len(running), timeout=_CANCEL_SECONDS)
            for ref in unresponsive:
                ray.cancel(ref, force=True)  # its worker ends, and the kernel with it


def _run_here(trial: PlannedTrial, minutes_per_cell: float, probe: Path) -> TrialResult:
    """What a worker does; the check is for a machine that came to the cluster later."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # how Ray cancels; a cluster of a script ignores it
    check_here(probe, [notebook.path for notebook in trial.notebooks])
    return run_trial(trial, minutes_per_cell)


def _outcome(ready: ObjectRef, trial: PlannedTrial) -> tuple[TrialResult, str | None]:
    """A trial's result, and what it died of, where it did not end by its own doing."""
    import ray

    try:
        result = ray.get(ready)
        return result, result.error if any(notebook.died for notebook in result.ran) else None
    except ray.exceptions.RayTaskError as error:  # raised by the task's own code
        if isinstance(error.cause, GridError):  # of its machine: all other trials would meet it too
            raise error.cause from None
        failure = f"{type(error.cause).__name__}: {_text(error.cause)}"
        return TrialResult(trial.name, trial.folder, (), failure), None
    except ray.exceptions.RayError as error:  # a worker, a machine or the network
        death = f"its worker died: {_text(error)}"
        return TrialResult(trial.name, trial.folder, (), death), death


def _text(error: BaseException) -> str:
    return printable(one_line(error))
