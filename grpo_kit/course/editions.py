"""The editions of the notebooks that a course needs, all cut from the committed ones: their cells' tags say how."""

import ast
import inspect
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_kit.config.errors import KitError
from grpo_kit.config.paths import PROJECT_ROOT
from grpo_kit.course.exercise import Exercise, find_exercise
from grpo_kit.course.spoken import spoken
from grpo_kit.runs.notebooks import lay_out, select_notebooks, series_files

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
NOT_WRITTEN = "raise NotImplementedError()"
COURSE = PROJECT_ROOT / "data" / "course"
WORKSHOP = COURSE / "workshop.md"  # the plan of 180 minutes
_REGION = re.compile(rf"^([ \t]*){BEGIN}\n.*?^[ \t]*{END}$", flags=re.MULTILINE | re.DOTALL)
_PREDICTION = re.compile(r"^(\w+) = .*?(  #.*)?$", flags=re.MULTILINE)
_OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+((?:docs|reports)/[^)\s]+)\)")  # not beside an edition
_MINUTES = re.compile(r"^\*\*(?:Minutes|소요 시간)\*\*.*$", flags=re.MULTILINE)
_ASIDE = re.compile(r"\n*<details>[\s\S]*?</details>|^.*\[(?:English|한국어)\]\(.*\n\n", flags=re.MULTILINE)


def stub(source: str) -> str:
    """Return a cell's code with each solution region replaced by a line that says that it is not written yet."""
    return _REGION.sub(rf"\g<1>{NOT_WRITTEN}", source)


def write_students(folder: Path) -> list[Path]:
    """Write the learners' edition: stubs, open predictions, no outputs; with the metadata of nbgrader (format 3)."""
    return lay_out(folder, _notebooks(_for_students))


def write_solutions(folder: Path) -> list[Path]:
    """Write the edition with its solutions open, the source from which nbgrader makes its own assignment."""
    return lay_out(folder, _notebooks(_graded))


