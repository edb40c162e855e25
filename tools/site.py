"""The site: notebooks as executed, documents, exercises and playgrounds as pages that need no network.

Notebooks, exercises, playgrounds and the first page are there in English and in Korean (docs/locale/ko).
`python -m tools.site` (or `make site`) gathers them into build/site/source and calls Sphinx, which writes
build/site/html. Nothing is executed. With `--repository OWNER/NAME` each notebook's page leads to Colab and Binder.
"""

import hashlib
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import nbformat
import typer
from nbformat.v4 import new_markdown_cell

from grpo_kit.course.editions import stub, write_students
from tools.colab import LABEL
from tools.korean import LANGUAGES, NO_OUTPUTS, translated
from tools.site_numbers import write_playgrounds
from tools.site_words import PAGES, in_korean, speaker

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "README.ko.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "data/prompts/README.md",
    "data/shapeworld/labels/README.md",
    "docs/*.md",
)
BESIDE = ("notebooks/images/*", "docs/images/*", "docs/plans.json")  # what documents show or link to
SHOWN = ("text/plain", "text/html", "text/markdown", "image/png", "image/jpeg")
UNSHOWN = {"colab", "teacher"}  # tags of cells that say nothing to a reader
LIVE = {  # a widget, of which a page has a picture → where it moves
    "AdvantagePlayground(": "advantages",
    "LossPlayground(": "loss",
    "GroupExplorer(": "groups",
}
README = {"en": "README.md", "ko": "README.ko.md"}
TWINS = {  # the folder of an English page → that of the Korean one
    "notebooks": "notebooks/ko",
    "playgrounds": "ko/playgrounds",
    "exercises": "ko/exercises",
}
MOST_WORDS = 400  # characters of a picture's text
MENDED = {  # of the theme's HTML: what axe finds
    'role="heading"': 'role="heading" aria-level="2"',
    '<aside class="sidebar-drawer"': '<aside aria-label="pages" class="sidebar-drawer"',
    '<aside class="toc-drawer': '<aside aria-label="on this page" class="toc-drawer',
    "<th></th>": "<td></td>",
    '<div id="search-results">': '<h1>Search</h1>\n<div id="search-results">',
    '<th class="head"><p></p></th>': "<td></td>",
}
_SENTENCE = re.compile(r"[^.!?]*[Yy]ou should see[^.!?]*[.!?]")
_MARKS = re.compile(r"<[^>]+>|[*`$]|\[(?P<text>[^\]]*)\]\([^)]*\)")


def gather(source: Path, extra: Path, repository: str = "") -> None:
    """Lay out the sources for Sphinx in `source`, and in `extra` what is copied as it is."""
    for folder in (source, extra):
        shutil.rmtree(folder, ignore_errors=True)
    for pattern in (*DOCUMENTS, *BESIDE):
        for path in sorted(ROOT.glob(pattern)):
            _write(source / path.relative_to(ROOT), _into_site(path) if path.suffix == ".md" else path.read_bytes())
    for path in (PAGES / "index.md", *(PAGES / "playgrounds").glob("*.md")):
        write_page(path, source)
    write_playgrounds(PAGES / "playgrounds", source, extra)
    _copy_report(extra / "reports" / "reference")
    with tempfile.TemporaryDirectory() as folder:
        write_students(Path(folder) / "notebooks")
        (extra / "course").mkdir()
        shutil.make_archive(str(extra / "course" / "learners"), "zip", folder)
    alts: dict[str, dict[str, str]] = {}
    exercises: list[str] = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        outputs = {cell.id: cell.get("outputs", []) for cell in notebook.cells}
        names = write_exercises(notebook, path, source)
        exercises += names
        links = {language: [_exercises_link(language)] * bool(names) for language in README}
        korean = path.parent / "ko" / path.name
        alts |= _write_notebook(notebook, path, source, repository, _other_language(notebook, korean) + links["en"])
        if korean.is_file():
            notebook = nbformat.read(korean, as_version=4)
            write_exercises(notebook, korean, source)
            notebook.cells[0].source = notebook.cells[0].source.replace(NO_OUTPUTS, "")  # here it has them
            for cell in notebook.cells:  # its code is the English one's, and so is what the code showed
                cell.update({"outputs": outputs[cell.id]} if cell.cell_type == "code" else {})
            alts |= _write_notebook(notebook, korean, source, repository, links["ko"])
        _write(extra / path.relative_to(ROOT), path.read_bytes())
    for language, folder in (("en", "exercises"), ("ko", "ko/exercises")):
        _write(source / folder / "index.md", _exercise_index(exercises, language).encode())
    _write(source / "alts.json", json.dumps(alts, ensure_ascii=False, indent=1).encode())


