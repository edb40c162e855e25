"""The site: what is gathered for it, and, where Sphinx is installed, every page and link of what is built."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from grpo_kit.config import PROJECT_ROOT
from tools import site

HAS_SPHINX = all(importlib.util.find_spec(name) for name in ("sphinx", "myst_nb", "furo"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NOTEBOOKS = sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb"))
LOOKED_AT = [
    "index.html",
    "notebooks/02b_why_it_works.html",
    "notebooks/05_groups.html",
    "exercises/06.1.html",
    "docs/notation.html",
    "playgrounds/advantages.html",
    "playgrounds/loss.html",
    "playgrounds/groups.html",
    "playgrounds/methods.html",
    "ko/index.html",
    "ko/exercises/06.1.html",
    "ko/playgrounds/advantages.html",
    "ko/playgrounds/loss.html",
    "ko/playgrounds/groups.html",
    "ko/playgrounds/methods.html",
]
AXE = {"resultTypes": ["violations"], "preload": False}  # which asks for the style sheets again, from a script
MOST_BYTES = 2_500_000  # of a page with its pictures


# --- what is gathered -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    site.gather(folder / "source", folder / "extra", "someone/kit")
    return folder


def test_every_notebook_is_there_as_executed_with_ways_to_open_it(gathered: Path):
    for path in NOTEBOOKS:
        page = nbformat.read(gathered / "source" / "notebooks" / path.name, as_version=4)
        nbformat.validate(page)
        committed = nbformat.read(path, as_version=4)
        kept = [cell for cell in committed.cells if "colab" not in cell.metadata.get("tags", [])]
        assert [cell.id for cell in page.cells if not cell.id.startswith("live-")] == [cell.id for cell in kept]
        assert f"/github/someone/kit/blob/main/notebooks/{path.name})" in page.cells[0].source
        assert (gathered / "extra" / "notebooks" / path.name).read_bytes() == path.read_bytes()


def test_without_a_repository_nothing_leads_to_colab_or_binder():
    assert [*site._launch(Path("notebooks/x.ipynb"), "")] == ["[download the notebook](site:x.ipynb)"]


def test_a_widget_that_has_a_playground_leads_to_it_in_both_languages(gathered: Path):
    for name, page in (("06_grpo_loss", "advantages"), ("06_grpo_loss", "loss"), ("05_groups", "groups")):
        for place, link in (("notebooks", "../playgrounds"), ("notebooks/ko", "../../ko/playgrounds")):
            path = gathered / "source" / place / f"{name}.ipynb"
            told = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.id.startswith("live-")]
            assert any(f"]({link}/{page}.md)" in text for text in told)


def test_the_learners_edition_can_be_taken_along(gathered: Path):
    with zipfile.ZipFile(gathered / "extra" / "course" / "learners.zip") as archive:
        names = {name for name in archive.namelist() if name.endswith(".ipynb")}
        assert {f"notebooks/{path.name}" for path in NOTEBOOKS} <= names
        assert not any(b"BEGIN SOLUTION" in archive.read(name) for name in names)


def test_every_picture_has_a_text(gathered: Path):
    pages = json.loads((gathered / "source" / "alts.json").read_text(encoding="utf-8"))
    texts = {page: " ".join(found.values()) for page, found in pages.items()}
    assert sum(len(found) for name, found in pages.items() if "/ko/" not in name) > 60
    assert all(20 < len(text) for found in pages.values() for text in found.values())
    for name, text in texts.items():  # a picture is in both languages' pages, and has a text in each
        assert bool(re.search("[가-힣]", text)) == ("/ko/" in name), name
    page = nbformat.read(gathered / "source" / "notebooks" / "02b_why_it_works.ipynb", as_version=4)
    metadata = [output.get("metadata", {}) for cell in page.cells for output in cell.get("outputs", [])]
    given = [one["image/png"]["alt"] for one in metadata if "image/png" in one]
    assert given and set(given) <= set(pages["notebooks/02b_why_it_works"].values())


def test_an_exercise_has_a_page_with_hints_and_without_its_solution(gathered: Path):
    cells = [cell for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    solutions = [cell for cell in cells if "solution" in cell.metadata.get("tags", [])]
    for folder in ("exercises", "ko/exercises"):
        places = (gathered / "source" / folder).glob("[0-9]*.md")
        pages = {path.stem: path.read_text(encoding="utf-8") for path in places}
        assert len(pages) == len(solutions) >= 34
        for cell in solutions:
            name = next(tag.partition(":")[2] for tag in cell.metadata.tags if tag.startswith("exercise:"))
            secret = re.findall("### BEGIN SOLUTION\n(.*?)### END SOLUTION", cell.source, flags=re.DOTALL)
            assert all(text.strip() not in pages[name] for text in secret)
            assert pages[name].count("<summary>") == 3 and "raise NotImplementedError()" in pages[name]


def to_english(source: Path) -> Iterator[str]:
    """Yield each link of a Korean page to an English page that has a Korean twin, but for the one to its own twin."""
    korean = [*source.glob("ko/**/*.md"), *source.glob("notebooks/ko/*.ipynb")]
    for path in korean:
        place = path.relative_to(source).as_posix()
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            cells = nbformat.reads(text, as_version=4).cells
            text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        for target in re.findall(r"\]\(([^)\s#:]+\.(?:md|ipynb))", text):
            there = (path.parent / target).resolve().relative_to(source.resolve()).as_posix()
            if site.twin(there) not in (there, place):
                yield f"{place}: {target}"


def test_a_korean_page_leads_to_korean_pages_and_each_twin_to_the_other(gathered: Path, tmp_path: Path):
    source = gathered / "source"
    assert [*to_english(source)] == []
    for folder in ("playgrounds", "exercises"):
        for english in (source / folder).glob("*.md"):
            korean = source / "ko" / folder / english.name
            line = english.read_text(encoding="utf-8").split("\n\n")[1]
            assert line == f"**English** · [한국어](../ko/{folder}/{english.name})"
            text = korean.read_text(encoding="utf-8")
            assert text.split("\n\n")[1] == f"[English](../../{folder}/{english.name}) · **한국어**"
            assert len(re.findall("[가-힣]", text)) > 40, korean
    page = tmp_path / "ko" / "playgrounds" / "loss.md"  # a page that leads astray is noticed
    page.parent.mkdir(parents=True)
    page.write_text(
        "[English](../../playgrounds/loss.md) [x](../../playgrounds/groups.md) [y](groups.md) [z](../../a.md)"
    )
    assert [*to_english(tmp_path)] == ["ko/playgrounds/loss.md: ../../playgrounds/groups.md"]


def test_a_korean_page_shows_what_the_code_of_the_english_one_showed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = tmp_path / "notebooks"
    (copy / "ko").mkdir(parents=True)
    for name in ("02b_why_it_works.ipynb", "index.ipynb"):
        shutil.copy(PROJECT_ROOT / "notebooks" / name, copy)
    korean = nbformat.read(copy / "02b_why_it_works.ipynb", as_version=4)
    for cell in korean.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbformat.write(korean, copy / "ko" / "02b_why_it_works.ipynb")
    for name in ("reports/reference", "data/demo_run"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(PROJECT_ROOT / name)
    for name in ("README.md", "README.ko.md"):
        shutil.copy(PROJECT_ROOT / name, tmp_path)
    monkeypatch.setattr(site, "ROOT", tmp_path)
    site.gather(tmp_path / "source", tmp_path / "extra")
    names = ("02b_why_it_works.ipynb", "ko/02b_why_it_works.ipynb")
    pages = [nbformat.read(tmp_path / "source" / "notebooks" / name, as_version=4) for name in names]
    outputs = [[cell.outputs for cell in page.cells if cell.cell_type == "code"] for page in pages]
    assert outputs[0] == outputs[1] and "[한국어](ko/02b_why_it_works.ipynb)" in pages[0].cells[0].source
    assert "notebooks/ko/02b_why_it_works" in (tmp_path / "source" / "index.md").read_text(encoding="utf-8")


# --- what is built ----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The ids, links and pictures of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.without_text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Remember what it has."""
        found = dict(attributes)
        self.ids |= {value for name, value in attributes if name in ("id", "name") and value}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("img", "script", "link", "iframe", "source"):
            self.fetched += [value for name, value in attributes if name in ("src", "href") and value]
        if tag == "img" and not found.get("alt"):
            self.without_text.append(found.get("src", ""))


