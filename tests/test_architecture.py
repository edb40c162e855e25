"""The drawn picture of the architecture is that of the files, and the shape of the house is counted from all imports."""

from pathlib import Path

import pytest

from benchmarks.size import house
from tools import architecture


def test_the_picture_is_drawn_from_the_package_as_it_is():
    assert architecture.missing_on_the_way() == []
    drawn = architecture.PICTURE.read_text(encoding="utf-8")
    assert f"<dc:description>{architecture.digest()}</dc:description>" in drawn, "draw it: python -m tools.architecture"
    assert set(architecture.WHAT) == house.rooms() - {"__init__"}


def test_a_function_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch):
    gone = (("rollout", "collect_rollouts"), ("models.policy", "Policy.no_such"), ("no.such", "thing"))
    monkeypatch.setattr(architecture, "WAY", gone)
    assert len(architecture.missing_on_the_way()) == 3
    with pytest.raises(ValueError, match=r"not in the package: rollout: collect_rollouts, .* Mend WAY"):
        architecture.draw()


def test_the_figures_of_the_house_hold():
    missed = [figure for figure in house.figures() if not figure.holds]
    assert not missed, [(figure.name, figure.found, figure.most, figure.where) for figure in missed]


BROKEN = {  # what stands in grpo/loss.py of a small house → the figure that notices it
    "import at the top": ("from grpo_kit.training.step import grpo_step\n", "imports back up"),
    "import in a function": ("def loss():\n    from grpo_kit.training import step\n", "imports back up"),
    "import for types": ("if TYPE_CHECKING:\n    import grpo_kit.training.step\n", "imports back up"),
    "import of the same floor": ("from grpo_kit.runs import folder\n", "imports back up"),
    "circle": ("from grpo_kit.grpo import advantages\n", "circles of modules"),
    "long function": ("def loss():\n" + "    1\n" * 60, "lines of the longest function"),
    "long file": ("1\n" * 451, "lines of the longest file"),
    "untyped": ('def loss(x) -> int:\n    """A loss."""\n', "public functions without types"),
    "undocumented": ("def loss(x: int) -> int:\n    return x\n", "public functions without a docstring"),
}


def _house(root: Path, loss: str) -> Path:
    files = {
        "__init__.py": "def lazy_names(): ...\n",
        "cli.py": "from grpo_kit.training.step import grpo_step\n",
        "grpo/__init__.py": "",
        "grpo/loss.py": loss,
        "grpo/advantages.py": "from grpo_kit.grpo import loss\n",
        "runs/__init__.py": "",
        "runs/folder.py": "",
        "training/__init__.py": "",
        "training/step.py": "from grpo_kit.grpo import advantages\n",
    }
    for name, text in files.items():
        path = root / "grpo_kit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_the_house_is_noticed(case: str, tmp_path: Path):
    text, name = BROKEN[case]
    silent = {"public functions without a docstring", "public functions without types"}  # of the small house itself
    sound = {figure.name for figure in house.figures(_house(tmp_path / "sound", "")) if not figure.holds}
    assert sound <= silent
    found = {figure.name: figure for figure in house.figures(_house(tmp_path / "broken", text))}
    assert not found[name].holds


def test_an_import_by_a_table_of_lazy_names_counts(tmp_path: Path):
    root = _house(tmp_path, "")
    table = 'from grpo_kit import lazy_names\n_HOME = {"step": "step"}\n__getattr__ = lazy_names(__name__, _HOME)\n'
    (root / "grpo_kit" / "training" / "__init__.py").write_text(table, encoding="utf-8")
    assert ("training", "training.step") in {(one.source, one.target) for one in house.imports(root)}