def _other_language(notebook: nbformat.NotebookNode, korean: Path) -> list[str]:
    """The link to the Korean notebook, where there is one, and the notebook does not have the link itself."""
    link = LANGUAGES[0].format(f"ko/{korean.name}")
    return [link] * (korean.is_file() and link not in notebook.cells[0].source)


def _other_page(language: str, place: str) -> str:
    """The line of a page of the site that leads to the page in the other language."""
    links = {"en": LANGUAGES[0].format(moved(place, "", posixpath.dirname(place), korean=True))}
    links["ko"] = LANGUAGES[1].format(moved(place, "", posixpath.dirname(twin(place))))
    return links[language]


def twin(place: str) -> str:
    """Return the Korean page that belongs to a page of the site; the page itself, where it has none."""
    if place == "README.md":
        return README["ko"]
    folder, name = posixpath.split(place)
    return posixpath.join("ko" if place == "index.md" else TWINS.get(folder, folder), name)


def moved(target: str, old: str, new: str, *, korean: bool = False) -> str:
    """Return a link's target from a page in the folder `old` as it is from `new`, there to the Korean page if asked."""
    if re.match(r"#|(?!site:)[a-z]+:", target):
        return target
    scheme, place, anchor = re.fullmatch(r"(site:)?([^#]*)(#.*)?", target).groups(default="")
    place = posixpath.normpath(posixpath.join(old, place))
    return f"{scheme}{posixpath.relpath(twin(place) if korean else place, new or '.')}{anchor}"


def write_page(path: Path, source: Path) -> None:
    """Write a page of docs/site in English and in Korean, each with a line that leads to the other."""
    place = path.relative_to(PAGES).as_posix()
    old, new = posixpath.dirname(place), posixpath.dirname(twin(place))
    english = path.read_text(encoding="utf-8")
    korean = re.sub(r"```{toctree}.*?```\n*", "", english, flags=re.DOTALL)  # a page stands in the contents once
    korean = translated(korean, in_korean(), lambda target: moved(target, old, new, korean=True))
    english = english.replace("<!-- korean -->", "\n".join(_korean_pages()))
    english = english.replace("<!-- documents -->", "\n".join(page for page in _documents() if page[-3:] != "_ko"))
    for language, name, text in (("en", place, english), ("ko", twin(place), korean)):
        title, _, rest = text.partition("\n")
        _write(source / name, f"{title}\n\n{_other_page(language, place)}\n{rest}".encode())


def _documents() -> list[str]:
    return [path.relative_to(ROOT).with_suffix("").as_posix() for path in sorted(ROOT.glob("docs/*.md"))]


def _korean_pages() -> list[str]:
    """The Korean pages of the site, in the order of its contents."""
    notebooks = [f"notebooks/ko/{path.stem}" for path in sorted(ROOT.glob("notebooks/ko/*.ipynb"))]
    notebooks.sort(key=lambda page: not page.endswith("index"))
    playgrounds = [f"ko/playgrounds/{name}" for name in ("advantages", "loss", "groups", "methods")]
    documents = [page for page in _documents() if page.endswith("_ko")]
    return ["ko/index", *playgrounds, *notebooks, "ko/exercises/index", "README.ko", *documents]


def _copy_report(folder: Path) -> None:
    """Copy the reference report; the map of the notebooks, to which one of its pages leads, is the site's."""
    shutil.copytree(ROOT / "reports" / "reference", folder)
    for page in (folder / "notebooks").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        page.write_text(text.replace('href="index.html"', 'href="../../../notebooks/index.html"'), encoding="utf-8")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _into_site(path: Path) -> bytes:
    return _linked(path.read_text(encoding="utf-8")).encode()


