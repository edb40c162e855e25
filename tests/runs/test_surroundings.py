"""Variables that a container or another launcher left behind."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_kit.config import PROJECT_ROOT, KitError
from grpo_kit.runs.surroundings import prepare, world_size

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


def command(folder: Path, *given: str, code: str = "", **variables: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)} | variables
    text = f"{code}\nimport sys\nfrom grpo_kit.cli import main\nmain(sys.argv[1:])"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", text, *given], cwd=folder, env=environment, **pipes)


@pytest.mark.slow
def test_commands_work_among_empty_and_foreign_variables(tmp_path: Path) -> None:
    few = ["-o", "training_settings.num_iterations=1", "-o", "tracking_settings.wandb=offline"]
    done = command(tmp_path, "train", "--run-dir", "run", *few, **LEFT_BEHIND)
    errors = done.communicate()[1]
    assert done.returncode == 0, errors
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
    done = command(tmp_path, "train", "--run-dir", "run", WORLD_SIZE="4", RANK="0")
    errors = done.communicate()[1]
    assert done.returncode == 2 and errors.startswith("grpo-kit: WORLD_SIZE: found 4 without"), errors
    assert len(errors.splitlines()) == 1


@pytest.mark.slow
def test_a_process_that_waits_for_others_says_so(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from grpo_kit.training import launch\nlaunch._TELL_AFTER = 0.2"
    variables = {"WORLD_SIZE": "2", "MASTER_PORT": str(port), **LAUNCHER}
    with command(tmp_path, "train", "--run-dir", "run", code=code, **variables) as waiting:
        try:
            said = next(line for line in waiting.stderr if line.startswith("grpo-kit:"))
            assert said.startswith(f"grpo-kit: process 0 of 2 waits for the others at 127.0.0.1:{port}. If nothing")
        finally:
            waiting.kill()