def broken_links(html: Path) -> Iterator[str]:
    """Yield each link inside of the site that leads nowhere, and everything that is fetched from elsewhere."""
    html = html.resolve()
    pages = {path: Page(path) for path in html.rglob("*.html")}
    for path, page in pages.items():
        for link in [*page.links, *page.fetched]:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                if link in page.fetched and address.scheme != "data":
                    yield f"{path.relative_to(html)} fetches {link}"
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            ids = pages[target].ids if target in pages else None
            if not target.is_file() or (address.fragment and ids is not None and unquote(address.fragment) not in ids):
                yield f"{path.relative_to(html)} leads to {link}"


def test_a_dead_link_a_missing_place_and_a_foreign_script_are_noticed(tmp_path: Path):
    (tmp_path / "b.html").write_text('<h1 id="here">b</h1>')
    lines = ["b.html", "b.html#here", "b.html#gone", "c.html", "#nowhere", "https://example.org/"]
    links = "".join(f'<a href="{line}">x</a>' for line in lines)
    (tmp_path / "a.html").write_text(f'{links}<script src="https://cdn.example.org/x.js"></script><img src="b.html">')
    told = [*broken_links(tmp_path)]
    assert [line.split()[-1] for line in told] == ["b.html#gone", "c.html", "#nowhere", "https://cdn.example.org/x.js"]
    assert Page(tmp_path / "a.html").without_text == ["b.html"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "tools.site", "--out", str(out)]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr  # Sphinx's warnings are errors: links, formulas, headings
    return out / "html"


