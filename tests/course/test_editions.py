"""The editions of the notebooks: what a learner gets, what a teacher gets, slides and the wheelhouse."""

import io
import itertools
import json
import re
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest

from grpo_kit import cli, course
from grpo_kit.config import PROJECT_ROOT, KitError
from grpo_kit.course import editions
from grpo_kit.course.exercise import find_exercise
from grpo_kit.runs import notebooks as headless
from grpo_kit.runs.kernels import WarmKernel

NOTEBOOK = "00_start_here.ipynb"
NBGRADER = {"grade", "grade_id", "locked", "schema_version", "solution", "task"}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    editions.write_students(folder)
    return folder


@pytest.fixture(scope="module")
def solutions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("solutions")
    editions.write_solutions(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    editions.write_teacher(folder)
    return folder


def _cells(path: Path) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook.cells


def _tagged(path: Path, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in _cells(path) if tag in cell.metadata.get("tags", [])]


# --- the learner's edition --------------------------------------------------------------------------------------------


def test_a_learner_gets_every_file_of_the_series_without_solutions_and_outputs(student: Path):
    source = PROJECT_ROOT / "notebooks"
    names = {path.relative_to(source) for path in source.rglob("*.*") if path.is_file() and ".ipynb_" not in str(path)}
    assert {path.relative_to(student) for path in student.rglob("*.*") if path.is_file()} == names
    for path in student.rglob("*.ipynb"):  # ko/ too
        assert "BEGIN SOLUTION" not in path.read_text(encoding="utf-8")
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in _cells(path))
        for cell in _tagged(path, "solution"):
            assert cell.source.count("raise NotImplementedError()") >= 1 and "source_hidden" not in str(cell.metadata)


@pytest.mark.parametrize("edition", ["student", "solutions"])
def test_no_link_leads_out_of_an_edition(edition: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(edition)
    for path in folder.rglob("*.ipynb"):
        text = "\n".join(cell.source for cell in _cells(path) if cell.cell_type == "markdown")
        for link in re.findall(r"\]\(([^)\s#]+)", text):
            assert ":" in link or (path.parent / link).exists(), (path.name, link)
    assert "references (`docs/notation.md`)" in _cells(folder / "index.ipynb")[0].source


def test_only_outputs_solutions_predictions_and_metadata_differ(student: Path):
    committed, given = _cells(PROJECT_ROOT / "notebooks" / NOTEBOOK), _cells(student / NOTEBOOK)
    assert len(committed) == len(given)
    for one, other in zip(committed, given, strict=True):
        tags = set(one.metadata.get("tags", []))
        assert (one.source == other.source) == (not tags & {"solution", "predict"})


def test_a_prediction_is_open_and_says_what_may_be_answered(student: Path):
    sources = [cell.source for path in student.glob("*.ipynb") for cell in _tagged(path, "predict")]
    assert len(sources) >= 20 and all(re.fullmatch(r"\w+ = None  # predict: .+", source) for source in sources)


def test_the_metadata_is_that_of_nbgrader(student: Path):
    metadata = [
        cell.metadata.nbgrader
        for path in student.glob("*.ipynb")
        for cell in _cells(path)
        if "nbgrader" in cell.metadata
    ]
    korean = [cell.metadata.get("nbgrader") for path in student.glob("ko/*.ipynb") for cell in _cells(path)]
    assert sorted(map(str, filter(None, korean))) == sorted(map(str, metadata))  # the same in either language
    ids = [one.grade_id for one in metadata]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]+", name) for name in ids)
    for one in metadata:
        assert set(one) == NBGRADER | ({"points"} if one.grade else set()) and one.schema_version == 3
        assert one.grade == one.locked != one.solution == (not one.grade_id.endswith("-check"))


def test_a_learners_work_is_not_overwritten(student: Path):
    path = student / NOTEBOOK
    before = path.read_bytes()
    path.write_bytes(before + b"\n")
    try:
        with pytest.raises(KitError, match="there already, and differs"):
            editions.write_students(student)
    finally:
        path.write_bytes(before)
    editions.write_students(student)  # the same again is fine


