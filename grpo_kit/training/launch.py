"""How the processes of one run are started, and how they end together.

A collective has no useful time limit: a slow generator would break a short one, and a long one leaves the others
waiting. So there is practically none; instead every process watches the others of its machine by their process ids.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import torch

from grpo_kit.config import Config, KitError
from grpo_kit.runs.disk_errors import commit_status
from grpo_kit.training.processes import ALONE, Launched, ProcessError, Processes, require_sharable

_PATIENCE = timedelta(days=7)  # of a collective
_LOOK_EVERY = 0.5  # seconds between two looks at the other processes
_TO_UNWIND = 5.0  # seconds that a process has to end by itself once another one is gone
_TOLD_BY_LAUNCHER = "GRPO_KIT_LAUNCHER"  # set where `launch` started the processes and tells of a lost one itself


# --- in each process --------------------------------------------------------------------------------------------------


@contextmanager
def joined(config: Config, run_dir: Path) -> Iterator[Processes]:
    """The processes that this one was started with: `ALONE`, or those of `accelerate launch`, until all are done.

    Where one of them fails or dies, all end, and one line says which, what is committed and how to go on.

    Args:
        config: the run's; on the device "cpu" processes talk by gloo.
        run_dir: the run's folder.

    Raises:
        ProcessError: another process has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield ALONE
        return
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # a vision tower
    settings = config.model_settings
    for setting in ("device", "generator_device", "reward_device"):
        if (named := getattr(settings, setting) or "").startswith("cuda:"):
            raise ProcessError(
                f"model_settings.{setting}: found {named}, which several processes cannot share. Set auto"
            )
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    handlers = [InitProcessGroupKwargs(timeout=_PATIENCE), unused]
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
    processes = Launched(accelerator)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # by which the launcher ends what is left
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if not processes.is_main:
        _warn_only(processes.rank)
    with _Peers(processes, run_dir).watched():
        yield processes
        accelerator.wait_for_everyone()
    accelerator.end_training()


def _warn_only(rank: int) -> None:
    """The main process logs; of the others only warnings are shown, such as that of a reward which failed there."""
    screen = logging.StreamHandler()
    screen.setFormatter(logging.Formatter(f"process {rank}: %(message)s"))
    screen.setLevel(logging.WARNING)
    logger = logging.getLogger("grpo_kit")
    logger.addHandler(screen)
    logger.propagate = False


