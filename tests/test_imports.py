"""The public names, what an import costs, and the project files that must agree."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import grpo_kit
from benchmarks.size import house
from grpo_kit.config import PROJECT_ROOT

PACKAGE = PROJECT_ROOT / "grpo_kit"


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_no_heavy_library():
    heavy = "torch transformers diffusers numpy pandas pydantic matplotlib typer".split()
    loaded = _run(f"import sys, grpo_kit; print([name for name in {heavy} if name in sys.modules])")
    assert loaded == "[]"


def test_settings_and_prompts_load_no_torch():
    use = "import sys, grpo_kit as gk; gk.load_config('tiny'); gk.Prompt('a cat'); gk.release()"
    assert _run(f"{use}; print('torch' in sys.modules)") == "False"


def test_figures_and_the_report_load_no_models():
    """A first figure of plain numbers once waited 12 s for them; the widgets are others."""
    used = "[getattr(show, name) for name, home in show._HOME.items() if not home.startswith('widgets')]"
    loaded = "print([n for n in ('torch', 'transformers', 'diffusers') if n in sys.modules])"
    assert _run(f"import sys; from grpo_kit import show; {used}; {loaded}") == "[]"


def test_command_line_help_loads_neither_torch_nor_pydantic():
    code = (
        "import sys, grpo_kit.cli\n"
        "try: grpo_kit.cli.main(['--help'])\n"
        "except SystemExit: print([n for n in ('torch', 'pydantic', 'papermill') if n in sys.modules])"
    )
    assert _run(code).endswith("[]")


def test_public_names_are_listed_and_unknown_ones_refused():
    assert set(grpo_kit.__all__) <= set(dir(grpo_kit))
    with pytest.raises(AttributeError, match="no attribute 'gruop_advantages'"):
        _ = grpo_kit.gruop_advantages
    with pytest.raises(ImportError):
        from grpo_kit import gruop_advantages  # noqa: F401


@pytest.mark.parametrize("name", sorted(grpo_kit._HOME))
def test_every_public_name_resolves(name: str):
    assert not inspect.ismodule(getattr(grpo_kit, name))


def test_no_module_has_the_name_of_a_public_name():
    # importing it would put the module in the place of the function
    assert not set(grpo_kit.__all__) & {path.stem for path in PACKAGE.iterdir()}


# --- the house --------------------------------------------------------------------------------------------------------

LINES = "lines of the package"


def test_the_package_keeps_its_figures():
    assert [figure for figure in house.figures() if not figure.holds and figure.name != LINES] == []


def test_the_package_does_not_grow():
    # the budget is that of benchmarks/size/house.py; until it is reached, what comes in makes something else smaller
    (lines,) = [figure for figure in house.figures() if figure.name == LINES]
    assert lines.found <= 25_440, lines  # some 1,730 of them are the course, 1,550 eyes, 900 other media


TREE = {
    "__init__.py": "",
    "config/__init__.py": "",
    "config/settings.py": "def load() -> None:\n    'Load.'\n",
    "runs/__init__.py": "",
    "runs/folder.py": "from grpo_kit.config.settings import load\n",
    "training/__init__.py": "",
    "training/loop.py": "from grpo_kit.runs.folder import load\n",
}
UPWARD = {
    "at the top": "from grpo_kit.training.loop import load\n",
    "a module": "import grpo_kit.training.loop\n",
    "a module of a room": "from grpo_kit.training import loop\n",
    "inside a function": "def use() -> None:\n    'Use.'\n    from grpo_kit.training.loop import load\n",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from grpo_kit.training.loop import load\n",
}


def _missed(folder: Path, **changes: str) -> list[str]:
    """The figures that a package misses which has other files in places of `TREE`."""
    for name, text in {**TREE, **changes}.items():
        path = folder / "grpo_kit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [figure.name for figure in house.figures(folder) if not figure.holds]


def test_a_small_package_whose_imports_go_down_keeps_its_figures(tmp_path: Path):
    assert _missed(tmp_path) == []


@pytest.mark.parametrize("way", UPWARD)
def test_an_import_that_goes_up_is_noticed(way: str, tmp_path: Path):
    broken = TREE["config/settings.py"] + UPWARD[way]
    assert _missed(tmp_path, **{"config/settings.py": broken}) == ["imports back up", "circles of modules"]


def test_an_import_of_a_room_on_the_same_floor_is_noticed(tmp_path: Path):
    other = {"grpo/__init__.py": "", "grpo/loss.py": "from grpo_kit.runs.folder import load\n"}
    assert _missed(tmp_path, **other) == ["imports back up"]


def test_a_circle_through_names_that_are_loaded_later_is_noticed(tmp_path: Path):
    later = "from grpo_kit import lazy_names\n_HOME = {'load': 'folder'}\n"
    later += "__getattr__, __dir__ = lazy_names(__name__, _HOME)\n"
    inner = {"runs/__init__.py": later, "runs/folder.py": "from grpo_kit.runs import load\n"}
    assert _missed(tmp_path, **inner) == ["circles of modules"]


@pytest.mark.parametrize(
    ("file", "text", "figure"),
    [
        ("runs/long.py", "x = 1\n" * 451, "lines of the longest file"),
        ("runs/tall.py", "def tall() -> None:\n    'Tall.'\n" + "    x = 1\n" * 60, "lines of the longest function"),
        ("runs/untyped.py", "def untyped(x) -> None:\n    'Untyped.'\n", "public functions without types"),
        ("runs/silent.py", "class Silent:\n    def say(self) -> None: ...\n", "public functions without a docstring"),
    ],
)
def test_what_a_function_or_file_may_not_be_is_noticed(file: str, text: str, figure: str, tmp_path: Path):
    assert _missed(tmp_path, **{file: text}) == [figure]


def test_a_fifth_loose_module_is_noticed(tmp_path: Path):
    loose = {f"{name}.py": "" for name in ("cli", "experiment", "rollout", "helpers")}
    assert _missed(tmp_path, **loose) == ["modules loose at the root"]


# --- the project files ------------------------------------------------------------------------------------------------


def _names(requirements: list[str]) -> dict[str, str]:
    split = [re.fullmatch(r"([A-Za-z0-9._-]+)(.*)", text.replace(" ", "")) for text in requirements]
    return {found[1].lower().replace("_", "-"): found[2] for found in split}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_environment_file_has_the_ranges_of_the_project(project: dict):
    conda = yaml.safe_load((PROJECT_ROOT / "environment.yml").read_text(encoding="utf-8"))
    by_pip = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert _names(by_pip) == _names(project["dependencies"] + project["optional-dependencies"]["dev"])


def test_lock_file_pins_every_dependency_by_name_and_version_only(project: dict):
    lines = (PROJECT_ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    locked = _names(pins)
    assert len(locked) == len(pins)
    assert _names(project["dependencies"] + project["optional-dependencies"]["dev"]).keys() <= locked.keys()


def test_every_library_that_is_imported_is_declared(project: dict):
    declared, extras = _names(project["dependencies"]).keys(), dict(project["optional-dependencies"])
    del extras["dev"]
    optional = {name for requirements in extras.values() for name in _names(requirements)}
    owners = importlib.metadata.packages_distributions()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            allowed = declared if node in tree.body else declared | optional  # an extra's library: where it is used
            for module in {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"grpo_kit"}:
                owned = owners.get(module, [module])  # one that is not installed goes by its own name
                names = {name.lower().replace("_", "-") for name in owned}
                assert names & allowed, f"{path.name} imports {module}, which pyproject.toml does not name"


def test_version_is_the_same_everywhere(project: dict):
    assert project["version"] == grpo_kit.__version__
