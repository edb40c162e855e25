"""Every notebook keeps the contract of the series: one shape, checked parameters, nothing bound to a machine."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import nbformat
import papermill
import pytest

from grpo_kit import course
from grpo_kit.config import PROJECT_ROOT, KitError
from grpo_kit.course.editions import BEGIN, END, NOT_WRITTEN, stub
from grpo_kit.course.exercise import EXERCISES
from grpo_kit.runs.parameters import check_parameters
from tests.support.course import bound, notebook_of, used

NOTEBOOKS = sorted((PROJECT_ROOT / "notebooks").glob("[0-9][0-9]*_*.ipynb"))
MAX_CODE_CELLS, MAX_LINES, MAX_WIDTH = 25, 15, 88
KINDS = {"visible", "mixed", "black-box"}  # the computation can be read; in part; a helper of the kit carries it
MAX_SOLUTION_LINES = 30  # with its markers and docstring
MAX_BYTES, MAX_BYTES_TOGETHER = 1_000_000, 8_000_000
MACHINE = re.compile(r"/(home|root|work|tmp|Users|private|var/folders)/|\.\./|getcwd|sys\.path|%pip|%cd|[A-Z]:\\\\")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

for module in pkgutil.iter_modules(course.__path__):
    if module.name.startswith("exercises_"):
        importlib.import_module(f"grpo_kit.course.{module.name}")
every_exercise = pytest.mark.parametrize("name", sorted(EXERCISES))


def read(path: Path) -> nbformat.NotebookNode:
    """Return the notebook, checked against nbformat's own schema."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return the code cells in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: nbformat.NotebookNode) -> str:
    """Return all markdown as one text."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def tags(cell: nbformat.NotebookNode) -> list[str]:
    """Return a cell's tags."""
    return cell.metadata.get("tags", [])


def exercise_of(cell: nbformat.NotebookNode) -> str | None:
    """Return the name of the exercise that a cell is part of."""
    return next((tag.partition(":")[2] for tag in tags(cell) if tag.startswith("exercise:")), None)


def test_the_first_notebooks_are_there() -> None:
    assert {"00_start_here", "07_train", "08_evaluate"} <= {path.stem for path in NOTEBOOKS}


@every_notebook
def test_it_opens_with_title_objectives_minutes_and_hardware(path: Path) -> None:
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(rf"# {path.stem.partition('_')[0]} · \S", first.source)
    for word in ("You will", "Minutes", "Hardware"):
        assert word in first.source, f"{word} is missing in the first cell"


@every_notebook
def test_parameters_are_plain_annotated_literals_with_help(path: Path) -> None:
    cells = [cell for cell in code(read(path)) if "parameters" in tags(cell)]
    assert len(cells) == 1
    for line in cells[0].source.strip().splitlines():
        assert re.fullmatch(r"\w+: (int|float|str|bool) = [^=#]+  # [^=#]+", line), line
        ast.literal_eval(line.split("=")[1].split("#")[0].strip())


@every_notebook
def test_papermill_reads_every_parameter_with_type_and_help(path: Path) -> None:
    cell = next(cell for cell in code(read(path)) if "parameters" in tags(cell))
    found = papermill.inspect_notebook(str(path))
    assert list(found) == [line.split(":")[0] for line in cell.source.strip().splitlines()]
    assert all(
        entry["help"] and entry["inferred_type_name"] in ("int", "float", "str", "bool") for entry in found.values()
    )
    assert found["profile"]["default"] == '"tiny"'
    assert "run_dir" not in found or found["run_dir"]["default"] == '""'


@every_notebook
def test_the_cell_after_the_parameters_checks_them(path: Path) -> None:
    cells = code(read(path))
    place = next(i for i, cell in enumerate(cells) if "parameters" in tags(cell))
    assert "check_parameters(globals())" in cells[place + 1].source


@every_notebook
def test_cells_are_few_short_and_parse(path: Path) -> None:
    cells = code(read(path))
    counted = [cell for cell in cells if not {"colab", "predict"} & set(tags(cell)) and not exercise_of(cell)]
    assert len(counted) <= MAX_CODE_CELLS  # without the one that only installs the kit, exercises and predictions
    for cell in cells:
        lines = cell.source.splitlines()
        most = MAX_SOLUTION_LINES if "solution" in tags(cell) else MAX_LINES
        assert len(lines) <= most and max(map(len, lines)) <= MAX_WIDTH, cell.source
        ast.parse(cell.source)


@every_notebook
def test_functions_are_defined_only_where_they_are_taught(path: Path) -> None:
    for cell in code(read(path)):
        if "taught" not in tags(cell):
            nodes = ast.walk(ast.parse(cell.source))
            assert not any(isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)) for n in nodes), (
                cell.source
            )


