"""Every notebook runs as it is committed, and what its checked cells print stays the same.

The quick ones run in every test run, under nbval with their defaults; the others are slow. Those that draw or train
for a minute or longer are long with their defaults: `make test-slow ARGS="-m long"`; test_series.py and, of 03, 11 and
12, test_notebook_parameters.py run them in short.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest

from grpo_kit.config import PROJECT_ROOT
from grpo_kit.runs.notebooks import select_notebooks
from tools import colab

NOTEBOOKS = select_notebooks()
INDEX = PROJECT_ROOT / "notebooks" / "index.ipynb"
COMMITTED = {path: path.read_bytes() for path in [INDEX, *NOTEBOOKS]}
LONG = {"03_generator", "07_train", "08_evaluate", "09_ablations", "11_eyes", "12_other_media"}  # with their defaults
QUICK = {"index", "00_start_here", "06_grpo_loss"}  # a quarter of a minute each


def by_name(path: Path) -> str:
    return path.stem


def group(path: Path) -> str:
    """Which notebooks it is run together with: "quick", "slow" or "long"."""
    return "quick" if path.stem in QUICK else "long" if path.stem in LONG else "slow"


def as_they_take(path: Path) -> object:
    """The notebook, marked as slow or long where it takes that."""
    marks = {"quick": [], "slow": [pytest.mark.slow], "long": [pytest.mark.slow, pytest.mark.long]}
    return pytest.param(path, marks=marks[group(path)])


# --- as committed -----------------------------------------------------------------------------------------------------


def nbval(paths: list[Path], folder: Path) -> dict[str, str]:
    """Run notebooks under nbval, from another folder; the failures of each by its name, "" where there are none."""
    report = folder / "nbval.xml"
    options = ["--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider", "-q", "-c", os.devnull]
    options += ["--rootdir", folder.anchor]  # cases are named by their path from there, wherever the notebooks are
    command = [sys.executable, "-m", "pytest", *options, "--nbval-cell-timeout", "900", f"--junitxml={report}"]
    forked = {"JUPYTER_DEFAULT_PROVISIONER_NAME": "grpo-kit-forked"}  # what takes long is imported once
    environment = {**os.environ, **forked, "PYTHONPATH": str(PROJECT_ROOT)}
    done = subprocess.run([*command, *map(str, paths)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-1000:]
    found = dict.fromkeys((path.stem for path in paths), "did not run")
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("classname").removesuffix(".ipynb").rpartition(".")[2]
        troubles = [cell.text or "" for cell in case if cell.tag in ("failure", "error")]
        found[name] = "\n".join([found[name].removeprefix("did not run"), *troubles]).strip()
    return found


def checked_notebooks(folder: Path) -> list[Path]:
    """A small notebook with a checked cell, `as_it_is`, and its broken twin, `changed`, which should print more."""
    source = nbformat.read(PROJECT_ROOT / "notebooks" / "09_ablations.ipynb", as_version=4)
    cells = [cell for cell in source.cells if cell.cell_type == "code"]
    imports = next(cell for cell in cells if cell.source.startswith("import time")).source
    checked = next(cell for cell in cells if cell.source.startswith("# NBVAL_CHECK_OUTPUT") and cell.outputs)
    small = nbformat.v4.new_notebook(metadata=source.metadata)
    start = nbformat.v4.new_code_cell(imports.split("check_parameters(globals())")[0], execution_count=1)
    for name, more in (("as_it_is", ""), ("changed", "and more")):
        checked.execution_count = 2
        checked.outputs[0]["text"] += more
        small.cells = [start, checked]
        nbformat.write(small, folder / f"{name}.ipynb")
    return [folder / "as_it_is.ipynb", folder / "changed.ipynb"]


@pytest.fixture(scope="module")
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The failures of all notebooks that are asked for, which run once and together: each run loads all libraries."""
    folder = tmp_path_factory.mktemp("nbval")
    wanted = [item for item in request.session.items if request.fixturename in item.fixturenames]
    paths = [item.callspec.params["path"] for item in wanted if hasattr(item, "callspec")]
    return nbval(paths + (checked_notebooks(folder) if len(wanted) > len(paths) else []), folder)


def checked_cells(path: Path) -> int:
    cells = nbformat.read(path, as_version=4).cells
    return sum(cell.source.startswith("# NBVAL_CHECK_OUTPUT") for cell in cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", map(as_they_take, [INDEX, *NOTEBOOKS]), ids=by_name)
def test_it_runs_as_committed_and_its_checked_cells_print_the_same(path: Path, failures: dict[str, str]) -> None:
    assert failures[path.stem] == ""
    assert path.read_bytes() == COMMITTED[path]


@pytest.mark.slow
def test_a_checked_cell_that_prints_something_else_is_caught(failures: dict[str, str]) -> None:
    assert failures["as_it_is"] == "" and "and more" in failures["changed"]


def test_the_series_has_checked_cells() -> None:
    assert sum(map(checked_cells, NOTEBOOKS)) >= 5


# --- the map, the links, Colab ----------------------------------------------------------------------------------------


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text)


