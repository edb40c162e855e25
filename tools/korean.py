"""The Korean edition, by PO files: `python -m tools.korean extract | build | check [NAME …]`.

A message is a paragraph of a notebook's markdown cell, of README.md, of the workshop's plan or of a page of the site,
a word of such a page, or a sentence of an exercise's check; `docs/locale/ko` has a file for each notebook, one each for
README, the plan, the site and the checks.

extract  brings the PO files up to date with the English: what did not change keeps its Korean, what changed a little
         keeps it marked fuzzy, what is gone goes.
build    writes notebooks/ko, README.ko.md, and workshop.ko.md and ko.json of data/course from what is wholly translated
         (with names: from these in any case); the site's pages are built with the site.
check    says what a translation lost of its English: numbers, code, links, formulas, tags, the shape of the text;
         it fails too while a paragraph has no Korean.
"""

import difflib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import polib
from markdown_it import MarkdownIt

from tools import colab
from tools.korean_course import MODULES, course_messages
from tools.site_words import PAGES, site_words

ROOT = Path(__file__).parents[1]
CATALOGUES = ROOT / "docs" / "locale" / "ko"
README, COURSE, SITE, WORKSHOP = "readme", "course", "site", "workshop"
LANGUAGES = "**English** · [한국어]({})", "[English]({}) · **한국어**"  # the paragraph that leads to the other one
GLOSSARY = " · [용어집]({}docs/glossary_ko.md)"  # for the map and README, which lead to docs/
NO_OUTPUTS = " (그림과 출력은 영어판에 저장되어 있습니다. 여기서는 셀을 실행하면 나타납니다.)"
CHECKED = "# NBVAL_CHECK_OUTPUT"  # the output of such a cell is compared with what is stored

_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(r"\$\$.+?\$\$|(?<![\\$\w])\$[^$\s](?:[^$]*?[^$\s])?\$(?!\d)", re.DOTALL)
_CODE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_TARGET = re.compile(r"(\]\()([^)\s]+)(?=[)\s])|((?:src|href)=[\"']?)([^\"'\s>]+)")
_HOLE = re.compile(r"\{\d?\}")
_TAG = re.compile(r"</?[a-zA-Z][\w-]*(?:\s[^<>]*)?>")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_LARGE = re.compile(r"(\d+(?:\.\d+)?) ?(million|billion|천만|만|억)(?: (\d+)(천만|만))?")  # 3.75 billion is 37억 5천만
_ZEROS = {None: 0, "만": 4, "million": 6, "천만": 7, "억": 8, "billion": 9}
_EMPTY_IMAGE = re.compile(r"!\[\]\([^)]*\)")
_LINKS = re.compile(rf"\*\*English\*\* · \[한국어\]\([^)]*\)|\[{colab.LABEL}\]\([^)]*\)")  # to a language, to Colab
_MARKDOWN = MarkdownIt().enable("table")


def sources() -> dict[str, Path]:
    """Name of a PO file → the English file whose paragraphs it has."""
    notebooks = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    workshop = ROOT / "data" / "course" / "workshop.md"
    return notebooks | {README: ROOT / "README.md", COURSE: MODULES, SITE: PAGES, WORKSHOP: workshop}


def paragraphs(text: str) -> list[str]:
    """Split markdown at blank lines outside of code fences; every second element is such a gap."""
    fences = [match.span() for match in _FENCE.finditer(text)]
    parts, start = [], 0
    for gap in re.finditer(r"\n(?:[ \t]*\n)+", text):
        if not any(begin <= gap.start() < end for begin, end in fences):
            parts += [text[start : gap.start()], gap.group()]
            start = gap.end()
    return [*parts, text[start:]]