def _linked(text: str) -> str:
    """Links into folders that are copied as they are, which Sphinx does not look into."""
    return re.sub(r"\]\(((?:\.\./)*reports/)", r"](site:\1", text)


def _write_notebook(
    notebook: nbformat.NotebookNode, path: Path, source: Path, repository: str, links: list[str]
) -> dict[str, dict[str, str]]:
    """Write a notebook as the site shows it; what comes back are its page and the texts of its pictures there."""
    place = path.relative_to(ROOT)
    notebook.cells = [cell for cell in notebook.cells if not UNSHOWN & set(cell.metadata.get("tags", []))]
    _ = speaker(_language(place))
    alts = dict(picture_texts(notebook, _language(place)))
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _linked(cell.source)
            continue
        for output in [output for output in cell.outputs if "data" in output]:
            output.data = {kind: value for kind, value in output.data.items() if kind in SHOWN}
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.metadata.tags = [*cell.metadata.get("tags", []), "hide-input"]
            prompts = {"code_prompt_show": _("Show a solution"), "code_prompt_hide": _("Hide the solution")}
            cell.metadata.mystnb = prompts
    notebook.cells = [one for cell in notebook.cells for one in (cell, *_live(cell, place))]
    has_button = any(LABEL in cell.source for cell in notebook.cells)
    links = [*links, *(link for link in _launch(place, repository) if not has_button or "Colab" not in link)]
    title, _, rest = notebook.cells[0].source.partition("\n")
    notebook.cells[0].source = f"{title}\n\n{' · '.join(links)}\n{rest}"
    _write(source / place, nbformat.writes(notebook).encode())
    return {place.with_suffix("").as_posix(): alts}


def _live(cell: nbformat.NotebookNode, place: Path) -> Iterator[nbformat.NotebookNode]:
    """After the picture of a widget, a line that leads to what moves."""
    for name, page in LIVE.items():
        if cell.cell_type == "code" and name in cell.source:
            _ = speaker(_language(place))
            link = moved(f"playgrounds/{page}.md", "", place.parent.as_posix(), korean=_language(place) == "ko")
            text = _("A picture of a widget. One that moves is [on this site]({}).").format(link)
            yield new_markdown_cell(text, id=f"live-{page}-{cell.id}"[:64])


def _launch(place: Path, repository: str) -> Iterator[str]:
    """Links by which a notebook is opened elsewhere, and the notebook itself."""
    _ = speaker(_language(place))
    if repository:
        yield f"[{_('Open in Colab')}](https://colab.research.google.com/github/{repository}/blob/main/{place.as_posix()})"
        yield f"[{_('open in Binder')}](https://mybinder.org/v2/gh/{repository}/main?urlpath=lab/tree/{place.as_posix()})"
    if _language(place) == "en":
        yield f"[download the notebook](site:{place.name})"


def _language(place: Path) -> str:
    return "ko" if "ko" in place.parts else "en"


def _exercises_link(language: str) -> str:
    """The link from a notebook to the pages of the exercises."""
    _ = speaker(language)
    return f"[{_('exercises')}]({'../../ko' if language == 'ko' else '..'}/exercises/index.md)"


def picture_texts(notebook: nbformat.NotebookNode, language: str = "en") -> Iterator[tuple[str, str]]:
    """Yield for each picture the file name that Sphinx gives it, and its text.

    That is the text in its metadata, or else the section that it is in and what the reader should see.
    """
    _ = speaker(language)
    figure = _("Figure of the section “{}”.")
    loop = re.search(r"!\[([^\]]*)\]\([^)]*loop\.png\)", (ROOT / README[language]).read_text(encoding="utf-8"))[1]
    for place, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            for kind in {"image/png", "image/jpeg"} & set(output.get("data", {})):
                name = hashlib.sha256(b64decode(output.data[kind])).hexdigest()
                told = output.get("metadata", {}).get(kind, {}).get("alt", "")
                told = told or (loop if "loop_figure(" in cell.source else _told(notebook.cells, place, figure))
                yield f"{name}.{'png' if kind == 'image/png' else 'jpg'}", told


