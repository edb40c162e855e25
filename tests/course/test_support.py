"""The tests' own reader of exercises: a solution cell runs with what it uses, and with nothing else."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.support import course

SOLUTION = """LIMIT = 3
def double(x):
    ### BEGIN SOLUTION
    return np.minimum(2 * shift(x), top)
    ### END SOLUTION"""


@pytest.fixture(autouse=True)
def notebook(tmp_path, monkeypatch):
    cells = [
        new_code_cell("import numpy as np\nimport nothing_of_that_name"),
        new_code_cell("def shift(x):\n    return x + step\nstep = 1\nheavy = 1 / 0"),
        new_code_cell("top = 10\ntop += 10"),
        new_code_cell(SOLUTION, metadata={"tags": ["exercise:99.1", "solution"]}),
        new_code_cell("step = 50"),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "99_made_up.ipynb")
    monkeypatch.setattr(course, "NOTEBOOKS", tmp_path)


def test_a_solution_runs_with_what_it_uses_of_earlier_cells_and_nothing_else():
    found = course.solution("99.1")
    assert set(found) == {"LIMIT", "double"} and found["double"](2) == 6 and found["double"](30) == 20


def test_a_stub_is_the_same_cell_without_the_region():
    found = course.stub("99.1")
    assert found["LIMIT"] == 3
    with pytest.raises(NotImplementedError):
        found["double"](2)
