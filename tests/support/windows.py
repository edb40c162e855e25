"""What Windows does otherwise, on this system: for the code of the kit alone, since libraries have branches for it."""

import builtins
import errno
import fcntl
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

MISSING_MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline"}
MISSING_SIGNALS = ("SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGQUIT")


def pretend() -> dict[str, int]:
    """From now on modules and signals are missing, folders are not opened, and files in use not replaced at once.

    Returns how often each of the last two happened.
    """
    happened = {"folder": 0, "in use": 0}
    importing, opening, replacing, flushing = builtins.__import__, os.open, os.replace, os.fsync

    def import_(name: str, globals: Mapping | None = None, *rest: object, **more: object) -> object:
        if name.partition(".")[0] in MISSING_MODULES and _is_kit((globals or {}).get("__name__")):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return importing(name, globals, *rest, **more)

    def open_(path: str | Path, *rest: int, **more: object) -> int:
        if Path(path).is_dir() and _is_kit(sys._getframe(1).f_globals["__name__"]):
            happened["folder"] += 1
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opening(path, *rest, **more)

    def replace_(source: str | Path, target: str | Path) -> None:
        if happened["in use"] % 3 == 0:  # twice of three times a virus scanner has it open
            happened["in use"] += 1
            error = PermissionError(errno.EACCES, "used by another process", str(target))
            error.winerror = 32
            raise error
        happened["in use"] += 1
        replacing(source, target)

    def fsync_(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")  # FlushFileBuffers needs GENERIC_WRITE
        flushing(descriptor)

    from grpo_kit.runs import durable

    durable._FOR_FSYNC = os.O_RDWR  # what is chosen there by os.name
    builtins.__import__, os.open, os.replace, os.fsync = import_, open_, replace_, fsync_
    for name in MISSING_SIGNALS:
        delattr(signal, name)
    return happened


def _is_kit(module: object) -> bool:
    return str(module).startswith("grpo_kit")