needs_sphinx = pytest.mark.skipif(not HAS_SPHINX, reason="no Sphinx: pip install -e '.[site]'")


@pytest.mark.slow
@needs_sphinx
def test_no_link_is_dead_no_picture_without_text_and_no_page_heavy(built: Path):
    assert [*broken_links(built)] == []
    for path in built.glob("notebooks/*.html"):
        page, text = Page(path), path.read_text(encoding="utf-8")
        assert page.without_text == []
        assert "Traceback" not in text and "$$" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
        pictures = [path.parent / name for name in page.fetched if not name.startswith("data:")]
        weight = len(text) + sum(one.stat().st_size for one in set(pictures) if one.suffix in (".png", ".jpg"))
        assert weight < MOST_BYTES, path.name
    assert "<math" in (built / "notebooks" / "02b_why_it_works.html").read_text(encoding="utf-8")


@pytest.mark.slow
@needs_sphinx
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium")
def test_pages_work_offline_fit_a_phone_and_have_no_violation_that_axe_finds(built: Path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: pip install -e '.[dev]'")
    found, complaints = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme, width in (("light", 360), ("dark", 1280)):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            context.set_offline(True)
            page = context.new_page()
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("requestfailed", lambda request: complaints.append(request.url))
            for name in LOOKED_AT:
                page.goto((built / name).as_uri())
                if page.evaluate("document.documentElement.scrollWidth") > width:
                    complaints.append(f"{name} is wider than {width}")
                for broken in axe.Axe().run(page, options=AXE).response["violations"]:
                    nodes = [node["html"][:150] for node in broken["nodes"][:3]]
                    found.append(f"{name} {scheme}: {broken['id']} ({broken['impact']}) {nodes}")
        browser.close()
    assert complaints == []
    assert found == [], "\n".join(found)
