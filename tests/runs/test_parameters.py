"""A notebook's parameters: what the command takes, the notebook's own check takes; what neither takes is one line."""

import json
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.grids import write_notebook

from grpo_kit.config import PROJECT_ROOT
from grpo_kit.runs.parameters import (
    TYPES,
    NotebookError,
    Parameter,
    check_parameters,
    declared_parameters,
    settings_in,
)

DECLARED = 'name: str = "x"  # a name\nsizes: list[int] = [1]  # sizes\nrate: float = 0.5  # a rate\nplain = 3\n'
texts = st.one_of(st.text(max_size=20), st.from_regex(r"[-+\[\]{}()'\"0-9eE.,:_ truefalsnid]{0,12}", fullmatch=True))
values = st.one_of(texts, st.integers(), st.floats(), st.booleans(), st.lists(st.integers()), st.none())


@given(st.sampled_from(sorted(TYPES)), values)
def test_what_is_read_passes_the_notebooks_own_check(kind: str, value: object):
    try:
        read = Parameter(kind).read("size", value)
    except NotebookError as error:
        assert "\n" not in str(error) and f"allowed: {kind}" in str(error)
        return
    namespace = {"In": ["", f"size: {kind} = None"], "size": read}
    assert check_parameters(namespace) == {"size": read}
    assert type(read) is TYPES[kind]


def test_a_notebook_declares_what_its_tagged_cell_assigns(tmp_path: Path):
    found = declared_parameters(write_notebook(tmp_path / "00_a.ipynb", "other: int = 1", parameters=DECLARED))
    assert found == {
        "name": Parameter("str", "x"),
        "sizes": Parameter("list", [1]),
        "rate": Parameter("float", 0.5),
        "plain": Parameter("int", 3),
    }


def test_a_notebook_that_was_saved_anew_is_read_anew(tmp_path: Path):
    path = write_notebook(tmp_path / "00_a.ipynb", "1", parameters="size: int = 1")
    assert set(declared_parameters(path)) == {"size"}
    write_notebook(path, "1", parameters="count: int = 1")
    assert set(declared_parameters(path)) == {"count"}


def test_without_history_the_sessions_annotations_count():
    annotations = {"size": "int", "rate": float, "table": "DataFrame"}
    assert check_parameters({"__annotations__": annotations, "size": 3, "rate": 0.5, "table": None}) == {
        "size": 3,
        "rate": 0.5,
    }
    with pytest.raises(NotebookError, match=r"parameter size: found '3', allowed: int;"):
        check_parameters({"__annotations__": annotations, "size": "3", "rate": 0.5})


def test_a_type_that_cannot_be_given_is_named_with_those_that_can():
    with pytest.raises(NotebookError, match=r"parameter place: found 'x', allowed: one of int, float"):
        Parameter("Path").read("place", "x")


@pytest.mark.parametrize(
    "text", ["", "{}", '{"training_settings.beta": 0.1, "generation_settings.temperature": "0.7"}']
)
def test_changes_are_a_json_object(text: str):
    assert settings_in(text) == json.loads(text or "{}")


@pytest.mark.parametrize("text", ["beta=0.1", "[1]", "3", '{"a": 1', "null", '"text"'])
def test_changes_that_are_none_are_one_line(text: str):
    with pytest.raises(NotebookError, match=r"^parameter changes: found .*, allowed: a JSON object, such as"):
        settings_in(text)


def test_a_plain_papermill_run_reaches_every_setting_of_training():
    cells = nbformat.read(PROJECT_ROOT / "notebooks" / "07_train.ipynb", as_version=4).cells
    declared, used = (cell.source for cell in cells[2:4])
    injected = "# Parameters\nchanges = '{\"training_settings.beta\": 0.25}'\n"
    namespace: dict[str, object] = {"In": ["", declared, injected, used]}
    for source in (declared, injected, used):
        exec(source, namespace)
    assert namespace["settings"].beta == 0.25
