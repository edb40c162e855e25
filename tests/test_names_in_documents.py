"""Every module, file and command that README, docs, notebooks and data cards name exists."""

import importlib
import json
import re
from pathlib import Path

import pytest

from grpo_kit.config import PROJECT_ROOT

DOCUMENTS = [
    *(PROJECT_ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((PROJECT_ROOT / "docs").glob("*.md")),
    *sorted((PROJECT_ROOT / "data").rglob("*.md")),
    *sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb")),
]
DOTTED = re.compile(r"(?<![\w./-])((?:grpo_kit|benchmarks|tools)(?:\.[a-z_]\w*)+)")
FILES = re.compile(r"(?<![\w./-])((?:grpo_kit|benchmarks|tools|tests|docs)/[\w./-]*\w)")


def _text(path: Path) -> str:
    """What a document says; of a notebook its sources, since outputs are as they were."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def _resolves(dotted: str) -> bool:
    """Whether it is a module, or a name in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[length:])
    return False


def _missing(text: str) -> list[str]:
    names = [name for name in DOTTED.findall(text) if not _resolves(name)]
    return names + [name for name in FILES.findall(text) if not (PROJECT_ROOT / name).exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(PROJECT_ROOT).as_posix())
def test_what_a_document_names_exists(path: Path):
    assert _missing(_text(path)) == []


def test_a_name_that_is_gone_is_noticed():
    assert _missing("see `grpo_kit.train.resume`, `grpo_kit/parallel.py` and grpo_kit.training.loop") == [
        "grpo_kit.train.resume",
        "grpo_kit/parallel.py",
    ]
