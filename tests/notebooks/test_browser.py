"""The widgets and their notebooks as a teacher projects them: JupyterLab in a real browser, moved by mouse and keys.

Nothing here waits for time to pass: every step waits for what a person would see. An error on the browser's console or
"Error displaying widget" fails the test. Set GRPO_KIT_SCREENSHOTS to a folder to keep a picture of each step.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest
from support.config_files import save_config

from grpo_kit.config import PROJECT_ROOT, load_config

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium"),
]

SECONDS = 60  # until a step has to be done; a start of models on a busy machine
UNSHOWN = re.compile("Error displaying widget|Click to show javascript error")
HARMLESS = ("favicon", "ResizeObserver loop")  # what the console says of JupyterLab itself
START = "from grpo_kit import show\nfrom grpo_kit.config import PROJECT_ROOT\nrun = PROJECT_ROOT / 'data' / 'demo_run'"
WIDGETS = {
    "explorer": "show.GroupExplorer(run, iteration=20)",
    "advantages": "show.AdvantagePlayground()",
    "loss": "show.LossPlayground(run, iteration=20)",
    "compare": "show.ImageCompare(run)",
    "reward": "record = show.read_run(run)\ngroup = record.widest_group(1)\n"
    "images = [record.image(name) for name in group['thumbnail']]\n"
    "mine = show.BeTheReward(images, group['enhanced_prompt'], group['user_prompt'][0])\nmine",
}
CELLS = {
    "widgets": [START, *WIDGETS.values()],
    "broken": ["import ipywidgets\nipywidgets.HTML(_view_module='nowhere')", "1 / 0"],
    "live": [
        START + "\nimport time, grpo_kit as gk\nfrom IPython.display import display\n"
        "changes = dict(num_iterations=6, prompts_per_iteration=1, group_size=4, save_every=1, validate_every=3)\n"
        "changes = {f'training_settings.{name}': value for name, value in changes.items()}\n"
        "cfg = gk.load_config('tiny', {**changes, 'evaluation_settings.validation_prompts': 2})\n"
        "kit = gk.load_experiment(cfg)",
        "watch = show.LiveTraining('run')\ndisplay(watch)\n"
        "def follow(metrics):\n    watch.update(metrics)\n"
        "    time.sleep(600 if metrics['iteration'] == 3 else 0)  # until it is interrupted\n"
        "result = gk.train(kit, 'run', progress=False, on_iteration=follow)",
    ],
}
NOTEBOOKS = ["05_groups", "06_grpo_loss"]
FEW = {"generation_settings.num_inference_steps": 1, "generation_settings.rollout_steps": None}


# --- the server and the browser -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address, its token, and the folder that it shows."""

    address: str
    token: str
    root: Path

    def page(self, notebook: str) -> str:
        """Return the address of a notebook by itself, in a workspace of its own."""
        return f"{self.address}/doc/workspaces/{notebook}/tree/{notebook}.ipynb?token={self.token}&reset"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab on a free port, with settings of its own, over a folder of small notebooks and those of the series."""
    root, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    for name, cells in CELLS.items():
        write_notebook(root / f"{name}.ipynb", cells)
    for name in NOTEBOOKS:
        source = PROJECT_ROOT / "notebooks" / f"{name}.ipynb"
        if source.is_file():
            copy_with_few_steps(source, root)
    write_settings(home)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lab = Lab(f"http://127.0.0.1:{port}", secrets.token_hex(16), root)
    with (home / "log.txt").open("wb") as log:
        server = subprocess.Popen(command(lab, port), env=environment(home), stdout=log, stderr=log, cwd=root)
        try:
            wait_for_server(lab, server, home / "log.txt")
            yield lab
        finally:
            server.terminate()
            server.wait(timeout=300)


def write_notebook(path: Path, cells: list[str]) -> None:
    """Write a notebook of these code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