def _notebooks(edit: Callable[[dict], dict]) -> dict[str, bytes]:
    """The files of the series, by their path in its folder; the cells of the notebooks edited."""
    files = series_files()
    for name in [name for name in files if name.endswith(".ipynb")]:
        notebook = json.loads(files[name])
        kept = [cell for cell in notebook["cells"] if "teacher" not in _tags(cell)]
        for cell in (one for one in kept if one["cell_type"] == "markdown"):
            cell["source"] = _OUTSIDE.sub(r"\1 (`\2`)", "".join(cell["source"])).splitlines(keepends=True)
        notebook["cells"] = [edit(cell) for cell in kept]
        files[name] = (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode()
    return files


def _tags(cell: Mapping) -> list[str]:
    return cell["metadata"].get("tags", [])


def _exercise(cell: Mapping) -> Exercise | None:
    name = next((tag.partition(":")[2] for tag in _tags(cell) if tag.startswith("exercise:")), None)
    return find_exercise(name) if name else None


def _graded(cell: dict) -> dict:
    """Give an exercise's code cells what nbgrader reads; the solution is no longer folded."""
    task, kinds = _exercise(cell), {"solution", "check"}.intersection(_tags(cell))
    if task and kinds:
        cell["metadata"].pop("jupyter", None)
        is_check, name = kinds == {"check"}, f"exercise-{task.name.replace('.', '-')}"
        form = {"grade": is_check, "locked": is_check, "solution": not is_check, "task": False, "schema_version": 3}
        own = {"grade_id": f"{name}-check", "points": task.difficulty} if is_check else {"grade_id": name}
        cell["metadata"]["nbgrader"] = form | own
    return cell


def _for_students(cell: dict) -> dict:
    cell, source = _graded(cell), "".join(cell["source"])
    if cell["cell_type"] == "code":
        cell |= {"outputs": [], "execution_count": None}
        source = stub(source) if "solution" in _tags(cell) else source
        source = _PREDICTION.sub(r"\1 = None\2", source) if "predict" in _tags(cell) else source
        cell["source"] = source.splitlines(keepends=True)
    return cell


def _lessons() -> Iterator[tuple[str, str, list[dict]]]:
    """Language, name and cells of each notebook, in English and in Korean; the outputs are those of the English one."""
    import nbformat

    files = series_files()
    for path in select_notebooks():
        names = [name for name in (path.name, f"ko/{path.name}") if name in files]
        english, *korean = (nbformat.reads(files[name].decode(), as_version=4).cells for name in names)
        yield "en", path.stem, english
        for cells in korean:
            for cell, shown in zip(cells, english, strict=True):
                cell.update({"outputs": shown.outputs} if "outputs" in shown else {})
            yield "ko", f"ko/{path.stem}", cells


def write_teacher(folder: Path) -> list[Path]:
    """Write the teacher's notes, a page a notebook: its minutes, exercises with answers, and the misconceptions."""
    files = {"workshop.md": WORKSHOP.read_bytes(), "ko/workshop.md": WORKSHOP.with_suffix(".ko.md").read_bytes()}
    for language, name, cells in _lessons():
        first = "".join(cells[0]["source"])
        parts = [first.partition("\n")[0], *_MINUTES.findall(first)]
        for cell in cells:
            text, task, tags = "".join(cell["source"]), _exercise(cell), _tags(cell)
            if "teacher" in tags or (task and cell["cell_type"] == "markdown"):
                parts.append(_ASIDE.sub("", text))
            if "predict" in tags:
                parts.append(f"{spoken('Predict, then look:', language)}\n\n```python\n{text}\n```")
            if task and "solution" in tags:
                answer = "\n".join(line for line in text.splitlines() if line.strip() not in (BEGIN, END))
                parts.append(f"{spoken('Answer:', language)}\n\n```python\n{answer}\n```")
                named = "".join(f"\n* {spoken(idea, language)}" for idea in misconceptions(task))
                parts.append(f"{spoken('Misconceptions that the check names:', language)}\n{named}")
        files[f"{name}.md"] = ("\n\n".join(parts) + "\n").encode()
    return lay_out(folder, files)


def misconceptions(task: Exercise) -> list[str]:
    """Return the sentences by which a check names mistakes: texts in its dictionaries, or in variables named idea.

    Those of functions of the same module that it calls belong to them.
    """
    functions, found = [task.check], []
    for function in functions:  # it grows
        nodes = list(ast.walk(ast.parse(inspect.getsource(function))))
        named = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
        texts = {ast.unparse(node.targets[0]): node.value.value for node in named}
        for node in nodes:
            called = function.__globals__.get(node.id) if isinstance(node, ast.Name) else None
            if inspect.isfunction(called) and called.__module__ == task.check.__module__ and called not in functions:
                functions.append(called)
            inside = [*filter(None, node.keys), *node.values] if isinstance(node, ast.Dict) else []
            said = [one.value if isinstance(one, ast.Constant) else texts.get(ast.unparse(one)) for one in inside]
            said += [node.value.value] if node in named and ast.unparse(node.targets[0]) == "idea" else []
            found += [text for text in said if isinstance(text, str) and " " in text]
    return list(dict.fromkeys(found))


def write_slides(folder: Path, libraries: Sequence[Path]) -> list[Path]:
    """Write slides of each notebook with nbconvert's exporter: sections, exercises, figures, cells tagged slide.

    What they need of `libraries`, archives that hold reveal.js and MathJax, is copied beside them: no network is used.
    """
    from jinja2 import FileSystemLoader
    from nbconvert import SlidesExporter
    from nbformat.v4 import new_notebook

    try:
        files = {f"js/{name}": content for library in libraries for name, content in _javascript(Path(library))}
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise KitError(f"slides: --js: found what is no archive ({error}). Name a wheel, a zip or a tgz") from error
    if "js/dist/reveal.js" not in files:
        text = "found no reveal.js, which is not part of the kit. Get it: pip download --no-deps sphinx-revealjs"
        raise KitError(f"slides: {text} (or npm pack reveal.js), and name that file: --js FILE")
    exporter = SlidesExporter(extra_loaders=[FileSystemLoader(COURSE)], template_file="slides.html.j2")
    exporter.reveal_theme = "white"  # a theme whose fonts are beside it
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    for language, name, cells in _lessons():
        exporter.reveal_url_prefix, exporter.language_code = "js" if language == "en" else "../js", language
        notebook = new_notebook(cells=[slide for cell in cells if (slide := _slide(cell)) is not None])
        html, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": Path(name).name}})
        files[f"{name}.html"] = html.encode()
    return lay_out(folder, files)


def _slide(cell: Any) -> Any:
    """The cell as a slide, or None: what is tagged as one, a section, an exercise's task, or a figure."""
    from nbformat.v4 import new_markdown_cell

    kind = cell.metadata.get("slideshow", {}).get("slide_type", "slide" if "slide" in _tags(cell) else None)
    if kind is None and cell.cell_type == "markdown" and (_exercise(cell) or re.match("#{1,2} ", cell.source)):
        kind, cell.source = "slide", _ASIDE.sub("", cell.source)
    pictures = [one["data"]["image/png"] for one in cell.get("outputs", []) if "image/png" in one.get("data", {})]
    if kind is None and pictures:
        kind, picture = "subslide", f"data:image/png;base64,{pictures[0].strip()}"
        cell = new_markdown_cell(f'<img alt="a figure of the notebook" src="{picture}">')
    cell.metadata["slideshow"] = {"slide_type": kind}
    return cell if kind else None


def _javascript(library: Path) -> Iterator[tuple[str, bytes]]:
    """What slides need of an archive: reveal.js with its styles and notes, and MathJax; names below their folder."""
    is_zip = zipfile.is_zipfile(library)
    with zipfile.ZipFile(library) if is_zip else tarfile.open(library) as archive:
        for name in archive.namelist() if is_zip else archive.getnames():
            if found := re.search(r"(?:^|/)((?:dist|plugin/notes)/(?!.*(\.\.|\.map$)).+|tex-svg\.js)$", name):
                file = archive.open(name) if is_zip else archive.extractfile(name)
                if file is not None and not name.endswith("/"):
                    yield found[1].replace("dist/plugin/notes.js", "plugin/notes/notes.js"), file.read()  # reveal.js 6


def write_wheelhouse(folder: Path, index: str = "") -> None:
    """Download what the lock file pins, and build the kit's own wheel, for machines of this kind without a network.

    With one more `index` for pip, such as torch's own of builds for CPUs, the libraries for GPUs are left out.
    """
    lock = PROJECT_ROOT / "requirements.lock"
    if not lock.is_file():
        raise KitError(f"wheelhouse: found no {lock.name}. Run it in a checkout of the kit; a wheel does not have it")
    pins = [line for line in lock.read_text(encoding="utf-8").split() if "==" in line]
    if index or sys.platform != "linux":
        pins = [pin for pin in pins if not pin.startswith(("nvidia-", "triton=="))]
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(folder)]
    for what in ([*(["--extra-index-url", index] if index else []), *pins], [str(PROJECT_ROOT)]):
        if code := subprocess.run([*pip, *what], check=False).returncode:
            raise KitError(f"wheelhouse: pip stopped with {code}; its own lines above say why. Run it again to go on")
    if index and sys.platform == "linux" and not [*Path(folder).glob("torch-*+cpu*")]:
        raise KitError(f"wheelhouse: found no torch for CPUs in {index}. Give torch's index of those builds, or none")