def prose(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_the_map_lists_every_notebook_with_its_own_title_and_minutes() -> None:
    """They stand in the order of the reader's way, not of the numbers; exercises say their own minutes."""
    rows = [line for line in prose(INDEX).splitlines() if line.startswith("| [")]
    rows = sorted(rows, key=lambda row: re.search(r"\((\w+)\.ipynb\)", row)[1])
    assert len(rows) == len(NOTEBOOKS)
    for path, row in zip(NOTEBOOKS, rows, strict=True):
        first = nbformat.read(path, as_version=4).cells[0].source.replace("\n", " ")
        title = re.match(r"# (.+?)  ", first)[1]
        minutes = re.search(r"\*\*Minutes\*\* (.+? to read)", first)[1]
        assert row.startswith(f"| [{title}]({path.name}) |") and row.endswith(f"| {minutes} |"), (title, minutes)


@pytest.mark.parametrize("path", [INDEX, *NOTEBOOKS, PROJECT_ROOT / "docs" / "troubleshooting.md"], ids=by_name)
def test_every_link_leads_somewhere(path: Path) -> None:
    text = prose(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for link in links(text):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith(("https://", "http://")):
            assert (path.parent / link.split("#")[0]).exists(), link


def test_the_readme_leads_to_the_troubleshooting_page_and_to_every_notebook() -> None:
    found = links((PROJECT_ROOT / "README.md").read_text(encoding="utf-8"))
    wanted = {f"notebooks/{path.name}" for path in [INDEX, *NOTEBOOKS]} | {"docs/troubleshooting.md"}
    assert wanted <= set(found)


@pytest.mark.field("F20")
@pytest.mark.parametrize("path", [INDEX, *NOTEBOOKS], ids=by_name)
def test_its_first_cell_is_that_of_all_and_names_no_placeholder(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert colab.TAG in cells[1].metadata.tags and not cells[1].outputs
    link = re.search(rf"\[{colab.LABEL}\]\((.+?)\)", cells[0].source)
    repository = re.search(r"/github/([^/]+/[^/]+)/", link[1])[1] if link else ""
    assert cells[1].source == colab.cell_source(repository)
    assert not link or link[1] == colab.LINK.format(repository=repository, name=path.name)
    assert "OWNER" not in path.read_text(encoding="utf-8")


def test_setting_the_repository_twice_changes_nothing_more(tmp_path: Path) -> None:
    copies = []
    for path in [INDEX, NOTEBOOKS[0], NOTEBOOKS[-1]]:
        copies.append(tmp_path / path.name)
        copies[-1].write_bytes(path.read_bytes())
    before = [len(nbformat.read(path, as_version=4).cells) for path in copies]
    assert colab.set_repository(copies, "someone/kit-1.0") == copies
    assert colab.set_repository(copies, "someone/kit-1.0") == []
    assert colab.set_repository(copies, "other/kit") == copies
    for path, cells in zip(copies, before, strict=True):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        text = path.read_text(encoding="utf-8")
        assert "someone/kit-1.0" not in text and text.count("other/kit") == 2 and len(notebook.cells) <= cells + 1
        counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1)) or not any(counts)


@pytest.mark.parametrize("repository", ["owner", "a/b/c", "https://github.com/a/b", "a/b;ls", '"/x', "-a/b"])
def test_what_is_no_repository_is_refused(repository: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allowed: owner/name"):
        colab.set_repository([INDEX], repository)


@pytest.mark.field("F20")
@pytest.mark.parametrize("where", ["Colab", "Kaggle", "VS Code", "VS Code in the checkout's root", "published"])
def test_the_first_cell_finds_the_kit(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = (
        tmp_path / {"Colab": "here", "Kaggle": "input/datasets/someone/kit"}.get(where, "elsewhere") / "grpo_kit-1.whl"
    )
    for folder in (wheel.parent, tmp_path / "here"):
        folder.mkdir(parents=True, exist_ok=True)
    wheel.touch()
    places = {"VS Code": PROJECT_ROOT / "notebooks", "VS Code in the checkout's root": PROJECT_ROOT}
    monkeypatch.chdir(places.get(where, tmp_path / "here"))
    expected = {"Colab": wheel, "Kaggle": wheel, "published": "git+https://github.com/someone/kit"}
    source = colab.cell_source("someone/kit" if where == "published" else "")
    source = source.replace("/kaggle/input", str(tmp_path / "input"))
    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
    exec(source, {})
    assert asked == []  # the kit is there
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(source, {})
    install = [sys.executable, "-m", "pip", "install", "-q", str(expected.get(where, PROJECT_ROOT))]
    assert asked == [install]


def test_the_first_cell_says_what_to_do_where_there_is_no_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssertionError, match="Put the kit's wheel beside this notebook"):
        exec(colab.cell_source(), {})