class _Peers:
    """The other processes of a run: which of them are gone, and what to say of it."""

    def __init__(self, processes: Processes, run_dir: Path) -> None:
        from torch.distributed.distributed_c10d import _get_default_store

        self.rank, self.count, self.run_dir = processes.rank, processes.count, run_dir
        self.notes = _get_default_store().clone()  # of its own connection, so that a waiting collective is no matter
        own = (socket.gethostname(), os.getpid(), psutil.Process().create_time())
        self.others = {  # those of this machine
            rank: psutil.Process(pid)
            for rank, (host, pid, born) in enumerate(processes.gather(lambda: own))
            if rank != self.rank and host == own[0] and _born(pid) == born
        }
        self.launcher = os.getppid()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at the others meanwhile; an error that one of them caused becomes one line, told once."""
        done = threading.Event()
        threading.Thread(target=self._watch, args=(done,), daemon=True, name="peers").start()
        try:
            yield
        except BaseException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends already; the launcher may ask for it once more
            self._leave_note(error)
            self._end(error)
            raise
        finally:
            done.set()

    def _leave_note(self, error: BaseException) -> None:
        """Let the others know that this process ended by itself."""
        try:
            self.notes.set(f"ended/{self.rank}", str(error) if isinstance(error, KitError) else type(error).__name__)
        except RuntimeError:  # the store's own process is gone
            return

    def _note(self, rank: int) -> str | None:
        try:
            key = f"ended/{rank}"
            return self.notes.get(key).decode() if self.notes.check([key]) else None
        except RuntimeError:
            return None

    def _end(self, error: BaseException) -> None:
        """Raise what is to be told instead of an error that another process is the cause of."""
        if isinstance(error, KitError):
            if self.rank and self._also_main_says(str(error)):
                raise SystemExit(2) from error
            return
        asked_to = isinstance(error, SystemExit | KeyboardInterrupt)
        gone = self._gone(wait=0.0 if asked_to else 2.0)
        lost = [rank for rank in gone if self._note(rank) is None]
        if lost or (gone and not asked_to):
            self._tell((lost or gone)[0], gone, error)
        if asked_to and (self.rank or os.environ.get(_TOLD_BY_LAUNCHER)):
            raise SystemExit(1) from error  # all were asked, and one of them says so

    def _also_main_says(self, text: str) -> bool:
        """Whether the main process ends with the same words, which need not be said twice."""
        until = time.monotonic() + _TO_UNWIND
        while (note := self._note(0)) is None and time.monotonic() < until:
            time.sleep(0.1)
        return note == text

    def _gone(self, wait: float = 0.0) -> list[int]:
        """The processes of this machine that have ended; looked for until there is one, `wait` seconds at most."""
        until = time.monotonic() + wait
        while True:
            gone = [rank for rank, process in self.others.items() if not _is_alive(process)]
            if gone or time.monotonic() >= until:
                return gone
            time.sleep(0.05)

    def _tell(self, first: int, gone: Sequence[int], error: BaseException | None) -> None:
        """Raise the line about a process that is gone, in the first process that is left; the others end silently."""
        left = min(rank for rank in range(self.count) if rank not in gone)
        if self.rank != left or os.environ.get(_TOLD_BY_LAUNCHER):
            raise SystemExit(1) from error
        raise ProcessError(lost_text(f"process {first} of {self.count}", self._note(first), self.run_dir)) from error

    def _watch(self, done: threading.Event) -> None:
        """End this process where its main thread hangs in a collective that will not come about."""
        while not done.wait(_LOOK_EVERY):
            orphaned = os.getppid() != self.launcher
            gone = self._gone()
            if not (gone or orphaned) or done.wait(_TO_UNWIND):
                continue
            try:
                if gone:
                    self._tell(gone[0], gone, None)
                elif self.rank == 0:
                    print(f"grpo-kit: {lost_text('the launcher', None, self.run_dir)}", file=sys.stderr, flush=True)
            except ProcessError as error:
                print(f"grpo-kit: {error}", file=sys.stderr, flush=True)
            except SystemExit:
                pass
            os._exit(1)


def _born(pid: int) -> float | None:
    """When a process started; None where its id is not known here, as in another container of the same name."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def lost_text(who: str, note: str | None, run_dir: Path) -> str:
    """One line: which process ended and how, what is committed, how to go on."""
    how = "was killed or crashed" if note is None else f"ended ({' '.join(note.split())[:300]})"
    return f"{who} {how}; {commit_status(run_dir)}. The same command with --run-dir {run_dir} goes on from there"


# --- starting them ----------------------------------------------------------------------------------------------------


def launch(count: int, arguments: Sequence[str], config: Config, run_dir: Path) -> int:
    """Run `python -m grpo_kit.cli train` with these arguments in `count` processes, by accelerate.

    Where a process is killed, one line says so.

    Raises:
        ProcessError: there are more processes than prompts in an iteration, or they cannot share the weights.
    """
    require_sharable(config, count)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // count)
    options = {
        "num_processes": count,
        "num_machines": 1,
        "num_cpu_threads_per_process": threads,
        "main_process_port": 0,  # any that is free
        "mixed_precision": "no",  # the profile's dtype holds
        "dynamo_backend": "no",
    }
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    given = [f"--{name}={value}" for name, value in options.items()]
    given += ["--use_fsdp", "--fsdp_version=2"] if sharded else ["--multi_gpu"]  # accelerate's name for several
    os.environ[_TOLD_BY_LAUNCHER] = str(os.getpid())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args([*given, "--module", "grpo_kit.cli", "train", *arguments]))
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        first = max(codes, key=lambda rank: (codes[rank] < 0, codes[rank] != -signal.SIGTERM))  # which ends the others
        if codes[first] >= 0:  # an error, which that process has told
            return codes[first]
        who = f"process {first} of {count} ({signal.Signals(-codes[first]).name})"
        print(f"\ngrpo-kit: {lost_text(who, None, run_dir)}", file=sys.stderr)  # below a bar that was left as it was
        return 1
    finally:
        del os.environ[_TOLD_BY_LAUNCHER]
    return 0