@every_notebook
def test_it_has_checkpoints_and_ends_with_recap_exercises_and_release(path: Path) -> None:
    notebook = read(path)
    asserts = [n for cell in code(notebook) for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Assert)]
    assert len(asserts) >= 3
    assert "You should see" in prose(notebook) or "you should see" in prose(notebook)
    headings = re.findall(r"^## (.+)$", prose(notebook), flags=re.MULTILINE)
    assert "Recap" in headings
    in_the_text = {exercise_of(cell) for cell in notebook.cells} - {None}
    at_the_end = re.findall(r"\(\d+ min", prose(notebook).partition("\n## Exercises\n")[2])
    assert len(in_the_text) + len(at_the_end) >= 2
    assert "gk.release(" in code(notebook)[-1].source


@every_notebook
def test_nothing_in_it_is_bound_to_a_machine_or_a_folder(path: Path) -> None:
    for cell in read(path).cells:
        found = MACHINE.search(cell.source)
        assert found is None, f"{found.group(0)} in: {cell.source[:200]}"
        assert "widgets.Output" not in cell.source
        for output in cell.get("outputs", []):
            text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            assert MACHINE.search(text) is None, text[:300]


@every_notebook
def test_what_is_committed_is_clean_and_small(path: Path) -> None:
    notebook = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata
    assert path.stat().st_size <= MAX_BYTES
    assert not [o for cell in code(notebook) for o in cell.outputs if o.output_type == "error"]
    counts = [cell.execution_count for cell in code(notebook)]
    whole = counts == list(range(1, len(counts) + 1)) or not any(counts)
    assert whole, "run it from top to bottom, or clear all outputs, before committing"


@pytest.mark.trap("T21")
def test_a_notebook_says_that_a_loss_of_0_is_no_failure() -> None:
    text = prose(read(PROJECT_ROOT / "notebooks" / "07_train.ipynb"))
    section = text.split("### A loss of 0 that learns")[1].split("###")[0]
    assert "That is no failure" in section and "gradient" in section


def test_all_notebooks_together_stay_small() -> None:
    committed = [*NOTEBOOKS, *(PROJECT_ROOT / "notebooks" / "ko").glob("*.ipynb")]
    assert sum(path.stat().st_size for path in committed) <= MAX_BYTES_TOGETHER


# --- the check that every notebook's second cell makes --------------------------------------------------------------

DECLARED = 'profile: str = "tiny"  # a name\ngroup_size: int = 0  # 0: as the profile says\nrate: float = 0.5  # a rate'


def session(injected: str = "", **values: object) -> dict[str, object]:
    """Return a notebook's namespace after its parameters cell and papermill's injected one."""
    namespace: dict[str, object] = {"In": ["", DECLARED, f"# Parameters\n{injected}" if injected else "1 + 1"]}
    return namespace | {"profile": "tiny", "group_size": 0, "rate": 0.5} | values


def test_declared_parameters_pass_also_when_injected_and_after_the_whole_notebook_ran() -> None:
    expected = {"profile": "tiny", "group_size": 8, "rate": 1}
    found = check_parameters(session("group_size = 8\nrate = 1", group_size=8, rate=1, later="a variable"))
    assert found == expected


def test_a_typo_stops_with_the_nearest_name() -> None:
    with pytest.raises(KitError, match=r"parameter gruop_size: not in this notebook.*did you mean group_size"):
        check_parameters(session("gruop_size = 8", gruop_size=8))


@pytest.mark.parametrize("wrong", [{"group_size": "8"}, {"group_size": 8.0}, {"group_size": True}, {"profile": 1}])
def test_a_wrong_type_stops_with_the_value(wrong: dict) -> None:
    (name, value), *_ = wrong.items()
    with pytest.raises(KitError, match=re.escape(f"parameter {name}: found {value!r}, allowed:")):
        check_parameters(session(**wrong))


def test_without_a_parameters_cell_it_says_so() -> None:
    with pytest.raises(KitError, match="found no cell that declares them"):
        check_parameters({"In": ["", "%matplotlib inline", "x = 1"]})


def test_at_most_a_quarter_of_the_cells_that_teach_are_black_boxes() -> None:
    kinds = [set(tags(cell)) & KINDS for path in NOTEBOOKS for cell in code(read(path))]
    assert all(len(kind) <= 1 for kind in kinds), "a cell is of one kind"
    told = [kind.pop() for kind in kinds if kind]
    assert told.count("black-box") <= len(told) / 4, {kind: told.count(kind) for kind in KINDS}


# --- predict, then look -----------------------------------------------------------------------------------------------


