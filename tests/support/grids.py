"""A small series of notebooks for grids, and the command that runs it."""

import json
import os
import time
from pathlib import Path

import nbformat
import pytest

from grpo_kit import cli

PARAMETERS = """profile: str = "tiny"  # a profile
run_dir: str = ""  # a folder
group_size: int = 0  # 0: as the profile says
label: str = "none"  # any text
seed: int = 0  # a seed"""
# What every trial of these tests does: leave a line, then divide by the seed's distance from 2.
BODY = """import json, pathlib
import grpo_kit
beta = grpo_kit.load_config(profile).training_settings.beta
log = pathlib.Path(run_dir) / "log.jsonl"
log.open("a").write(json.dumps([group_size, label, seed, beta]) + "\\n")
1 / (seed - 2)"""


def write_notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def lines(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--notebooks", "00", *arguments])
    return stop.value.code or 0


def wait_for_number(path: Path) -> int:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text():
            return int(path.read_text())
        time.sleep(0.1)
    raise AssertionError("the notebook did not start")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.is_file() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z")
