"""How long a fresh machine needs until the kit can run: an empty folder to `grpo-kit check`, by uv and by pip alone.

Both install the same versions into a new environment, from the package index, with nothing cached.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.speed import measure
from benchmarks.speed.results import Figure, Result, Settings
from grpo_kit.config import PROJECT_ROOT

TOOLS = {"uv": ["uv"], "pip": []}  # what make installs first
LISTING = Path("/proc/net/dev")  # Linux alone


def set_up(settings: Settings) -> Result:
    """Seconds with uv by those with pip, and the megabytes that `make run` and `make test` download."""
    sides = {name: lambda _, name=name: _install(name, ".") for name in TOOLS}
    timings = measure.alternate(sides, settings.pairs, warm_up=0, label="set-up")
    found = measure.median(measure.paired_ratios(timings["uv"], timings["pip"], "wall"))  # who sets up waits
    figures = [Figure("set-up with uv, by pip's", *vars(found).values(), 0.6, 0.4, more_is_better=False)]
    for name, extras in (("make run", "."), ("make test", ".[dev]")) if LISTING.is_file() else ():
        before = _received()
        _install("uv", extras)
        figures.append(Figure(f"downloaded for {name}", (_received() - before) / 1e6, unit=" MB", more_is_better=False))
    return Result("W14", "from an empty folder to `grpo-kit check`", figures, [{"raw": measure.raw(timings)}])


def _install(tool: str, what: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        python = str(Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "--quiet", "--no-cache-dir", "--disable-pip-version-check", "install"]
        given = ["-c", "requirements.lock", "-e", what]
        if tool == "uv":
            subprocess.run([*pip, "uv"], check=True)
            uv = [
                python,
                "-m",
                "uv",
                "pip",
                "install",
                "--quiet",
                "--no-cache",
                "--compile-bytecode",
                "--python",
                python,
            ]
            subprocess.run([*uv, *given], check=True, cwd=PROJECT_ROOT)
        else:
            subprocess.run([*pip, *given], check=True, cwd=PROJECT_ROOT)
        subprocess.run([python, "-m", "grpo_kit.cli", "check"], check=True, cwd=PROJECT_ROOT, capture_output=True)


def _received() -> int:
    """Bytes that came over all network devices so far, the loopback device too: an index may be on this machine."""
    return sum(int(line.split(":")[1].split()[0]) for line in LISTING.read_text().splitlines() if ":" in line)