def _told(cells: list[nbformat.NotebookNode], place: int, figure: str) -> str:
    before = [cell.source for cell in cells[:place] if cell.cell_type == "markdown"]
    after = next((cell.source for cell in cells[place + 1 :] if cell.cell_type == "markdown"), "")
    headings = re.findall(r"^#+ (.+)$", "\n".join(before), flags=re.MULTILINE)
    near = _SENTENCE.search(_plain(before[-1] if before else "")) or _SENTENCE.search(_plain(after))
    said = near.group().strip() if near else _plain((before or [""])[-1].strip().rpartition("\n\n")[2])
    return f"{figure.format(_plain(headings[-1]) if headings else '')} {said}"[:MOST_WORDS]


def _plain(text: str) -> str:
    lines = [line for line in text.splitlines() if not line.startswith("#")] if "\n" in text else [text]
    return " ".join(_MARKS.sub(lambda found: found["text"] or "", " ".join(lines)).split())


def write_exercises(notebook: nbformat.NotebookNode, path: Path, source: Path) -> list[str]:
    """Write a page for each exercise: its task, its hints and the stub, never the solution; return their names."""
    place = path.relative_to(ROOT)
    language, old = _language(place), place.parent.as_posix()
    new = "ko/exercises" if language == "ko" else "exercises"
    _ = speaker(language)
    names = []
    for number, cell in enumerate(notebook.cells):
        name = next((tag.partition(":")[2] for tag in cell.metadata.get("tags", []) if tag.startswith("exercise:")), "")
        if not name or cell.cell_type != "markdown":
            continue
        task = translated(cell.source, {}, lambda target: moved(target, old, new))
        title, _rest, task = re.sub(r"^### \S+ ", "# ", task).partition("\n")
        title = f"{title}\n\n{_other_page(language, f'exercises/{name}.md')}"
        code = stub(notebook.cells[number + 1].source)
        asked = _("Write it in [{}]({}), where `gk.course.check` tries it:")
        asked = asked.format(path.stem, moved(place.name, old, new))
        text = f"{title}\n\n{task.strip()}\n\n{asked}\n\n```python\n{code}\n```\n"
        _write(source / new / f"{name}.md", text.encode())
        names.append(name)
    return names


def _exercise_index(names: list[str], language: str) -> str:
    _ = speaker(language)
    title = f"{_('# {} exercises').format(len(names))}\n\n{_other_page(language, 'exercises/index.md')}"
    words = _("Each page has a task, three hints and the stub. A solution is written, and checked, in the notebook.")
    toctree = "\n".join(["```{toctree}", *names, "```"])
    return f"{title}\n\n{words}\n\n{toctree}\n"


def main(
    out: Annotated[Path, typer.Option(help="what is replaced: source, extra and html in it")] = ROOT / "build" / "site",
    repository: Annotated[str, typer.Option(envvar="SITE_REPOSITORY", help="OWNER/NAME on GitHub, for buttons")] = "",
) -> None:
    """Gather the pages and build the site."""
    start = time.monotonic()
    source, extra, html = (out.resolve() / name for name in ("source", "extra", "html"))
    gather(source, extra, repository)
    shutil.rmtree(html, ignore_errors=True)
    options = ["-b", "html", "-c", str(PAGES), "-d", str(out / "doctrees"), "-D", f"html_extra_path={extra}"]
    command = [sys.executable, "-m", "sphinx", *options, "-q", "-W", "--keep-going", str(source), str(html)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if code := subprocess.run(command, env=environment, check=False).returncode:
        raise typer.Exit(code)
    for page in [*html.glob("*.html"), *html.glob("[!r_]*/**/*.html")]:  # not the report's, which are their own
        text = page.read_text(encoding="utf-8")
        for found, better in MENDED.items():
            text = text.replace(found, better)
        page.write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in html.rglob("*") if path.is_file())
    typer.echo(f"{html / 'index.html'}: {size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    typer.run(main)