def is_message(paragraph: str) -> bool:
    """Whether a paragraph has words: not code, a formula, tags or a picture alone, nor a link to the other language."""
    if _LINKS.fullmatch(paragraph.strip()):
        return False
    bare = paragraph
    for kind in (_FENCE, _EMPTY_IMAGE, _FORMULA, _TAG):
        bare = kind.sub(" ", bare)
    return re.search(r"[^\W\d_]", bare) is not None


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each message of an English file with where it stands: the cell's id, or the file's name."""
    if path == MODULES:
        yield from course_messages()
        return
    files = sorted(path.rglob("*.md")) if path.is_dir() else [path]
    cells = [(file.name, file.read_text(encoding="utf-8")) for file in files]
    if path.suffix == ".ipynb":
        notebook = nbformat.read(path, as_version=4)
        cells = [(cell.id, cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]
    for place, text in cells:
        yield from ((place, part.strip("\n")) for part in paragraphs(text)[::2] if is_message(part))
    if path == PAGES:
        yield from site_words()


def read(name: str) -> polib.POFile:
    """Return the catalogue of that name, empty where it is not there yet."""
    path = CATALOGUES / f"{name}.po"
    catalogue = polib.pofile(str(path), wrapwidth=100) if path.is_file() else polib.POFile(wrapwidth=100)
    catalogue.metadata = {"Language": "ko", "MIME-Version": "1.0", "Content-Type": "text/plain; charset=UTF-8"}
    return catalogue


def extract(name: str, found: Iterator[tuple[str, str]]) -> polib.POFile:
    """Bring a catalogue up to date with these messages, each with its place, and write it."""
    catalogue = read(name)
    old = {entry.msgid: entry for entry in catalogue if entry.msgstr and not entry.obsolete}
    places: dict[str, list[str]] = {}
    for place, text in found:
        places.setdefault(text, []).append(place)
    gone = [text for text in old if text not in places]
    catalogue.clear()
    for text, where in places.items():
        near = [] if text in old else difflib.get_close_matches(text, gone, n=1, cutoff=0.6)
        kept = old.get(near[0] if near else text)
        entry = polib.POEntry(msgid=text, occurrences=[(one, "") for one in dict.fromkeys(where)])
        if kept is not None:
            entry.msgstr, entry.flags, entry.tcomment = kept.msgstr, list(kept.flags), kept.tcomment
            if near and not entry.fuzzy:
                entry.flags.append("fuzzy")
        catalogue.append(entry)
    CATALOGUES.mkdir(parents=True, exist_ok=True)
    catalogue.save(str(CATALOGUES / f"{name}.po"))
    return catalogue


def translated(text: str, korean: dict[str, str], moved: Callable[[str], str]) -> str:
    """Return markdown with each message in Korean, where there is one, and each link's target as it is from there."""
    parts = paragraphs(text)
    for n in range(0, len(parts), 2):
        message = parts[n].strip("\n")
        if message:
            parts[n] = parts[n].replace(message, korean.get(message) or message)
    lines = "".join(parts)
    code = [match.span() for kind in (_FENCE, _CODE) for match in kind.finditer(lines)]

    def target(match: re.Match) -> str:
        if any(begin <= match.start() < end for begin, end in code):
            return match.group()
        return f"{match[1]}{moved(match[2])}" if match[1] else f"{match[3]}{moved(match[4])}"

    return _TARGET.sub(target, lines)


def built(name: str, catalogue: polib.POFile) -> tuple[Path, str]:
    """Return the Korean file that belongs to an English one, and what it must hold."""
    path = sources()[name]
    korean = {entry.msgid: entry.msgstr for entry in catalogue}
    if name == COURSE:
        return ROOT / "data" / "course" / "ko.json", json.dumps(korean, indent=0, ensure_ascii=False) + "\n"
    if name == WORKSHOP:
        return path.with_suffix(".ko.md"), translated(path.read_text(encoding="utf-8"), korean, str)
    if name == README:
        text = translated(path.read_text(encoding="utf-8"), korean, _into_ko)
        return ROOT / "README.ko.md", text.replace(
            LANGUAGES[0].format("README.ko.md"), LANGUAGES[1].format(path.name) + GLOSSARY.format("")
        )
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = translated(cell.source, korean, _deeper)
        elif CHECKED not in cell.source:
            cell.outputs, cell.execution_count = [], None
    title, *rest = paragraphs(notebook.cells[0].source)
    rest = rest[2:] if rest[1:] and _LINKS.fullmatch(rest[1]) else rest
    link = LANGUAGES[1].format(f"../{path.name}") + (GLOSSARY.format("../../") if name == "index" else "") + NO_OUTPUTS
    notebook.cells[0].source = "".join([title, "\n\n", link, *rest])
    return path.parent / "ko" / path.name, nbformat.writes(notebook) + "\n"


def _into_ko(target: str) -> str:
    """A link's target in README: a notebook is the Korean one."""
    return re.sub(r"^notebooks/(?=[^/]+\.ipynb)", "notebooks/ko/", target)


def _deeper(target: str) -> str:
    """A link's target, from one folder below: another notebook is beside it in Korean too, all else is not."""
    target = target.replace("/blob/main/notebooks/", "/blob/main/notebooks/ko/")
    return target if re.match(r"[a-z]+:|#|[^/]+\.ipynb", target) else f"../{target}"


