"""The whole series as a user runs it: one command, real models, real papermill, and the page at its end."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grpo_kit.config import PROJECT_ROOT
from grpo_kit.runs.checkpoint import sha256


def _recorded() -> dict[str, str]:
    """Every file of the recorded run, with its hash."""
    return {str(path): sha256(path) for path in (PROJECT_ROOT / "data" / "demo_run").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    """The recorded run before anything here has run."""
    return _recorded()


@pytest.fixture(scope="module")
def finished(before: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short run of the three notebooks from another working directory: its folder and what it printed."""
    place = tmp_path_factory.mktemp("elsewhere")
    run = place / "run"
    short = {"num_iterations": 4, "seeds_per_prompt": 1}
    parameters = [part for name, value in short.items() for part in ("-p", f"{name}={value}")]
    command = [sys.executable, "-m", "grpo_kit.cli", "run", "--run-dir", str(run), *parameters]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return run, done.stdout


class _Page(HTMLParser):
    """Collects what a page would run or fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.active: list[str] = []
        self.outside: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = dict(attributes)
        self.images += tag == "img"
        if tag in ("script", "iframe", "object", "embed") or any(name.startswith("on") for name in names):
            self.active.append(tag)
        for name in ("src", "href"):
            value = names.get(name) or ""
            if tag != "a" and value.startswith(("http:", "https:", "//")):
                self.outside.append(value)


def test_one_command_trains_evaluates_and_writes_a_page(finished: tuple[Path, str]) -> None:
    run, printed = finished
    assert "trained policy" in printed and "index.html" in printed
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    assert json.loads((run / "final_results.json").read_text())["differences"]["trained-raw"]
    assert sorted(path.stem[:2] for path in (run / "notebooks").glob("*.ipynb")) == ["00", "07", "08"]


def test_the_page_needs_no_network_and_runs_nothing(finished: tuple[Path, str]) -> None:
    run, _ = finished
    for page in (run / "index.html", *(run / "notebooks").glob("*.html")):
        parsed = _Page()
        parsed.feed(page.read_text(encoding="utf-8"))
        assert parsed.images > 0 and not parsed.active and not parsed.outside, page


def test_a_run_leaves_the_recorded_data_alone(before: dict[str, str], finished: tuple[Path, str]) -> None:
    assert before and _recorded() == before