def outcomes(notebook: nbformat.NotebookNode) -> list[tuple[str, nbformat.NotebookNode]]:
    """Return each prediction's name, with the code cell after it, which is to show the outcome beside it."""
    cells, found = code(notebook), []
    for number, cell in enumerate(cells):
        if "predict" in tags(cell):
            after = next(one for one in cells[number + 1 :] if "predict" not in tags(one))
            found.append((re.fullmatch(r"(\w+) = [^#]+  # predict: \S.*", cell.source)[1], after))
    return found


def wrong_predictions(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the names of those that are not shown with their outcome, or that other code needs."""
    wrong = []
    for name, after in outcomes(notebook):
        prints = re.findall(rf'^ *print\("you said:", {name}, "  ', after.source, flags=re.MULTILINE)
        shown = "".join(one.get("text", "") for one in after.outputs)
        nodes = [node for cell in code(notebook) for node in ast.walk(ast.parse(cell.source))]
        named = sum(isinstance(node, ast.Name) and node.id == name for node in nodes)
        wrong += [name] * (len(prints) != 1 or "you said: " not in shown or named != 2)
    return wrong


def test_the_series_asks_for_twenty_predictions_in_all_its_notebooks_of_the_method() -> None:
    asked = {path.stem.partition("_")[0]: len(outcomes(read(path))) for path in NOTEBOOKS}
    assert sum(asked.values()) >= 20 and all(asked[name] for name in asked.keys() - {"10", "12"}), asked


@every_notebook
def test_a_prediction_is_one_line_shown_with_its_outcome_and_needed_nowhere_else(path: Path) -> None:
    """So that a notebook runs with None too, and so that the outcome is not what somebody has said."""
    notebook = read(path)
    assert wrong_predictions(notebook) == []
    for number, cell in enumerate(notebook.cells):
        if "predict" in tags(cell):
            assert "Predict" in notebook.cells[number - 1].source, "a question stands before it"


@pytest.mark.parametrize("change", [("you said:", "so:"), ("likelier, ", "[0, 1], "), ("positive = ", "likelier = ")])
def test_a_prediction_that_is_not_shown_or_that_code_needs_is_caught(change: tuple[str, str]) -> None:
    notebook = read(PROJECT_ROOT / "notebooks" / "00_start_here.ipynb")
    _, after = outcomes(notebook)[0]
    after.source = after.source.replace(*change)
    assert wrong_predictions(notebook) == ["likelier"]


# --- the exercises in the text ----------------------------------------------------------------------------------------


def cells_of(name: str) -> list[nbformat.NotebookNode]:
    """Return the exercise's three cells, which follow each other."""
    found = [(n, cell) for n, cell in enumerate(read(notebook_of(name)).cells) if exercise_of(cell) == name]
    assert len(found) == 3 and found[2][0] - found[0][0] == 2, f"{name}: three cells, one right after the other"
    return [cell for _, cell in found]


@every_exercise
def test_an_exercise_is_a_text_with_three_hints_a_solution_and_a_check(name: str) -> None:
    task = EXERCISES[name]
    text, solution, check = cells_of(name)
    assert [text.cell_type, solution.cell_type, check.cell_type] == ["markdown", "code", "code"]
    lines = text.source.splitlines()
    assert lines[0] == f"### Exercise {name} · {task.title}"
    assert f"{task.minutes} minutes · difficulty {task.difficulty} of 5" in lines
    assert re.findall(r"<summary>(.+?)</summary>", text.source) == ["Hint 1", "Hint 2", "Hint 3"]
    assert 1 <= task.difficulty <= 5 and task.minutes % 5 == 0
    assert {"solution", "taught"} <= set(tags(solution)) and solution.metadata["jupyter"]["source_hidden"] is True
    assert solution.source.count(BEGIN) == solution.source.count(END) >= 1
    for hidden in (stub(solution.source), text.source):  # neither the learner's cell nor a hint is the solution
        assert BEGIN not in hidden and END not in hidden
    assert stub(solution.source).count(NOT_WRITTEN) == solution.source.count(BEGIN)
    assert "check" in tags(check) and f'check("{name}", ' in check.source
    said = [output.get("data", {}).get("text/plain") for output in check.outputs]
    assert str(said[-1]).startswith(f"✓ {name}: {task.title}: "), "execute the notebook: its check must pass"


@every_notebook
def test_every_exercise_of_a_notebook_has_a_check(path: Path) -> None:
    found = {exercise_of(cell) for cell in read(path).cells} - {None}
    assert found <= set(EXERCISES) and all(notebook_of(name) == path for name in found)


@every_notebook
def test_nothing_else_in_a_notebook_needs_what_a_learner_has_to_write(path: Path) -> None:
    for name in {exercise_of(cell) for cell in read(path).cells} - {None}:
        written = bound(ast.parse(cells_of(name)[1].source).body)
        for cell in code(read(path)):
            needed = written & used(cell.source)
            assert exercise_of(cell) or not needed, f"{needed} of exercise {name}: its stub would stop this cell"
