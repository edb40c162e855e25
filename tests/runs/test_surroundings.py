"""Variables that a container or another launcher left behind."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.forked import Forked

from grpo_kit.cli import main
from grpo_kit.config import PROJECT_ROOT, KitError
from grpo_kit.runs.surroundings import prepare, world_size
from grpo_kit.training import launch

pytestmark = pytest.mark.field("F20")
LAUNCHER = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
LEFT_BEHIND = {
    "HF_HOME": "",
    "HF_TOKEN": "",
    "WANDB_MODE": "",
    "OMP_NUM_THREADS": "",
    "WORLD_SIZE": "",
    "MPLBACKEND": "module://gone.backend",
    "JUPYTER_PATH": "/nowhere",
    "PYTHONSTARTUP": "/nowhere/startup.py",
    "XDG_CACHE_HOME": "",
    "RANK": "3",
}


FEW = "training_settings.num_iterations=1 training_settings.group_size=2 evaluation_settings.validation_prompts=2"


@pytest.mark.slow
def test_commands_work_among_empty_and_foreign_variables(tmp_path: Path) -> None:
    options = [part for text in f"{FEW} tracking_settings.wandb=offline".split() for part in ("-o", text)]
    given = [sys.executable, "-m", "grpo_kit.cli", "train", "--run-dir", "run", *options]
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)} | LEFT_BEHIND  # libraries read some when imported
    done = subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # HF_HOME="" would make a folder hub/ here


def test_empty_variables_are_dropped_where_emptiness_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"CUDA_VISIBLE_DEVICES": "", "MINE": "", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    for name, value in (LEFT_BEHIND | kept).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_HOME", "  ")
    prepare()
    assert {name: os.environ.get(name) for name in kept} == kept
    assert not {"HF_HOME", "WANDB_MODE", "OMP_NUM_THREADS", "WORLD_SIZE", "TORCH_HOME"} & os.environ.keys()
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    prepare()
    assert "MPLBACKEND" not in os.environ


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "1"}, 1),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "29500", **LAUNCHER}, 2),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE: found 4 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "4", **LAUNCHER}, "WORLD_SIZE: found 4 without MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: found 'two', allowed: a number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: found '-1', allowed: a number"),
    ],
)
def test_the_processes_are_those_of_a_launcher_that_is_there(
    variables: dict[str, str], expected: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "MASTER_PORT", *LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, int):
        assert world_size() == expected
    else:
        with pytest.raises(KitError) as caught:
            world_size()
        assert str(caught.value).startswith(expected) and "Unset it" in str(caught.value)


@pytest.mark.slow
def test_training_with_what_another_launcher_left_is_one_line(tmp_path: Path) -> None:
    run, variables = str(tmp_path / "run"), {"WORLD_SIZE": "4", "RANK": "0"}
    done = Forked(lambda: main(["train", "--run-dir", run]), tmp_path / "said", **variables)
    assert done.wait() == 2 and done.said.startswith("grpo-kit: WORLD_SIZE: found 4 without"), done.said
    assert len(done.said.splitlines()) == 1


@pytest.mark.slow
def test_a_process_that_waits_for_others_says_so(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def train() -> None:
        launch._TELL_AFTER = 0.2
        main(["train", "--run-dir", str(tmp_path / "run")])

    waiting = Forked(train, tmp_path / "said", **{"WORLD_SIZE": "2", "MASTER_PORT": str(port), **LAUNCHER})
    try:
        until = time.monotonic() + 600
        while "grpo-kit:" not in waiting.said and time.monotonic() < until:
            time.sleep(0.1)
        expected = f"grpo-kit: process 0 of 2 waits for the others at 127.0.0.1:{port}. If nothing"
        assert any(line.startswith(expected) for line in waiting.said.splitlines()), waiting.said
    finally:
        waiting.kill()
        waiting.wait()
