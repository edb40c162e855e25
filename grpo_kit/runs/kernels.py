"""Kernels that start warm: forked from a process that has imported torch, transformers and diffusers already.

Importing takes most of the time until a notebook's kernel computes. Kernels are forked on Linux alone: elsewhere it is
not safe, or not possible, and each is started anew. JUPYTER_DEFAULT_PROVISIONER_NAME=grpo-kit-forked lets JupyterLab
and nbval fork theirs too.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.provisioning import LocalProvisioner

from grpo_kit.runs import warm_process

_ONE_AT_A_TIME = threading.Lock()


class ForkedProvisioner(LocalProvisioner):
    """Forks the kernels of this Python where that can be done, and starts all others anew."""

    async def launch_kernel(self, cmd: list[str], **options: object) -> dict[str, object]:
        """Start the kernel and return its connection."""
        if not can_fork() or cmd[:2] != [sys.executable, "-m"]:
            return await super().launch_kernel(cmd, **options)
        self.cwd = str(options.get("cwd") or Path.cwd())
        try:
            self.process = ForkedKernel(cmd, self.cwd, dict(options["env"]))
        except (OSError, ValueError):
            self.log.warning("the process that forks kernels ended, perhaps for want of memory; one is started anew")
            return await super().launch_kernel(cmd, **options)
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class OwnKernel(AsyncKernelManager):
    """Kernels of this Python, whatever Jupyter knows under the name python3."""

    kernel_spec = KernelSpec(**get_kernel_dict())
    started_by: type[LocalProvisioner] = LocalProvisioner

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.provisioner = self.started_by(kernel_id="", kernel_spec=self.kernel_spec, parent=self)


class WarmKernel(OwnKernel):
    """The same for notebooks that import the kit: importing it costs nothing there."""

    started_by = ForkedProvisioner


@cache
def can_fork() -> bool:
    """Whether kernels can be forked here: on Linux, unless a sandbox lacks process descriptors."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


class ForkedKernel:
    """A kernel that the warm process forked, with what jupyter_client asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], folder: str, environment: dict[str, str]) -> None:
        with _ONE_AT_A_TIME:
            if _warm_process().poll() is not None:  # ended from outside, as was seen on Ray
                _warm_process.cache_clear()
            warm = _warm_process()
            print(json.dumps([command, folder, environment]), file=warm.stdin, flush=True)
            self.pid = int(warm.stdout.readline())
        self._descriptor = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        """None while it runs, then 0: the exit status of a process that is not a child is not known."""
        return 0 if select.select([self._descriptor], [], [], 0)[0] else None

    def wait(self) -> int:
        """Wait until it has ended."""
        select.select([self._descriptor], [], [])
        os.close(self._descriptor)
        return 0

    def send_signal(self, number: int) -> None:
        """Send it a signal; nothing where it has ended, as `Popen` does."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)


@cache
def _warm_process() -> subprocess.Popen:
    command, pipe = [sys.executable, warm_process.__file__], subprocess.PIPE
    # in a session of its own, since Ctrl-C is for the process that started it
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8", start_new_session=True)
