"""The kit from its wheel, in an empty folder of somebody's own, without the checkout and without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from support.config_files import save_config

from grpo_kit.config import PROJECT_ROOT, load_config, paths
from grpo_kit.runs import notebooks as headless
from tools import colab

BUILT_FROM = ("grpo_kit", "data", "notebooks", "docs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
README = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.field("F16")


# --- in a checkout ----------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The paths as an installed kit has them, seen from an empty folder."""
    shipped = tmp_path / "site-packages" / "grpo_kit" / "shipped"
    (shipped / "data").mkdir(parents=True)
    for part in ("shapeworld", "prompts"):
        (shipped / "data" / part).symlink_to(PROJECT_ROOT / "data" / part)
    for module in ("paths", "loading", "settings"):
        monkeypatch.setattr(f"grpo_kit.config.{module}.PROJECT_ROOT", shipped)
    monkeypatch.setattr(paths, "_SHIPPED", shipped)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    return shipped


def test_shipped_paths_move_between_installations_and_ones_own_count_from_the_working_folder(installed: Path) -> None:
    config = load_config("tiny", {"training_settings.train_prompts": "mine.jsonl"})
    assert config.model_settings.vlm_model == str(installed / "data/shapeworld/policy")
    assert config.training_settings.train_prompts == str(installed.parents[2] / "mine" / "mine.jsonl")
    saved = config.to_dict()
    assert saved["model_settings"]["vlm_model"] == "data/shapeworld/policy"
    place = save_config(config, Path("config.json"))
    assert load_config(place) == config
    Path("data/prompts").mkdir(parents=True)
    Path("data/prompts/shapeworld_train.jsonl").touch()  # a folder of the same name is somebody else's
    assert load_config("tiny").training_settings.train_prompts.startswith(str(installed))


def test_runs_go_to_the_working_folder(installed: Path) -> None:
    from grpo_kit.runs.places import dated_report, new_run_folder

    assert new_run_folder("tiny", None, "first") == Path.cwd() / "reports" / "first"
    assert dated_report("compare").parent == Path.cwd() / "reports"


def test_the_notebooks_are_laid_out_and_what_was_changed_there_stays(tmp_path: Path) -> None:
    files = headless.series_files()
    there = [p for p in headless.lay_out(tmp_path / "course", files) if p.suffix == ".ipynb"]
    assert {path.name for path in there} == {path.name for path in (PROJECT_ROOT / "notebooks").glob("*.ipynb")}
    assert len(there) == len(set(there)) == 2 * len({path.name for path in there})  # in two languages
    assert (tmp_path / "course" / "images" / "loop.png").is_file()
    assert set(there) < set(headless.lay_out(tmp_path / "course", files))
    changed = tmp_path / "course" / "07_train.ipynb"
    changed.write_text("mine")
    (tmp_path / "course" / "index.ipynb").unlink()
    with pytest.raises(headless.NotebookError, match=r"07_train\.ipynb: there already, and differs"):
        headless.lay_out(tmp_path / "course", files)
    assert changed.read_text() == "mine" and not (tmp_path / "course" / "index.ipynb").exists()


# --- a wheel, in an environment of its own ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy: what was built before leaves no trace in it."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        source = PROJECT_ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(source, copy / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", str(copy), "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run(pip, check=True)
    (built,) = out.glob("*.whl")
    return built


class Environment:
    """A Python of its own that sees the libraries of this one, but not this checkout."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
        self.python = folder / "venv" / "bin" / "python"
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        Path(own, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files do not count
        self.mine = folder / "mine"
        self.mine.mkdir()
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        offline = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "OMP_NUM_THREADS": "1"}
        # nbconvert's templates lie beside the libraries
        jupyter = {"JUPYTER_DATA_DIR": str(folder / "jupyter"), "JUPYTER_PATH": str(Path(sys.prefix, "share/jupyter"))}
        self.variables = kept | offline | jupyter

    def run(self, *command: str, code: int = 0) -> str:
        """What a command of this Python prints in the empty folder."""
        given = [self.python, *command]
        done = subprocess.run(given, cwd=self.mine, env=self.variables, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


WORK = """
import grpo_kit.config
print(grpo_kit.config.PROJECT_ROOT, grpo_kit.config.working_folder(), sep="\\n")
from grpo_kit import cli

def command(*given):
    try:
        cli.main(list(given))
    except SystemExit as stop:
        assert not stop.code, given

command("check")
{snippet}
print("reward", reward)
few = "training_settings.num_iterations=1 training_settings.group_size=2 evaluation_settings.validation_prompts=2"
command("train", "--name", "mine", *(part for text in few.split() for part in ("-o", text)))
command("notebooks", "course")
"""


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        media = sum(one.compress_size for one in files.infolist() if re.search("/data/(moving|tones)/", one.filename))
    assert media <= 12e6 and wheel.stat().st_size - media <= 30e6
    there = Environment(tmp_path)
    assert "No module named 'grpo_kit'" in there.run("-c", "import grpo_kit", code=1)
    shutil.copy(wheel, there.mine)
    there.run("-c", colab.cell_source())  # the first cell of every notebook
    (there.mine / wheel.name).unlink()

    said = there.run("-c", WORK.format(snippet=README.split("```python\n")[1].split("```")[0]))
    root, working = map(Path, said.splitlines()[:2])
    assert root.is_relative_to(tmp_path / "venv") and root.name == "shipped" and working == there.mine
    assert "PROBLEM" not in said and float(re.search(r"^reward (\S+)$", said, re.MULTILINE)[1]) <= 1
    saved = json.loads((there.mine / "reports" / "mine" / "config.json").read_text(encoding="utf-8"))
    assert saved["model_settings"]["vlm_model"] == "data/shapeworld/policy"
    here = load_config(there.mine / "reports" / "mine")  # the same run, read from this checkout
    assert here.model_settings.vlm_model == str(PROJECT_ROOT / "data/shapeworld/policy")
    laid_out = 2 * len(list((PROJECT_ROOT / "notebooks").glob("*.ipynb")))  # in two languages
    assert f"{laid_out} notebooks" in said

    there.run("-m", "grpo_kit.cli", "run", "--notebooks", "00", "--name", "first")
    run = there.mine / "reports" / "first"
    assert (run / "index.html").is_file() and str(root) not in (run / "index.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in there.mine.iterdir()) == ["course", "reports"]