def copy_with_few_steps(source: Path, root: Path) -> None:
    """Copy a notebook, with pictures of few steps as its default."""
    profile = save_config(load_config("tiny", FEW), root / "few.json")
    notebook = nbformat.read(source, as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source = cell.source.replace('"tiny"', f'"{profile}"')
    nbformat.write(notebook, root / source.name)


def write_settings(home: Path) -> None:
    """Keep JupyterLab from asking for news, and let it draw cells that are out of sight."""
    news = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    tracker = {"windowingMode": "none"}
    places = {
        "labconfig/page_config.json": news,
        "lab/user-settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings": tracker,
    }
    for place, settings in places.items():
        (home / place).parent.mkdir(parents=True, exist_ok=True)
        (home / place).write_text(json.dumps(settings))


def command(lab: Lab, port: int) -> list[str]:
    """Return the command that starts JupyterLab."""
    settings = {
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.root_dir": lab.root,
        "IdentityProvider.token": lab.token,
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--expose-app-in-browser", *options]


def environment(home: Path) -> dict[str, str]:
    """Return an environment without the user's own Jupyter settings, in which kernels find the kit."""
    folders = {f"JUPYTER_{kind}_DIR": str(home) for kind in ("CONFIG", "RUNTIME", "DATA")}
    forked = {"JUPYTER_DEFAULT_PROVISIONER_NAME": "grpo-kit-forked"}  # as in `make lab`
    return os.environ | folders | forked | {"PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"}


def wait_for_server(lab: Lab, server: subprocess.Popen, log: Path) -> None:
    """Return when the server answers."""
    ends = time.monotonic() + SECONDS
    request = urllib.request.Request(f"{lab.address}/api/status", headers={"Authorization": f"token {lab.token}"})
    while time.monotonic() < ends and server.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=60):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text(errors='replace')[-2000:]}")


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    """Chromium without a window."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Notebook:
    """A notebook open in the browser; where `cell` is set, only what that code cell shows is looked at."""

    page: sync_api.Page
    cell: int | None = None
    complaints: list[str] = field(default_factory=list)
    broken: bool = False  # on purpose: the test looks at its errors itself

    def run(self, command: str = "notebook:run-all-cells") -> None:
        """Run its cells and return when they have finished."""
        self.page.evaluate("command => window.jupyterapp.commands.execute(command)", command)

    def start(self, command: str = "notebook:run-all-cells") -> None:
        """Run its cells and return at once."""
        self.page.evaluate("command => { void window.jupyterapp.commands.execute(command); }", command)

    def find(self, selector: str, text: str | re.Pattern[str] | None = None) -> sync_api.Locator:
        """Return what a widget shows."""
        return self.shown().locator(selector, has_text=text)

    def shown(self) -> sync_api.Locator:
        """Return the outputs of all cells, or of the one that is looked at."""
        cells = self.page.locator(".jp-Notebook .jp-CodeCell")
        return (cells if self.cell is None else cells.nth(self.cell)).locator(".jp-OutputArea-output")

    def sees(self, text: str | re.Pattern[str], selector: str = ".widget-html") -> None:
        """Wait until a widget shows a text."""
        sync_api.expect(self.find(selector, text).first).to_be_visible()

    def picture(self, number: int = 0) -> str:
        """Return the hash of an Image widget's present picture. (Its address changes more often than its content.)"""
        return self.changes("", number)

    def changes(self, before: str, number: int = 0) -> str:
        """Wait until an Image widget shows a picture whose hash is not `before`, and return its hash."""
        handle = self.find("img.widget-image").nth(number).element_handle()
        return self.page.wait_for_function(OTHER_PICTURE, arg=[handle, before]).json_value()

    def press(self, slider: sync_api.Locator, *keys: str) -> None:
        """Move a slider by the keyboard."""
        handle = slider.locator(".noUi-handle")
        handle.focus()
        for key in keys:
            handle.press(key)

    def click(self, name: str) -> None:
        """Click a button of a widget."""
        self.shown().get_by_role("button", name=name, exact=True).first.click()

    def choose(self, label: str, option: str) -> None:
        """Choose in a dropdown by its label."""
        box = self.find(".widget-dropdown").filter(has=self.page.get_by_text(label, exact=True)).first
        box.locator("select").select_option(label=option)

    def keep(self, name: str) -> None:
        """Keep a picture of the first widget, where pictures are wanted."""
        folder = os.environ.get("GRPO_KIT_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.find(".widget-vbox").first.screenshot(path=str(Path(folder) / f"{name}.png"))

    def check(self) -> None:
        """Fail on an error in a cell, in a widget, or on the console."""
        assert self.page.get_by_text(UNSHOWN).count() == 0
        assert not (errors := self.page.evaluate(ERRORS)), errors
        assert not self.complaints, self.complaints


@contextmanager
def open_notebook(lab: Lab, browser: sync_api.Browser, name: str) -> Iterator[Notebook]:
    """A notebook, open, its kernel ready."""
    page = browser.new_page(viewport={"width": 1400, "height": 1500}, device_scale_factor=1)
    page.set_default_timeout(1000 * SECONDS)
    sync_api.expect.set_options(timeout=1000 * SECONDS)
    notebook = Notebook(page)
    page.on(
        "console", lambda message: note(notebook, message.type, f"{message.text} {message.location.get('url', '')}")
    )
    page.on("pageerror", lambda error: note(notebook, "error", str(error)))
    page.goto(lab.page(name))
    page.wait_for_function(READY, timeout=3000 * SECONDS)  # a kernel on a busy machine
    yield notebook
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()


@pytest.fixture
def opened(lab: Lab, browser: sync_api.Browser, request: pytest.FixtureRequest) -> Iterator[Notebook]:
    """The notebook named by the test's parameter; its complaints are checked at the end."""
    with open_notebook(lab, browser, request.param) as notebook:
        yield notebook
        if not notebook.broken:
            notebook.check()


@pytest.fixture(scope="module")
def widgets(lab: Lab, browser: sync_api.Browser) -> Iterator[Notebook]:
    """A notebook of all widgets, which has run."""
    with open_notebook(lab, browser, "widgets") as notebook:
        notebook.run()
        yield notebook


@pytest.fixture
def widget(widgets: Notebook, request: pytest.FixtureRequest) -> Iterator[Notebook]:
    """The same, of which only the widget named by the test's parameter is looked at; all complaints are checked."""
    widgets.cell = 1 + list(WIDGETS).index(request.param)
    yield widgets
    widgets.check()


ERRORS = """() => window.jupyterapp.shell.currentWidget.context.model.toJSON().cells
    .flatMap(cell => cell.outputs ?? []).filter(output => output.output_type === 'error')
    .map(output => `${output.ename}: ${output.evalue}`)"""
FINISHED = """() => window.jupyterapp.shell.currentWidget.context.model.toJSON().cells
    .every(cell => cell.execution_count)"""
OTHER_PICTURE = """async ([image, before]) => {
    if (!image.complete || image.naturalWidth < 100) return false;
    const content = await fetch(image.src).then(answer => answer.arrayBuffer(), () => null);
    if (content === null) return false;
    const hash = String.fromCharCode(...new Uint8Array(await crypto.subtle.digest('SHA-256', content)));
    return btoa(hash) === before ? false : btoa(hash);
}"""
READY = """() => {
    const current = window.jupyterapp?.shell?.currentWidget;
    return current?.context?.isReady && current.sessionContext?.session?.kernel?.status === 'idle'
        && window.jupyterapp.commands.isEnabled('notebook:run-all-cells');
}"""


def note(notebook: Notebook, kind: str, text: str) -> None:
    """Remember what the console complains about."""
    if kind == "error" and not any(word in text for word in HARMLESS):
        notebook.complaints.append(text)


def notebook(name: str) -> pytest.MarkDecorator:
    """Open this notebook for a test."""
    return pytest.mark.parametrize("opened", [name], indirect=True, ids=[name])


def of_widgets(name: str) -> pytest.MarkDecorator:
    """Show a test this widget."""
    return pytest.mark.parametrize("widget", [name], indirect=True, ids=[name])


@notebook("broken")
def test_a_failing_cell_a_widget_without_a_view_and_the_console_are_noticed(opened: Notebook) -> None:
    opened.broken = True
    opened.run()
    sync_api.expect(opened.page.get_by_text(UNSHOWN).first).to_be_visible()
    opened.page.wait_for_function(f"() => ({ERRORS})().some(error => error.startsWith('ZeroDivisionError'))")
    assert any("nowhere" in complaint for complaint in opened.complaints)
    with pytest.raises(AssertionError):
        opened.check()


# --- the widgets, one by one ----------------------------------------------------------------------------------------


@of_widgets("explorer")
def test_the_explorer_is_stepped_through(widget: Notebook) -> None:
    widget.sees("iteration 20, 8 rewrites")
    picture, image = widget.picture(), widget.find("img.widget-image").first
    widget.keep("explorer")
    widget.click("KL")
    picture = widget.changes(picture)
    widget.find(".widget-accordion").get_by_text("as text", exact=True).click()
    widget.sees("KL from the reference (k3) of its tokens")
    widget.click("ratio")
    picture = widget.changes(picture)
    widget.sees("ratio, after / before the step of its tokens")  # what was unfolded stays so
    widget.keep("explorer-ratio")
    height, before = image.bounding_box()["height"], widget.find(".widget-html").first.inner_text()
    widget.click("next ›")
    picture = widget.changes(picture)
    sync_api.expect(widget.find(".widget-html").first).not_to_have_text(before)
    assert image.bounding_box()["height"] == height  # nothing below moves
    widget.choose("iteration", "120")
    widget.sees("iteration 120, 8 rewrites")
    picture = widget.changes(picture)
    widget.click("as sampled")
    widget.changes(picture)
    widget.keep("explorer-120")


@of_widgets("advantages")
def test_rewards_are_dragged_and_presets_chosen(widget: Notebook) -> None:
    sync_api.expect(widget.find(".widget-slider.jupyter-widget-vslider, .widget-vslider").first).to_be_visible()
    widget.sees("The rewards lie 0.600 apart")
    widget.keep("advantages")
    before = widget.picture()
    first = widget.find(".widget-vslider").first
    widget.press(first, "PageDown", "PageDown")
    widget.changes(before)
    widget.sees(f"The rewards lie {float(first.locator('.widget-readout').inner_text()) - 0.2:.3f} apart")
    before = widget.picture()
    widget.click("two, hardly apart")
    widget.sees("With two rewards the gap cancels")
    before = widget.changes(before)
    widget.keep("advantages-two")
    widget.click("tiny spread")
    widget.sees("may be noise")
    before = widget.changes(before)
    widget.keep("advantages-tiny")
    size = widget.find(".widget-hslider").first
    widget.press(size, "End")
    widget.sees("The rewards lie 0.203 apart")
    widget.changes(before)
    sync_api.expect(widget.find(".widget-vslider >> visible=true")).to_have_count(8)
    widget.keep("advantages-eight")


@of_widgets("loss")
def test_the_loss_follows_its_sliders_and_a_recorded_step_its_settings(widget: Notebook) -> None:
    widget.sees("The bound holds")
    widget.sees("times the recorded one")
    widget.keep("loss")
    curves, step = widget.picture(0), widget.picture(1)
    widget.click("as recorded")
    widget.sees("that the step was made with")
    step = widget.changes(step, 1)
    widget.press(widget.find(".widget-hslider", "ratio").first, "PageDown", "PageDown", "PageDown")
    curves = widget.changes(curves)
    widget.choose("loss_type", "sapo")
    curves = widget.changes(curves)
    widget.sees("sapo, ratio")
    widget.click("Dr. GRPO")
    step = widget.changes(step, 1)
    widget.sees("times the recorded one")
    widget.keep("loss-dr-grpo")
    widget.choose("policy", "after the recorded step")
    step = widget.changes(step, 1)
    widget.choose("iteration", "120")
    widget.changes(step, 1)


@of_widgets("compare")
def test_prompts_are_compared(widget: Notebook) -> None:
    picture = widget.picture()
    widget.find(".widget-accordion").get_by_text("as text", exact=True).click()
    widget.sees("trained policy: ")
    widget.keep("compare")
    before = widget.find(".widget-html").first.inner_text()
    widget.click("next ›")
    widget.changes(picture)
    sync_api.expect(widget.find(".widget-html").first).not_to_have_text(before)


@of_widgets("reward")
def test_images_are_ranked_by_clicking(widget: Notebook) -> None:
    sync_api.expect(widget.find("img.widget-image")).to_have_count(2)
    buttons = widget.find(".widget-hbox button")
    sync_api.expect(buttons).to_have_count(8)
    for number in (3, 1, 0, 2):
        buttons.nth(number).click()
    widget.sees("4 of 8 are ranked")
    widget.keep("reward-half")
    widget.click("start again")
    widget.sees("0 of 8 are ranked")
    for number in (7, 6, 5, 4, 3, 2, 1, 0):
        buttons.nth(number).click()
    widget.sees("All 8 are ranked. Rewards: 0.00, 0.14, 0.29")
    sync_api.expect(buttons.nth(7)).to_have_text("1 (best)")
    widget.keep("reward")


@notebook("live")
def test_training_is_watched_interrupted_and_goes_on(opened: Notebook) -> None:
    opened.start()
    opened.sees("no iteration yet")
    opened.sees("iteration 3 of 6")
    opened.keep("live-early")
    opened.start("notebook:interrupt-kernel")
    opened.page.wait_for_function(f"() => ({ERRORS})().some(error => error.startsWith('KeyboardInterrupt'))")
    sync_api.expect(opened.find(".widget-html", "iteration 6 of 6")).to_have_count(0)
    opened.page.wait_for_function(FINISHED)  # until then the kernel still drops what it is asked
    opened.run()
    opened.sees("iteration 6 of 6")
    sync_api.expect(opened.find("img.widget-image")).to_have_count(2)
    opened.keep("live")


# --- the notebooks of the series ------------------------------------------------------------------------------------


def present(name: str) -> pytest.MarkDecorator:
    """Leave a notebook's test out while the series does not have it."""
    there = (PROJECT_ROOT / "notebooks" / f"{name}.ipynb").is_file()
    return pytest.mark.skipif(not there, reason=f"notebooks/{name}.ipynb is not there yet")


@present("05_groups")
@notebook("05_groups")
def test_the_notebook_on_groups_runs_and_its_explorer_moves(opened: Notebook) -> None:
    opened.run()
    explorer = opened.find(".widget-vbox").first
    sync_api.expect(explorer.locator("img.widget-image")).to_have_count(1)
    before = explorer.inner_text()
    explorer.get_by_role("button", name="next ›", exact=True).click()
    sync_api.expect(explorer).not_to_have_text(before)
    opened.keep("notebook-05")


@present("06_grpo_loss")
@notebook("06_grpo_loss")
def test_the_notebook_on_the_loss_runs_and_its_playgrounds_move(opened: Notebook) -> None:
    opened.run()
    before = opened.picture()
    opened.press(opened.find(".widget-vslider").first, "PageDown", "PageDown")
    opened.changes(before)
    count = opened.find("img.widget-image").count()
    curves = opened.picture(count - 2)
    opened.press(opened.find(".widget-hslider", "ratio").first, "PageDown", "PageDown", "PageDown")
    opened.changes(curves, count - 2)
    opened.keep("notebook-06")
