"""How long a person waits for `import grpo_kit` and `grpo-kit --help`, beside importing TRL's trainer.

Whole processes, Python's own start included, each in a fresh interpreter.
"""

import subprocess
import sys
from pathlib import Path

from benchmarks.speed import measure
from benchmarks.speed.results import Figure, Gate, Result, Settings, require

COMMANDS = {
    "import grpo_kit": [sys.executable, "-c", "import grpo_kit"],
    "grpo-kit --help": [str(Path(sys.executable).with_name("grpo-kit")), "--help"],
    "import trl": [sys.executable, "-c", "import trl"],
    "from trl import GRPOTrainer": [sys.executable, "-c", "from trl import GRPOTrainer"],
    "python alone": [sys.executable, "-c", "pass"],
}
LOADED = "import sys, grpo_kit, grpo_kit.cli; sys.exit('torch' in sys.modules)"


def imports(settings: Settings) -> Result:
    """Seconds until each command is done."""
    gates = require([Gate("torch loaded by import grpo_kit or its command line", _exit_code(LOADED), 0)])
    sides = {name: lambda _, command=command: _run(command) for name, command in COMMANDS.items()}
    timings = measure.alternate(sides, settings.pairs, label="imports")
    figures = []
    for name in COMMANDS:
        found = measure.median([seconds.wall for seconds in timings[name]])
        goals = (0.15, 0.05) if "grpo" in name else (None, None)
        figures.append(Figure(name, *vars(found).values(), *goals, more_is_better=False, unit=" s"))
    case = {"case": "whole processes", "raw": measure.raw(timings)}
    return Result("W8", "importing the kit, and its command line", figures, [case], gates)


def _exit_code(code: str) -> int:
    return subprocess.run([sys.executable, "-c", code], check=False).returncode


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
