"""How much longer an iteration of the embedded world takes while other programs use the machine.

A learner's laptop has a browser and a call beside the lesson. Rounds of quiet and of busy iterations alternate; torch
may use all cores, as a user's torch does. Busy: one and two plain Python loops, and a torch process with two threads;
where there is Chromium, a page with an animation.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.speed import measure
from benchmarks.speed.peer import make_optimizer
from benchmarks.speed.results import Figure, Result, Settings
from benchmarks.speed.whole_iteration import configured
from grpo_kit.experiment import load_experiment
from grpo_kit.training.iteration import run_iteration

ENDS_WITH_US = """import os, signal, sys, threading
def wait():
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=wait, daemon=True).start()
"""  # also where this process is killed: then nothing is left that computes
LOOP = "while True: pass"
MATRICES = "import torch\ntorch.set_num_threads(2)\na = torch.randn(400, 400)\nwhile True: (a @ a).relu()"
ANIMATION = """import shutil, subprocess
page = "<style>@keyframes turn{to{transform:rotate(1turn)}}div{width:40vw;height:40vw;filter:blur(4px);"
page += "animation:turn 1s linear infinite;background:conic-gradient(red,gold,blue)}</style>" + "<div></div>" * 6
chromium = [shutil.which("chromium"), "--headless=new", "--no-sandbox", "--remote-debugging-port=0"]
subprocess.run([*chromium, "data:text/html," + page])"""
BESIDE = {  # what computes beside it, and the goals as multiples of the quiet machine's time: must and aim
    "one loop": ([LOOP], 1.6, 1.4),
    "two loops": ([LOOP, LOOP], 2.5, 2.0),
    "a torch process with two threads": ([MATRICES], 3.0, 2.5),
}
if shutil.which("chromium"):
    BESIDE["a page with animation in Chromium"] = ([ANIMATION], None, None)
SETTLED = 3.0  # seconds until a program beside it computes


def busy(settings: Settings) -> Result:
    """The seconds of an iteration beside other programs, as multiples of the quiet machine's."""
    torch.set_num_threads(torch.multiprocessing.cpu_count())
    world = load_experiment(configured())
    optimizer = make_optimizer(world.policy.trainable_parameters(), world.config.training_settings)
    figures, cases = [], []
    for name, (programs, *goals) in BESIDE.items():
        quiet, beside = [], []
        for number in range(1 + settings.pairs):  # the first pair warms up
            quiet.append(measure.timed(lambda number=number: run_iteration(world, optimizer, 1 + number)))
            with running(programs):
                beside.append(measure.timed(lambda number=number: run_iteration(world, optimizer, 1 + number)))
        found = measure.median(measure.paired_ratios(beside[1:], quiet[1:], "wall"))
        title = f"iteration beside {name}, by the quiet machine's"
        figures.append(Figure(title, *vars(found).values(), *goals, more_is_better=False))
        cases.append({"case": name, "raw": measure.raw({"quiet": quiet[1:], "beside": beside[1:]})})
    return Result("W13", "an iteration on a busy machine", figures, cases)


@contextmanager
def running(programs: list[str]) -> Iterator[None]:
    """Some Python programs run in the meantime."""
    options = {"start_new_session": True, "stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen([sys.executable, "-c", ENDS_WITH_US + program], **options) for program in programs]
    try:
        time.sleep(SETTLED)
        yield
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)  # a browser's own processes too
            process.wait()
