"""Give notebooks what they need to start where the kit is not installed: a cell that installs it, and a link to Colab.

The cell serves Colab, Kaggle and a new kernel of VS Code alike: it takes the kit's wheel, where one was put beside the
notebook or attached on Kaggle, or the checkout in which the notebook lies. `python -m tools.colab` writes it into all
notebooks. Who publishes the repository gives its address, `python -m tools.colab owner/name`: then the cell gets the
kit from there, and a link opens the notebook on Colab, which brings nothing else of the repository.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import nbformat
import typer

from grpo_kit.config import PROJECT_ROOT, KitError
from grpo_kit.runs.notebooks import select_notebooks

TAG = "colab"  # of the cell, which JupyterLab shows folded and a report not at all
LABEL = "▶ Open in Colab"
LINK = "https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}"
CELL = """\
# Where the kit is missing (Colab, Kaggle, a new kernel): installs it in 2 to 4 minutes.
import importlib.util

if importlib.util.find_spec("grpo_kit") is None:
    import subprocess
    import sys
    from pathlib import Path

    here, kaggle = Path.cwd(), Path("/kaggle/input")
    kits = [*here.glob("grpo_kit-*.whl"), *kaggle.rglob("grpo_kit-*.whl")]
    kits += [p for p in (here, *here.parents) if (p / "grpo_kit/cli.py").is_file()]
"""
PUBLISHED = '    kits += ["git+https://github.com/{repository}"]\n'
UNPUBLISHED = '    assert kits, "Put the kit\'s wheel beside this notebook; `pip wheel .` makes it"\n'
INSTALL = """\
    install = [sys.executable, "-m", "pip", "install", "-q", str(kits[0])]
    subprocess.run(install, check=True)
    importlib.invalidate_caches()"""


def cell_source(repository: str = "") -> str:
    """The cell's code; of a published repository, `owner/name`, with its address."""
    return CELL + (PUBLISHED.format(repository=repository) if repository else UNPUBLISHED) + INSTALL


def set_repository(notebooks: Sequence[Path], repository: str = "") -> list[Path]:
    """Write cell and link into notebooks, in place of those that are there; return the notebooks that changed.

    Args:
        notebooks: their files.
        repository: `owner/name` on GitHub; "" before it is published: no link.

    Raises:
        KitError: the repository is not of that form, or a notebook does not begin with text.
    """
    if repository and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+", repository):
        raise KitError(f"repository {repository!r:.80}: allowed: owner/name, as on GitHub")
    return [path for path in notebooks if _prepare(path, repository)]


def _prepare(path: Path, repository: str) -> bool:
    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    if not notebook.cells or notebook.cells[0].cell_type != "markdown":
        raise KitError(f"{path}: does not begin with a text cell. Give it a title first")
    first = notebook.cells[0]
    first.source = re.sub(rf"\s*\[{LABEL}\]\([^)]*\)\s*\Z", "", first.source)
    if repository:
        first.source += f"\n\n[{LABEL}]({LINK.format(repository=repository, name=path.name)})"
    _place_cell(notebook, cell_source(repository))
    after = nbformat.writes(notebook) + "\n"
    if after != before:
        path.write_text(after, encoding="utf-8", newline="\n")
    return after != before


def _place_cell(notebook: nbformat.NotebookNode, source: str) -> None:
    """Put the cell behind the title; one that is there keeps its place and its count."""
    there = [cell for cell in notebook.cells if TAG in cell.metadata.get("tags", [])]
    if there:
        there[0].source = source
        return
    folded = {"tags": [TAG], "jupyter": {"source_hidden": True}}
    cell = nbformat.v4.new_code_cell(source, metadata=folded, id="colab")
    ran = [other for other in notebook.cells if other.cell_type == "code" and other.execution_count]
    for other in ran:  # as if the notebook had been run with it
        other.execution_count += 1
        for output in other.outputs:
            if "execution_count" in output:
                output.execution_count = other.execution_count
    cell.execution_count = 1 if ran else None
    notebook.cells.insert(1, cell)


def main(repository: Annotated[str, typer.Argument()] = "") -> None:
    """Write the cell, and for a REPOSITORY, owner/name, the link, into all notebooks of the series and its map."""
    folder = PROJECT_ROOT / "notebooks"
    notebooks = [folder / "index.ipynb", *select_notebooks(folder=folder)]
    changed = set_repository(notebooks, repository)
    print(f"{len(changed)} of {len(notebooks)} notebooks changed")


if __name__ == "__main__":
    try:
        typer.run(main)
    except KitError as mistake:
        raise SystemExit(f"colab: {mistake}") from None
