"""The whole series as a user runs it: one command, real models, real papermill, and the page at its end."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from support.hostile import active_nodes, hostile_texts, image_count
from support.synthetic_run import write_synthetic_run

from grpo_kit import cli
from grpo_kit.config import PROJECT_ROOT, KitError
from grpo_kit.evaluation.pools import pool_runs, read_runs
from grpo_kit.runs.checkpoint import sha256
from grpo_kit.show import write_report
from grpo_kit.show.comparison import write_comparison
from grpo_kit.show.pages import share_pages, without_places

REFERENCE = PROJECT_ROOT / "reports" / "reference"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _recorded() -> dict[str, str]:
    """Every file of the recorded run, with its hash."""
    return {str(path): sha256(path) for path in (PROJECT_ROOT / "data" / "demo_run").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    """The recorded run before anything here has run."""
    return _recorded()


@pytest.fixture(scope="module")
def finished(before: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short run of the notebooks that train, evaluate and compare, from elsewhere: its folder and what it printed."""
    place = tmp_path_factory.mktemp("elsewhere")
    run = place / "run"
    short = {"num_iterations": 4, "seeds_per_prompt": 1, "trial_iterations": 2, "trial_seeds": 1}
    parameters = [part for name, value in short.items() for part in ("-p", f"{name}={value}")]
    chosen = ["--profile", "workshop", "--notebooks", "00,07,08,09", "--run-dir", str(run)]
    command = [sys.executable, "-m", "grpo_kit.cli", "run", *chosen, *parameters]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return run, done.stdout


@pytest.mark.slow
def test_one_command_trains_evaluates_and_writes_a_page(finished: tuple[Path, str]) -> None:
    run, printed = finished
    assert "trained policy" in printed and "index.html" in printed
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    assert json.loads((run / "final_results.json").read_text())["differences"]["trained-raw"]
    assert sorted(path.stem[:2] for path in (run / "notebooks").glob("*.ipynb")) == ["00", "07", "08", "09"]


@pytest.mark.slow
def test_the_pages_need_no_network_and_run_nothing(finished: tuple[Path, str]) -> None:
    run, _ = finished
    for page in (run / "index.html", *(run / "notebooks").glob("*.html")):
        text = page.read_text(encoding="utf-8")
        assert image_count(text) > 0 and not active_nodes(text), page


@pytest.mark.slow
def test_a_run_leaves_the_recorded_data_alone(before: dict[str, str], finished: tuple[Path, str]) -> None:
    assert before and _recorded() == before


# --- a small copy of the pages, and the one that is committed ---------------------------------------------------------


def without_pictures(page: Path) -> str:
    """What a page says, in any encoding of its pictures."""
    text = re.sub(r"data:image/[^\"']+", "", page.read_text(encoding="utf-8"))
    return re.sub(r"\s+", " ", re.sub(r" ·\s*<a href=\"[\w.]+ipynb\">the notebook itself</a>", "", text))


@pytest.mark.slow
def test_a_shared_copy_says_the_same_and_is_smaller(finished: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = finished
    assert f'"{run}"' in (run / "notebooks" / "07_train.ipynb").read_text().replace("\\", "")
    (tmp_path / "copy" / "notebooks").mkdir(parents=True)
    (tmp_path / "copy" / "notebooks" / "99_stale.html").touch()
    pages = share_pages(run, tmp_path / "copy")
    assert sorted(page.stem[:2] for page in pages) == ["00", "07", "08", "09", "in"]
    assert not (tmp_path / "copy" / "notebooks" / "99_stale.html").exists()
    for page in pages:
        original = run / page.relative_to(tmp_path / "copy")
        assert without_pictures(page) == without_places(without_pictures(original), run)
        assert str(run) not in page.read_text() and str(PROJECT_ROOT) not in page.read_text()
        assert image_count(page.read_text()) == image_count(original.read_text()) > 0
        assert page.stat().st_size < original.stat().st_size
        assert not re.search(r'href="(?!https:)[^"]*\.ipynb"', page.read_text())


def test_a_run_without_a_report_cannot_be_shared_and_none_into_itself(tmp_path: Path) -> None:
    with pytest.raises(KitError, match=r"no index\.html in it\. Write it: grpo-kit report"):
        share_pages(tmp_path, tmp_path / "copy")
    (tmp_path / "index.html").touch()
    with pytest.raises(KitError, match="the run's own folder"):
        share_pages(tmp_path, tmp_path)


def test_the_report_command_shares_the_pages(
    synthetic_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(synthetic_run), "--share", str(tmp_path / "copy")])
    assert not stop.value.code and "shared: 1 pages" in capsys.readouterr().out
    assert (tmp_path / "copy" / "index.html").is_file()


