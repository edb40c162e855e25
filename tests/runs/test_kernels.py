"""Notebooks run in this Python, whatever Jupyter knows under the name python3; and `check` says what that is."""

import json
import sys
from pathlib import Path

import nbformat
import pytest

from grpo_kit.config import KitError
from grpo_kit.preflight import machine
from grpo_kit.runs.notebooks import Planned, execute

CODE = "import sys, os\nprint(sys.executable)\nprint('started' in globals(), os.environ.get('MARK'))"
OTHER = str(Path(sys.base_prefix, "bin", "python3"))  # it lacks the kit's libraries


def register(folder: Path, kernel: object) -> None:
    place = folder / "kernels" / "python3" / "kernel.json"
    place.parent.mkdir(parents=True)
    place.write_text(kernel if isinstance(kernel, str) else json.dumps(kernel), encoding="utf-8")


def kernel(program: str, **more: object) -> dict:
    argv = [program, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    return {"argv": argv, "display_name": "Python 3", "language": "python", **more}


FOREIGN = {
    "another Python": kernel(OTHER),
    "one that was removed": kernel("/opt/conda/envs/gone/bin/python"),
    "a script that starts one": kernel("/opt/start_kernel.sh", env={"MARK": "other"}),
    "a damaged file": "{",
}


@pytest.mark.field("F12")
@pytest.mark.parametrize("which", FOREIGN)
def test_a_notebook_runs_in_this_python_and_check_names_the_other(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(tmp_path / "jupyter", FOREIGN[which])
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    with pytest.raises((KitError, ValueError)) as found:
        machine._kernel()
    program = FOREIGN[which]["argv"][0] if isinstance(FOREIGN[which], dict) else ""
    assert program in str(found.value)
    if program:
        assert f"grpo-kit run takes {sys.executable}" in str(found.value)
    (tmp_path / "startup.py").write_text("started = True\nraise SystemExit('not for notebooks')")
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "startup.py"))
    cell = nbformat.v4.new_code_cell(CODE)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "00_small.ipynb")
    done = execute(Planned(tmp_path / "00_small.ipynb", {}), tmp_path / "out")
    assert done.error is None
    printed = nbformat.read(done.path, as_version=4).cells[-1].outputs[0].text.split()
    assert printed == [sys.executable, "False", "None"]


@pytest.mark.field("F12")
@pytest.mark.parametrize("program", [sys.executable, "python", "python3", "python3.12"])
def test_check_is_content_with_this_python(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(tmp_path / "jupyter", kernel(program))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    assert machine._kernel().endswith("this Python")
