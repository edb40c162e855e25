"""Tests' functions in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

from grpo_kit.config import PROJECT_ROOT


def printed_apart(test: Path | str, code: str, **variables: str) -> list[str]:
    """The last line, word by word, that code prints in a new process; it may import the test's module and support."""
    path = os.pathsep.join(map(str, (Path(test).parent, Path(__file__).parents[1], PROJECT_ROOT)))
    environment = os.environ | {"PYTHONPATH": path} | variables
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()