def reference_pages() -> list[Path]:
    """The pages of the committed reference report; skips, saying so, in a checkout that has none."""
    pages = [REFERENCE / "index.html", *sorted((REFERENCE / "notebooks").glob("*.html"))]
    if not pages[0].is_file():
        pytest.skip("reports/reference/ holds no report: grpo-kit report RUN --share reports/reference")
    return pages


def test_the_reference_report_is_self_contained_and_small() -> None:
    pages = reference_pages()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not active_nodes(text), page
        assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:' in text
        sources = re.findall(r"<img[^>]* src=\"([^\"]*)\"", text)
        assert sources and len(sources) == image_count(text)
        for source in sources:
            kind, _, content = source.partition(";base64,")
            assert kind in ("data:image/webp", "data:image/jpeg", "data:image/png", "data:image/svg+xml")
            if "svg" not in kind:
                Image.open(io.BytesIO(base64.b64decode(content))).verify()
        inside = [link for link in re.findall(r"href=\"([^\"]+)\"", text) if not link.startswith(("#", "https://"))]
        assert not [link for link in inside if not (page.parent / link.split("#")[0]).exists() and "notebooks/" in link]
    assert sum(page.stat().st_size for page in pages) <= 4_500_000  # thirteen pages
    machine = re.compile(r"/(home|root|work|tmp|Users|private)/\w")
    assert not [page for page in pages if machine.search(without_pictures(page))]


# --- in a browser, with the network off -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Headless Chromium, driven by Playwright."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: apt-get install chromium")
    with driver.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def look_at(browser: object, page: Path) -> tuple[int, list[str]]:
    """Open a page offline: how many images it shows, and what went wrong (requests, dialogs, errors, broken images)."""
    context = browser.new_context(offline=True)
    tab, wrong = context.new_page(), []
    address = page.resolve().as_uri()
    tab.on(
        "request", lambda r: wrong.append(f"asked for {r.url[-80:]}") if not r.url.startswith(("data:", address)) else 0
    )
    tab.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    tab.on("pageerror", lambda error: wrong.append(f"error {error}"))
    tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    tab.goto(address)
    images = tab.eval_on_selector_all("img", "all => all.map(i => i.complete && i.naturalWidth > 0)")
    wrong += [f"image {number} is not shown" for number, shown in enumerate(images) if not shown]
    context.close()
    return len(images), wrong


@pytest.mark.slow
def test_every_image_of_a_run_shows_without_a_network(finished: tuple[Path, str], browser: object) -> None:
    run, _ = finished
    for page in (run / "index.html", *(run / "notebooks").glob("*.html")):
        images, wrong = look_at(browser, page)
        assert images > 0 and not wrong, (page.name, wrong)


@pytest.mark.slow
def test_every_image_of_the_reference_report_shows_without_a_network(browser: object) -> None:
    for page in reference_pages():
        images, wrong = look_at(browser, page)
        assert images > 0 and not wrong, (page.name, wrong)


def test_the_browser_notices_a_broken_image_a_request_and_a_script(browser: object, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        "<img src='data:image/png;base64,AAAA'><img src='gone.png'><script>alert(1)</script>"
    )
    _, wrong = look_at(browser, tmp_path / "bad.html")
    assert "dialog 1" in wrong and any(text.startswith("asked for") and "gone.png" in text for text in wrong)
    assert sum("is not shown" in text for text in wrong) == 2


@pytest.mark.slow
def test_hostile_texts_do_nothing_in_a_browser(
    browser: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo_kit.show import report

    monkeypatch.setattr(report, "CASES", 200)
    prompts = [(text, f"{number} {text[:60]}", "easy") for number, text in enumerate(hostile_texts(200))]
    runs = [write_synthetic_run(tmp_path / name, iterations=4, seeds=1, prompts=prompts) for name in ("a", "b")]
    pages = [write_report(runs[0]), write_comparison(pool_runs(read_runs(runs)), tmp_path / "compare.html")]
    for page in pages:
        images, wrong = look_at(browser, page)
        assert images > 0 and not wrong, (page.name, wrong)