def test_cells_for_the_teacher_alone_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    secret = nbformat.v4.new_markdown_cell("what to say", metadata={"tags": ["teacher"]})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 00 · Title"), secret])
    nbformat.write(notebook, tmp_path / "00_title.ipynb")
    monkeypatch.setattr(headless, "NOTEBOOK_FOLDER", tmp_path)
    for write in (editions.write_students, editions.write_solutions):
        write(tmp_path / write.__name__)
        assert "what to say" not in (tmp_path / write.__name__ / "00_title.ipynb").read_text(encoding="utf-8")
    editions.write_teacher(tmp_path / "teacher")
    assert "what to say" in (tmp_path / "teacher" / "00_title.md").read_text(encoding="utf-8")


def test_under_nbgrader_a_failed_check_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    with pytest.raises(Exception, match="expected"):
        course.check("00.1", lambda rewards: rewards)
    assert course.check("00.2", lambda: [1, 0], [0.0, 1.0]).passed


# --- the others -------------------------------------------------------------------------------------------------------


def test_the_solutions_are_open_and_executed(solutions: Path):
    cells = _tagged(solutions / NOTEBOOK, "solution")
    assert cells and all("### BEGIN SOLUTION" in cell.source and "jupyter" not in cell.metadata for cell in cells)
    assert all(cell.outputs for cell in _tagged(solutions / NOTEBOOK, "check"))


def test_the_teachers_page_has_minutes_tasks_answers_and_misconceptions(teacher: Path):
    page = (teacher / "00_start_here.md").read_text(encoding="utf-8")
    assert page.startswith("# 00 · Start here\n\n**Minutes**")
    for text in (
        "### Exercise 00.1 ·",
        "5 minutes · difficulty 1 of 5",
        "def advantages_of(rewards):",
        "* the mean of the group is not subtracted\n",
        "* a number stands twice\n",
        "Predict, then look:",
    ):
        assert text in page, text
    assert "Hint 1" not in page and "BEGIN SOLUTION" not in page
    for place, heading in (("", "if you are late, skip"), ("ko", "늦어지면 건너뛸 것")):
        plan = (teacher / place / "workshop.md").read_text(encoding="utf-8")
        assert heading in plan and len(re.findall(r"^\d+\. \*", plan, flags=re.MULTILINE)) == 12


def test_the_teachers_pages_in_korean_have_the_same_minutes_and_answers_and_nothing_in_english(teacher: Path):
    names = {path.name for path in teacher.glob("*.md")}
    assert names == {path.name for path in (teacher / "ko").glob("*.md")} and len(names) > 10
    for name in names - {"workshop.md"}:
        english, korean = ((teacher / place / name).read_text(encoding="utf-8") for place in ("", "ko"))
        code = [re.findall(r"^```python\n.*?^```$", page, flags=re.DOTALL | re.MULTILINE) for page in (english, korean)]
        assert code[0] == code[1] and korean.count("\n* ") == english.count("\n* ")
        assert re.search(r"^# .+\n\n\*\*소요 시간\*\*", korean)
        korean = korean.replace("* two samples\n", "")  # an answer that a learner writes, in English
        said = re.sub(r"```python\n.*?```|`[^`\n]+`|\$.+?\$", "", korean, flags=re.DOTALL).splitlines()
        assert not [line for line in said if len(re.findall("[a-z]{2}", line)) > 3 and not re.search("[가-힣]", line)]


def test_the_plans_minutes_follow_each_other_up_to_180():
    rows = re.findall(r"^\| (\d+)–(\d+) \|", editions.WORKSHOP.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert rows[0][0] == "0" and rows[-1][1] == "180"
    assert all(before[1] == after[0] for before, after in itertools.pairwise(rows))


def words_of_sections(number: str) -> dict[str, int]:
    """Section of a notebook → the words of its text, without exercises."""
    (path,) = (PROJECT_ROOT / "notebooks").glob(f"{number}_*.ipynb")
    texts = [cell for cell in _cells(path) if cell.cell_type == "markdown" and "exercise:" not in str(cell.metadata)]
    text = "\n\n".join(cell.source for cell in texts)
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0]: len(part.split()) for part in parts}


