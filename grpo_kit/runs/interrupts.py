"""What a command does on Ctrl-C and other signals: it unwinds, prints the command that resumes the work, and exits."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

UNWINDING_SECONDS = 8.0  # the longest that it may take after a signal


def command_line(arguments: Sequence[str]) -> str:
    """The kit's command with these arguments, as a shell reads it."""
    return (subprocess.list2cmdline if os.name == "nt" else shlex.join)(["grpo-kit", *arguments])


@contextlib.contextmanager
def resumable(arguments: Sequence[str], how: str = "it goes on where it stopped") -> Iterator[None]:
    """Let a signal unwind what this process does; then print one line with the command that resumes it, and exit.

    Unwinding closes a run's trackers, frees its folder and ends a notebook's kernel. Where it does not end (a server
    that does not answer; Python loses an exception that is raised while an object is destroyed), the process exits
    after `UNWINDING_SECONDS` all the same: commits are whole or absent at any moment. The exit code is 128 + the
    signal's number; `how` says what the command with these `arguments` does.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # which Windows does not have
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    received: dict[int, threading.Timer] = {}  # a signal: what ends the process where unwinding does not

    def report() -> None:
        is_one_of_several = os.environ.get("WORLD_SIZE", "") not in ("", "1")  # started by a launcher, which reports
        with contextlib.suppress(OSError):  # stderr may be closed (SIGHUP)
            if not is_one_of_several:
                print(f"\ninterrupted; {how} with: {command_line(arguments)}", file=sys.stderr, flush=True)

    def unwind(number: int, _: object) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        received[number] = threading.Timer(UNWINDING_SECONDS, lambda: (report(), os._exit(128 + number)))
        received[number].daemon = True
        received[number].start()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for number in numbers:
        if before[number] != signal.SIG_IGN:  # nohup ignores SIGHUP: so does its child
            signal.signal(number, unwind)
    try:
        try:
            yield
        finally:  # also where the work ended before Python raised the interrupt
            for timer in received.values():
                timer.cancel()
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else stop.code
        code = 128 + min(received) if received else code  # ray.wait raises SystemExit(1) where a signal stops it
        if code not in [128 + number for number in numbers]:
            raise
        report()
        raise SystemExit(code) from None
    finally:
        for number in numbers:
            signal.signal(number, before[number] or signal.SIG_DFL)
