"""Kernels of this Python for notebooks that run headlessly; on Linux they start warm.

Importing torch, transformers and diffusers takes most of the time until a kernel computes. For a series it is done
once, in a process of its own that does nothing else (this file as a script): for each line that it reads (arguments,
folder and environment, as JSON) it forks a kernel and writes the kernel's process id. It ends with who started it, and
its kernels with it. Elsewhere a fork is not safe, or there is none: each kernel is started anew.
"""

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

IMPORTED = (  # not pandas, matplotlib: they ask when they are imported whether they are in a notebook
    "torch",
    "open_clip",
    "peft",
    "transformers.modeling_utils",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
)
_ONE_AT_A_TIME = threading.Lock()


def own_kernel() -> type:
    """The kernel manager for kernels of this Python, whatever Jupyter knows under the name python3."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.provisioning import LocalProvisioner

    class Forked(LocalProvisioner):
        async def launch_kernel(self, cmd: list[str], **options: object) -> dict[str, object]:
            self.cwd = str(options.get("cwd") or Path.cwd())
            self.process = ForkedKernel(cmd, self.cwd, dict(options["env"]))
            self.pid = self.pgid = self.process.pid
            return self.connection_info

    class OwnKernel(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict())

        def __init__(self, **options: object) -> None:
            super().__init__(**options)
            if can_fork():
                self.provisioner = Forked(kernel_id="", kernel_spec=self.kernel_spec, parent=self)

    return OwnKernel


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
        """Send it a signal; raises ProcessLookupError where it has ended."""
        signal.pidfd_send_signal(self._descriptor, number)


@cache
def _warm_process() -> subprocess.Popen:
    command, pipe = [sys.executable, __file__], subprocess.PIPE
    # in a session of its own, since Ctrl-C is for the process that started it
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8", start_new_session=True)


def _serve() -> None:
    sys.path[:] = [place for place in sys.path if Path(place) != Path(__file__).parent]  # a script's folder comes first
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for a kernel's exit status
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            _become_kernel(*json.loads(line))
            return
        print(pid, flush=True)


def _become_kernel(command: list[str], folder: str, environment: dict[str, str]) -> None:
    """Run `python -m <module> <arguments>` in this process, as if it had been started for that."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment, JPY_PARENT_PID=str(os.getppid()))
    module, *sys.argv[1:] = command[command.index("-m") + 1 :]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
