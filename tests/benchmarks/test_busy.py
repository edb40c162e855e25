"""What computes beside a measurement ends with it, also where the measurement is killed."""

import multiprocessing
import time
from multiprocessing.synchronize import Event

import psutil
import pytest

from benchmarks.speed import busy


def measure(is_running: Event) -> None:
    busy.SETTLED = 0.0
    with busy.running([busy.LOOP]):
        is_running.set()
        time.sleep(60)


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
    apart = multiprocessing.get_context("fork")
    is_running = apart.Event()
    measuring = apart.Process(target=measure, args=(is_running,))
    measuring.start()
    assert is_running.wait(60)
    children = psutil.Process(measuring.pid).children()
    assert len(children) == 1
    while children[0].cpu_times().user < 0.2:  # until it computes
        time.sleep(0.05)
    measuring.kill()
    measuring.join()
    assert gone(children)
