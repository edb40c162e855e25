"""Work in a fork of this process, which has imported already what a new Python would take seconds to import."""

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


class Forked:
    """A process in a session of its own, with what tests ask of a `subprocess.Popen`.

    `work` is its program: it returns the exit code, or None for 0. What it says is in `log`, and its errors are in
    another file where one is given. `variables` are added to its environment.
    """

    def __init__(self, work: Callable[[], int | None], log: Path, errors: Path | None = None, **variables: str) -> None:
        self.log, self.returncode = log, None
        sys.stdout.flush()
        sys.stderr.flush()
        log.touch()
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(variables)
            _become(log, errors or log)
            os._exit(_ended(work))

    def poll(self) -> int | None:
        """The exit code, minus a signal's number, or None while it runs."""
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """The exit code, when it has ended."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal; nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, whatever it does."""
        self.send_signal(signal.SIGKILL)

    @property
    def said(self) -> str:
        """What it has written on the screen so far."""
        return self.log.read_text(errors="replace")


def _become(log: Path, errors: Path) -> None:
    """What a new process has: a session, signals and output of its own, and one thread."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for number, file in ((1, log), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    torch.set_num_threads(1)  # threads are not forked along


def _ended(work: Callable[[], int | None]) -> int:
    """Work; the exit code that Python would end with."""
    try:
        code = work()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0
