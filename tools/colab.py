"""Give notebooks what they need to start on Colab: a link at their top, and a cell that gets the kit there.

Colab opens a notebook by its address on GitHub and brings nothing else of the repository, so the address has to stand
in the notebook. `python -m tools.colab owner/name` writes it into all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import nbformat

from grpo_kit.config import PROJECT_ROOT, KitError

UNSET = "OWNER/grpo_kit"  # until somebody publishes the repository
TAG = "colab"  # of the cell, which JupyterLab shows folded and a report not at all
LABEL = "▶ Open in Colab"
LINK = "https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}"
CELL = """\
# Only for Colab: gets the kit, in 2 to 4 minutes. Elsewhere it does nothing.
import sys

if "google.colab" in sys.modules:
    import os
    import site
    import subprocess

    source, here = "https://github.com/{repository}", "grpo_kit_checkout"
    if not os.path.isdir(here):
        subprocess.run(["git", "clone", "-q", "--depth=1", source, here], check=True)
    install = [sys.executable, "-m", "pip", "install", "-q", "-e", here]
    subprocess.run(install, check=True)
    site.addsitedir(here)"""


def set_repository(notebooks: Sequence[Path], repository: str) -> list[Path]:
    """Write link and cell into notebooks, in place of those that are there; return the notebooks that changed.

    Args:
        notebooks: their files.
        repository: `owner/name` on GitHub.

    Raises:
        KitError: the repository is not of that form, or a notebook does not begin with text.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+", repository):
        raise KitError(f"repository {repository!r:.80}: allowed: owner/name, as on GitHub")
    return [path for path in notebooks if _prepare(path, repository)]


def _prepare(path: Path, repository: str) -> bool:
    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    if not notebook.cells or notebook.cells[0].cell_type != "markdown":
        raise KitError(f"{path}: does not begin with a text cell. Give it a title first")
    first = notebook.cells[0]
    text = re.sub(rf"\s*\[{LABEL}\]\([^)]*\)\s*\Z", "", first.source)
    first.source = f"{text}\n\n[{LABEL}]({LINK.format(repository=repository, name=path.name)})"
    _place_cell(notebook, CELL.format(repository=repository))
    after = nbformat.writes(notebook) + "\n"
    if after != before:
        path.write_text(after, encoding="utf-8")
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
    cell.execution_count = 1 if ran else None
    notebook.cells.insert(1, cell)


def main(repository: str) -> None:
    """Set the repository in all notebooks of the series and in its index."""
    folder = PROJECT_ROOT / "notebooks"
    notebooks = [folder / "index.ipynb", *sorted(folder.glob("[0-9][0-9]_*.ipynb"))]
    changed = set_repository(notebooks, repository)
    print(f"{len(changed)} of {len(notebooks)} notebooks changed")


if __name__ == "__main__":
    import typer

    try:
        typer.run(main)
    except KitError as mistake:
        raise SystemExit(f"colab: {mistake}") from None
