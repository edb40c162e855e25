"""What computes beside a measurement ends with it, also where the measurement is killed."""

import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.speed import busy
from grpo_kit.config import PROJECT_ROOT

CODE = """import time
from benchmarks.speed import busy
busy.SETTLED = 0.0
with busy.running([busy.LOOP]):
    print("running", flush=True)
    time.sleep(60)
"""


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_programs_end_with_the_block(monkeypatch):
    monkeypatch.setattr(busy, "SETTLED", 0.5)
    with busy.running([busy.LOOP, busy.LOOP]):
        loops = [child for child in psutil.Process().children() if child.cmdline()[-1].endswith(busy.LOOP)]
        assert len(loops) == 2
    assert gone(loops)


@pytest.mark.slow
def test_programs_end_where_the_measurement_is_killed():
    measuring = subprocess.Popen([sys.executable, "-c", CODE], cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)
    assert measuring.stdout.readline() == "running\n"
    time.sleep(1.0)
    children = psutil.Process(measuring.pid).children()
    assert len(children) == 1
    measuring.kill()
    measuring.wait()
    assert gone(children)
