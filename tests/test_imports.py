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
from grpo_kit.config import PROJECT_ROOT

PACKAGE = PROJECT_ROOT / "grpo_kit"
LAYERS = [  # imports run downward only
    {"cli"},
    {"check", "doctor", "plan"},
    {"show"},
    {"branch"},
    {"replay"},
    {"recompute"},
    {"train"},
    {"evaluate", "sentinel", "guard"},
    {"conclusions"},
    {"experiment"},
    {"runs", "launch"},
    {"rollout"},
    {"drawing"},
    {"rewards"},
    {"models"},
    {"shapeworld"},
    {"prompts", "grpo"},  # grpo: tensors in, tensors out
    {"statistics", "diversity", "noise"},  # tables in, numbers out
    {"hardware", "parallel"},
    {"config"},
    {"lazy"},
]


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


ORDERS = {
    "name first": "import grpo_kit as gk; gk.{0}; import grpo_kit.{0}",
    "file first": "import grpo_kit.{0}; import grpo_kit as gk",
    "from the file": "from grpo_kit.{0} import {0} as direct; import grpo_kit as gk; assert gk.{0} is direct",
    "importlib": "import importlib, grpo_kit as gk; importlib.import_module('grpo_kit.{0}')",
    "from the package": "import grpo_kit.{0}; from grpo_kit import {0}; import grpo_kit as gk; assert gk.{0} is {0}",
    "reload": "import importlib, sys, grpo_kit.{0}, grpo_kit as gk; importlib.reload(sys.modules['grpo_kit.{0}'])",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["train", "evaluate", "replay", "branch"])
def test_train_and_evaluate_are_functions_whatever_was_imported_before(name: str, order: str, tmp_path: Path):
    # a copy of the package with light files of these names, so that the test needs neither torch nor a second
    (tmp_path / "grpo_kit").mkdir()
    for file in ("__init__.py", "lazy.py"):
        (tmp_path / "grpo_kit" / file).write_text((PACKAGE / file).read_text(encoding="utf-8"))
    (tmp_path / "grpo_kit" / f"{name}.py").write_text(f"def {name}(): return 'called'\nother = 1\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{ORDERS[order].format(name)}\n"
    code += f"assert gk.{name}() == 'called'\nfrom grpo_kit.{name} import other\n"
    code += f"gk.{name} = 'replaced'; assert gk.{name} == 'replaced'"  # a test may still put another function there
    _run(code)


def _imports(path: Path) -> set[str]:
    """The parts of the kit that a file imports when it is loaded; those inside functions and for types are free."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) or _is_for_types(node)]
    inner = {node for block in later for node in ast.walk(block)}
    names = set()
    for node in ast.walk(tree):
        if node in inner:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "grpo_kit":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("grpo_kit.")}
    return names


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_imports_run_downward_only():
    rank = {name: level for level, names in enumerate(LAYERS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__" or "build" in path.parts:
            continue
        for name in _imports(path) - {part, "__version__"}:
            assert rank[name] > rank[part], f"{path.relative_to(PROJECT_ROOT)} imports {name}, which lies above it"


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