def lost(english: str, korean: str) -> Iterator[str]:
    """Yield what a translation does not have as its English has it."""
    kinds = {"code blocks": _FENCE, "code spans": _CODE, "formulas": _FORMULA, "link targets": _TARGET}
    kinds |= {"tags": _TAG, "holes": _HOLE}
    if "{}" in english and "$" not in english:  # a sentence of a check: its values may come in another order
        korean = re.sub(r"\{\d\}", "{}", korean)
    texts = [english, korean]
    bare = list(texts)
    for kind, pattern in kinds.items():
        seen = [Counter(re.sub(r'(alt|title)="[^"]*"', "", m.group()) for m in pattern.finditer(text)) for text in bare]
        if seen[0] != seen[1]:
            yield f"{kind}: {_difference(*seen)}"
        if kind != "link targets":
            bare = [pattern.sub(" ⋯ " if kind in ("tags", "holes") else "x", text) for text in bare]
    if re.search("illion", bare[0]):  # elsewhere 만 is the particle "only"
        bare = [_LARGE.sub(_in_full, text) for text in bare]
    numbers = [Counter(_NUMBER.findall(text)) for text in bare]
    if numbers[0] != numbers[1]:
        yield f"numbers: {_difference(*numbers)}"
    shapes = [Counter(_shape(text)) for text in texts]
    if shapes[0] != shapes[1]:
        yield f"shape: {_difference(*shapes)}"
    words = re.search(r"[A-Za-z]{2}", _TARGET.sub("", bare[0]).replace("x", ""))
    if words and not re.search("[가-힣]", bare[1]):
        yield "no Korean in it"


def _in_full(large: re.Match) -> str:
    """A number with a word for its zeros, in digits: Korean counts them by fours."""
    return str(round(float(large[1]) * 10 ** _ZEROS[large[2]] + int(large[3] or 0) * 10 ** _ZEROS[large[4]]))


def _shape(text: str) -> Iterator[str]:
    """The kinds of blocks and marks in it; a mark that markdown does not take for one (`**말(word)**은`) among them."""
    for token in _MARKDOWN.parse(_FORMULA.sub("x", text)):
        if token.type not in ("paragraph_open", "paragraph_close", "inline", "html_block") and token.nesting >= 0:
            yield f"{token.type} {token.tag}"
        for inner in token.children or []:
            if inner.type == "text":
                yield from (f"mark {mark}" for mark in re.findall(r"\*+", inner.content))


def _difference(english: Counter, korean: Counter) -> str:
    """What one has and the other has not, in a line."""
    less, more = (english - korean).elements(), (korean - english).elements()
    less, more = ([" ".join(one.split()) for one in some] for some in (less, more))
    return "; ".join(f"{word} {', '.join(some)}" for word, some in (("lost", less), ("added", more)) if some)


def problems(name: str, catalogue: polib.POFile) -> Iterator[str]:
    """Yield a line for each paragraph whose Korean breaks a rule; one without Korean is only counted by `check`."""
    for number, entry in enumerate(catalogue, 1):
        if entry.msgstr:
            place = f"{name}.po:{number} ({entry.occurrences[0][0]} “{' '.join(entry.msgid.split())[:40]}…”)"
            yield from (f"{place}: {what}" for what in [*["fuzzy"] * entry.fuzzy, *lost(entry.msgid, entry.msgstr)])


def main(command: str, *chosen: str) -> int:
    """Do one of the three for the named files, or all; the number of failures is what comes back."""
    failures = 0
    for name, path in sources().items():
        if chosen and not name.startswith(chosen):
            continue
        catalogue = extract(name, messages(path)) if command == "extract" else read(name)
        done = [entry for entry in catalogue if entry.msgstr and not entry.fuzzy]
        whole = len(done) == len(catalogue) > 0
        said = list(problems(name, catalogue)) if command == "check" else []
        if command == "check" and {entry.msgid for entry in catalogue} != {text for _, text in messages(path)}:
            said.append(f"{name}.po: not what the English says now; run: python -m tools.korean extract")
        if (whole or (chosen and command == "build")) and name != SITE:
            target, text = built(name, catalogue)
            if command == "build":
                target.parent.mkdir(exist_ok=True)
                target.write_text(text, encoding="utf-8")
            elif command == "check" and (not target.is_file() or target.read_text(encoding="utf-8") != text):
                said.append(f"{target.relative_to(ROOT)}: not what it must be; run: python -m tools.korean build")
        print(*said, f"{name}: translated {len(done)} of {len(catalogue)}", sep="\n")
        failures += len(said) + (len(catalogue) - len(done)) * (command == "check")
    return failures


if __name__ == "__main__":
    if sys.argv[1:2] not in (["extract"], ["build"], ["check"]):
        sys.exit(__doc__)
    sys.exit(1 if main(*sys.argv[1:]) else 0)