def test_the_exercises_and_the_text_of_the_plan_fit_into_their_rows():
    """At 200 words a minute, with at least half a minute left for what runs."""
    plan = editions.WORKSHOP.read_text(encoding="utf-8")
    read = re.findall(r"^\* (\d+)–\d+, (\w+): (.+?)\.$", plan, flags=re.MULTILINE | re.DOTALL)
    named, sections = [], {start: (number, text) for start, number, text in read}
    for start, end, text in re.findall(r"^\| (\d+)–(\d+) \|(.+)", plan, flags=re.MULTILINE):
        does = re.findall(r"\d\db?\.\d", text.split("|")[2])
        minutes = sum(find_exercise(name).minutes for name in does)
        if start in sections:
            number, titles = sections.pop(start)
            assert f"| {number} |" in text
            words = words_of_sections(number)
            minutes += sum(words[" ".join(title.split())] for title in re.findall('"([^"]+)"', titles)) / 200 + 0.5
        assert minutes <= int(end) - int(start), (text, minutes)
        named += does
    assert not sections and len(named) == len(set(named)) == 10


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("00.2", "a number stands twice"),  # a key
        ("06.3", "the gradient also went through how often an action is sampled: detach the probabilities"),  # its name
        ("04.2", "the sign is turned: better pictures must have higher numbers"),  # a variable named idea
        ("04.3", "both judges like it: that is a good rewrite"),  # a value
    ],
)
def test_the_misconceptions_of_a_check_are_found(name: str, sentence: str):
    assert sentence in editions.misconceptions(find_exercise(name))


# --- slides -----------------------------------------------------------------------------------------------------------


NOTES = {"reveal.js 5": "plugin/notes/notes.js", "reveal.js 6": "dist/plugin/notes.js"}
NAMES = {
    f"js/{name}"
    for name in "dist/reveal.js dist/reveal.css dist/theme/white.css plugin/notes/notes.js tex-svg.js".split()
}


def _libraries(tmp_path: Path, notes: str = NOTES["reveal.js 5"]) -> list[Path]:
    wheel, npm = tmp_path / "a.whl", tmp_path / "mathjax.tgz"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("dist/reveal.js", "dist/reveal.css", "dist/theme/white.css", notes):
            archive.writestr(f"some_package/static/{name}", f"/* {name} */")
        archive.writestr("some_package/static/dist/../../../escape.js", "no")
        archive.writestr("some_package-1.dist-info/METADATA", "no")
    with tarfile.open(npm, "w:gz") as archive:
        member = tarfile.TarInfo("package/es5/tex-svg.js")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"/**"))
    return [wheel, npm]


def _scripts(slides: Path) -> set[str]:
    return {path.relative_to(slides).as_posix() for path in (slides / "js").rglob("*") if path.is_file()}


@pytest.mark.parametrize("version", NOTES)
def test_what_slides_need_is_copied_from_either_reveal_js(
    tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch
):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 00")]), tmp_path / "00_title.ipynb")
    monkeypatch.setattr(headless, "NOTEBOOK_FOLDER", tmp_path)
    editions.write_slides(tmp_path / "slides", _libraries(tmp_path, NOTES[version]))
    assert _scripts(tmp_path / "slides") == NAMES


def test_slides_need_no_network(tmp_path: Path):
    folder = tmp_path / "slides"
    editions.write_slides(folder, _libraries(tmp_path))
    names = _scripts(folder)
    assert names == NAMES
    for language, place, task, hint in (
        ("en", "", "Exercise 00.1", "Hint 1"),
        ("ko", "ko/", "연습문제 00.1", "힌트 1"),
    ):
        page = (folder / place / "00_start_here.html").read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']([^\"']+)", page)
        files = [name.removeprefix("../" if place else "") for name in loaded if not name.startswith("data:image/png;")]
        assert set(files) <= names and "js/dist/reveal.js" in files and "@import" not in page
        assert page.count("<section") > 10 and len(loaded) - len(files) > 3 and f'<html lang="{language}"' in page
        assert task in page and hint not in page and "BEGIN" not in page and '.ipynb">' not in page[: page.find("<h2")]


