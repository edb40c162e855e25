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
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psutil
import torch

from grpo_kit.config import Config, KitError
from grpo_kit.runs.folder import commit_status
from grpo_kit.runs.surroundings import world_size
from grpo_kit.training.processes import ALONE, ProcessError, Processes, require_sharable

_LONGEST_COLLECTIVE = timedelta(days=7)
_LOOK_EVERY = 0.5  # seconds between two looks at the other processes
_TO_UNWIND = 5.0  # seconds that a process has to end by itself once another one has ended
_TELL_AFTER = 20.0  # seconds
_WAITING = (
    "process {RANK} of {WORLD_SIZE} waits for the others at {MASTER_ADDR}:{MASTER_PORT}. If nothing started them, "
    "unset WORLD_SIZE, which something else left behind"
)
_LAUNCHER = "GRPO_KIT_LAUNCHER"  # set where `launch` started the processes and says itself which of them was killed


@contextmanager
def joined(config: Config, run_dir: Path) -> Iterator[Processes]:
    """The processes that this one was started with: `ALONE`, or those of `accelerate launch`, until all are done.

    Where one of them fails or dies, all end, and one line says which, what is committed and how to go on. On the device
    "cpu" they talk by gloo.

    Raises:
        ProcessError: another process has ended.
    """
    if world_size() < 2:
        yield ALONE
        return
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    settings = config.model_settings
    for setting in ("device", "generator_device", "reward_device"):
        if (named := getattr(settings, setting) or "").startswith("cuda:"):
            raise ProcessError(f"model_settings.{setting}: found {named}, several processes cannot share it. Set auto")
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # a vision tower
    handlers = [InitProcessGroupKwargs(timeout=_LONGEST_COLLECTIVE), unused]
    waiting = threading.Timer(_TELL_AFTER, print, [f"grpo-kit: {_WAITING.format(**os.environ)}"], {"file": sys.stderr})
    waiting.daemon = True
    waiting.start()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
    waiting.cancel()
    processes = Processes(accelerator)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # by which the launcher ends what is left
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if not processes.is_main:  # the main process logs; of the others only warnings are shown
        screen, logger = logging.StreamHandler(), logging.getLogger("grpo_kit")
        screen.setFormatter(logging.Formatter(f"process {processes.rank}: %(message)s"))
        screen.setLevel(logging.WARNING)
        logger.addHandler(screen)
        logger.propagate = False
    with _Peers(processes, run_dir).watched():
        yield processes
        accelerator.wait_for_everyone()
    accelerator.end_training()


class _Peers:
    """The other processes of a run on this machine: which of them have ended, and who says so."""

    def __init__(self, processes: Processes, run_dir: Path) -> None:
        self.rank, self.count, self.run_dir, self.launcher = processes.rank, processes.count, run_dir, os.getppid()
        own = (socket.gethostname(), os.getpid(), psutil.Process().create_time())
        self.others: dict[int, psutil.Process] = {}
        for rank, (host, pid, created) in enumerate(processes.gather(lambda: own)):
            with suppress(psutil.Error):  # another container of the same name has ids that are not known here
                if rank != self.rank and host == own[0] and psutil.Process(pid).create_time() == created:
                    self.others[rank] = psutil.Process(pid)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch them meanwhile; an error that one of them caused becomes one line, which one process says."""
        done = threading.Event()
        threading.Thread(target=self._watch, args=(done,), daemon=True, name="peers").start()
        try:
            yield
        except BaseException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends already; the launcher may ask for it once more
            self._raise_instead(error)
            raise
        finally:
            done.set()

    def _raise_instead(self, error: BaseException) -> None:
        """Raise the line about another process, or end silently, where an error is that one's; else do nothing."""
        if isinstance(error, KitError):  # such as weights that all of them miss: the main process says it
            if self.rank and (isinstance(error, ProcessError) or 0 in self._ended(wait=_TO_UNWIND)):
                raise SystemExit(2) from error
            return
        asked = isinstance(error, SystemExit | KeyboardInterrupt)
        broken = isinstance(error, SystemExit | RuntimeError)  # SIGTERM, or a collective without one of the processes
        if broken and (ended := self._ended(wait=0.0 if asked else 2.0)):
            if self._reports(ended):
                raise ProcessError(lost_text(f"process {ended[0]} of {self.count}", self.run_dir)) from error
            time.sleep(1.0)  # the one that says it must not take this process for the first that ended
            raise SystemExit(1) from error
        if asked and (self.rank or _LAUNCHER in os.environ):  # all were asked, and one of them says so
            raise SystemExit(1) from error

    def _ended(self, wait: float = 0.0) -> list[int]:
        """The ranks of those that have ended; looked for until there is one, `wait` seconds at most."""
        until = time.monotonic() + wait
        while not (found := [rank for rank, process in self.others.items() if not _is_alive(process)]):
            if time.monotonic() >= until:
                break
            time.sleep(0.05)
        return found

    def _reports(self, ended: Sequence[int]) -> bool:
        """Whether this process says which have ended: the first that is left does, unless `launch` does."""
        left = min(rank for rank in range(self.count) if rank not in ended)
        return self.rank == left and _LAUNCHER not in os.environ

    def _watch(self, done: threading.Event) -> None:
        """End this process where its main thread waits in a collective that the others have left."""
        while not done.wait(_LOOK_EVERY):
            ended, orphaned = self._ended(), os.getppid() != self.launcher
            if not (ended or orphaned) or done.wait(_TO_UNWIND):
                continue
            if self._reports(ended) or (orphaned and self.rank == 0):
                who = f"process {ended[0]} of {self.count}" if ended else "the launcher"
                print(f"grpo-kit: {lost_text(who, self.run_dir)}", file=sys.stderr, flush=True)
            os._exit(1)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def lost_text(who: str, run_dir: Path) -> str:
    """One line: which process ended, what is committed, how to go on."""
    return f"{who} ended early; {commit_status(run_dir)}. The same command with --run-dir {run_dir} goes on from there"


def launch(count: int, arguments: Sequence[str], config: Config, run_dir: Path) -> int:
    """Run `grpo-kit train` with these arguments in `count` processes, if they can share it; returns the exit code."""
    require_sharable(config, count)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // count)
    given = [f"--num_processes={count}", "--num_machines=1", f"--num_cpu_threads_per_process={threads}"]
    given += ["--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no"]  # any port; the profile's dtype
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    given += ["--use_fsdp", "--fsdp_version=2"] if sharded else ["--multi_gpu"]  # accelerate's name for several
    os.environ[_LAUNCHER] = str(os.getpid())
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
        print(f"\ngrpo-kit: {lost_text(who, run_dir)}", file=sys.stderr)  # below a bar that was left as it was
        return 1
    finally:
        del os.environ[_LAUNCHER]
    return 0
