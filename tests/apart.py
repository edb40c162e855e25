"""Tests' functions in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

from grpo_kit.config import PROJECT_ROOT


def printed_apart(code: str, **variables: str) -> list[str]:
    """What some code, which may import the tests' modules, prints in a new process: its last line, word by word."""
    path = os.pathsep.join((str(Path(__file__).parent), str(PROJECT_ROOT)))
    environment = os.environ | {"PYTHONPATH": path} | variables
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()