def test_without_reveal_js_one_line_says_how_to_get_it(tmp_path: Path):
    with pytest.raises(KitError, match=r"pip download --no-deps .*npm pack reveal\.js.*--js FILE"):
        editions.write_slides(tmp_path / "slides", _libraries(tmp_path)[1:])
    with pytest.raises(KitError, match="no archive"):
        editions.write_slides(tmp_path / "slides", [tmp_path / "none.whl"])


# --- the wheelhouse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["", "https://example.org/cpu"])
def test_the_wheelhouse_is_the_lock_and_the_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: str):
    ran = []
    monkeypatch.setattr(
        editions.subprocess, "run", lambda given, check: ran.append(given) or SimpleNamespace(returncode=0)
    )
    monkeypatch.setattr(editions.sys, "platform", "linux")
    if index:
        with pytest.raises(KitError, match="found no torch for CPUs in"):
            editions.write_wheelhouse(tmp_path, index)
        (tmp_path / "torch-2.15.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
        ran.clear()
    editions.write_wheelhouse(tmp_path, index)
    pins, kit = ran
    assert any(pin.startswith("torch==") for pin in pins) and kit[-1] == str(PROJECT_ROOT)
    assert any(pin.startswith("nvidia-") for pin in pins) == (not index) and (index in pins) == bool(index)
    assert all("--no-deps" in given and given[given.index("-w") + 1] == str(tmp_path) for given in ran)


def test_a_wheelhouse_that_pip_cannot_fill_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(editions.subprocess, "run", lambda given, check: SimpleNamespace(returncode=1))
    with pytest.raises(KitError, match="pip stopped with 1"):
        editions.write_wheelhouse(tmp_path)


# --- commands, and catching up ----------------------------------------------------------------------------------------


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture):
    for what in ("student", "solutions", "teacher"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["course", what, str(tmp_path / what)])
        assert not stop.value.code
    with pytest.raises(SystemExit) as stop:
        cli.main(["course", "class", str(tmp_path / "none.jsonl")])
    assert stop.value.code == 2 and "cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["course", "slides", str(tmp_path / "slides")])
    assert stop.value.code == 2 and "found no reveal.js" in capsys.readouterr().err


def test_catching_up_needs_a_notebook():
    with pytest.raises(KitError, match="catch_up: found no notebook"):
        course.catch_up("00.1")
    with pytest.raises(KitError, match="exercise: found"):
        course.catch_up("00.9")


def test_catching_up_defines_what_the_exercise_asks_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    course.catch_up("00.1")
    said = capsys.readouterr().out
    assert "def advantages_of(rewards):" in said and "SOLUTION" not in said
    assert course.check("00.1", shell.user_ns["advantages_of"]).passed


# --- both editions of 00, executed ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("edition", ["students", pytest.param("solutions", marks=pytest.mark.long)])
def test_the_edition_runs_from_top_to_bottom(tmp_path: Path, edition: str):
    getattr(editions, f"write_{edition}")(tmp_path)
    places = (str(tmp_path / NOTEBOOK), str(tmp_path / "out.ipynb"))
    options = {"kernel_manager_class": WarmKernel, "start_timeout": 600}  # the warm process imports all libraries first
    papermill.execute_notebook(*places, kernel_name="python3", cwd=tmp_path, **options)
    said = [json.dumps(cell.outputs, ensure_ascii=False) for cell in _tagged(tmp_path / "out.ipynb", "check")]
    expected = "not written yet" if edition == "students" else "✓ 00."
    assert len(said) == 2 and all(expected in text for text in said)
    outputs = json.dumps([cell.get("outputs") for cell in _cells(tmp_path / "out.ipynb")])
    answers = re.findall(r"you said: (\S+)", outputs)
    assert len(answers) == 2 and all((answer == "None") == (edition == "students") for answer in answers)
