"""Notebook 08 reads what a freshly trained policy writes, also what no grammar allows."""

import nbformat
import pytest

from grpo_kit.config import PROJECT_ROOT


@pytest.mark.parametrize("rewrite", ["a red circle, crisp, crisp, of of", "", "clean, clean", "빨간 공"])
def test_a_rewrite_that_cannot_be_read_is_counted_as_such(rewrite: str):
    cells = nbformat.read(PROJECT_ROOT / "notebooks" / "08_evaluate.ipynb", as_version=4).cells
    source = next(cell.source for cell in cells if "def lost_and_new" in cell.source).partition("\ntrained =")[0]
    space: dict = {}
    exec(source, space)
    assert space["lost_and_new"]("a crimson ball", rewrite) == ({"all": "cannot be read"}, {})
    assert space["lost_and_new"]("a crimson ball", "a red circle, sharp") == ({}, {})
    lost, _ = space["lost_and_new"]("a crimson ball", "a blue circle")
    assert len(lost) == 1 and "red → blue" in lost.values()
