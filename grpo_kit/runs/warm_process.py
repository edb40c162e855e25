"""A process that has imported what every notebook imports, and forks kernels that need not do so again.

Run as a script, with nothing else in it: for each line that it reads (arguments, folder and environment, as JSON) it
forks a kernel and writes the kernel's process id. It ends with who started it, and its kernels with it.
"""

import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path

IMPORTED = (  # not pandas, matplotlib: they ask when they are imported whether they are in a notebook
    "torch",
    "open_clip",
    "peft",
    "transformers.modeling_utils",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
)


def serve() -> None:
    """Import, then fork for each line of standard input until it ends."""
    sys.path[:] = [place for place in sys.path if Path(place) != Path(__file__).parent]  # a script's folder comes first
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for a kernel's exit status
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            become_kernel(*json.loads(line))
            return
        print(pid, flush=True)


def become_kernel(command: list[str], folder: str, environment: dict[str, str]) -> None:
    """Run the module of `python -m <module> <arguments>` in this process, as if it had been started for that."""
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
    serve()
