"""The widgets: what they compute, how they follow their controls, their static twins, and that no text becomes code."""

from __future__ import annotations

import base64
import io
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import ipywidgets
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.text import Text
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from PIL import Image
from support.abuse import Count
from support.hostile import active_nodes, hostile_texts
from support.quick_runs import fresh
from support.synthetic_run import PROMPTS, write_rollout, write_synthetic_run

from grpo_kit import show
from grpo_kit.config import PROJECT_ROOT, KitError, TrainingSettings
from grpo_kit.experiment import Experiment
from grpo_kit.grpo import LOSS_TYPES, group_advantages
from grpo_kit.rollout import collect_rollout
from grpo_kit.runs.kernels import OwnKernel
from grpo_kit.show.pages import write_notebook_pages
from grpo_kit.show.pushes import loss_and_push, recompute
from grpo_kit.show.style import Drawing, frame_of, plain_text, signed
from grpo_kit.show.widgets import advantage_playground, live_training, picture_box
from grpo_kit.show.widgets.episode import changed_words
from grpo_kit.show.widgets.picture_box import BUDGET, PictureBox, encode, escape
from grpo_kit.show.widgets.tokens import Token, tinted, token_values
from grpo_kit.training.loop import train

DEMO = PROJECT_ROOT / "data" / "demo_run"
VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def demo() -> show.RunRecord:
    """The recorded run; do not change it."""
    return show.read_run(DEMO)


def pictures(count: int) -> list[Image.Image]:
    """Return small pictures that differ."""
    return [Image.new("RGB", (32, 32), (40 * (i % 6), 90, 200 - 30 * (i % 5))) for i in range(count)]


@dataclass(frozen=True)
class Shown:
    """A widget, the forms in which a notebook shows it, and what it says of them."""

    widget: PictureBox
    forms: dict[str, object]
    metadata: dict[str, dict[str, str]]

    @property
    def kind(self) -> str:
        """The kind of its picture."""
        return "image/png" if "image/png" in self.forms else "image/jpeg"

    @property
    def picture(self) -> bytes:
        """Its static picture."""
        return base64.b64decode(self.forms[self.kind])


def as_shown(widget: PictureBox) -> Shown:
    """Return what a notebook shows of a widget."""
    return Shown(widget, *widget._repr_mimebundle_())


@pytest.fixture(scope="module")
def each(synthetic_run_template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shown]:
    """One of each widget over a run; do not change them."""
    run = Path(shutil.copytree(synthetic_run_template, tmp_path_factory.mktemp("each") / "run"))
    widgets = [
        show.GroupExplorer(run),
        show.EpisodeExplorer(with_turns(run)),
        show.AdvantagePlayground(),
        show.LossPlayground(run),
        show.LiveTraining(run),
        show.ImageCompare(run),
        show.BeTheReward(pictures(4), list("abcd"), "a prompt"),
    ]
    return {type(widget).__name__: as_shown(widget) for widget in widgets}


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but no picture of them, for tests that look at figures and words alone."""
    monkeypatch.setattr(Drawing, "to_png", lambda figure, dpi=100: b"")


def with_turns(run: Path, turns: int = 2, **settings: object) -> Path:
    """Return a copy of a run whose last rollout has so many turns of three prompts."""
    copy = Path(shutil.copytree(run, run.parent / f"{run.name}_of_{turns}_turns", dirs_exist_ok=True))
    config = json.loads((copy / "config.json").read_text())
    config["generation_settings"] = {"turns": turns, **settings}
    (copy / "config.json").write_text(json.dumps(config))
    prompts = [prompt for prompt in PROMPTS[:3] for _ in range(turns)]
    write_rollout(copy, 24, 24, prompts, np.random.default_rng(0))
    return copy


def tree(widget: ipywidgets.Widget) -> Iterator[ipywidgets.Widget]:
    """Yield a widget and everything in it."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from tree(child)


def markup(widget: ipywidgets.Widget) -> str:
    """Return all HTML that a widget hands to the browser."""
    return "".join(w.value for w in tree(widget) if isinstance(w, ipywidgets.HTML))


def images_of(widget: ipywidgets.Widget) -> list[bytes]:
    """Return the pictures that stand in a widget's Image children."""
    return [w.value for w in tree(widget) if isinstance(w, ipywidgets.Image)]


def drawn(widget: PictureBox) -> str:
    """Return all text that stands in a widget's pictures, a line each."""
    return "\n".join(text.get_text() for figure in widget.figures() for text in figure.findobj(Text))


def frames(widget: PictureBox) -> list[tuple[str, float, str]]:
    """Return the colour, the width and the line of each frame around a picture, in the order drawn."""
    patches = (patch for figure in widget.figures() for axes in figure.axes for patch in axes.patches)
    shown = [patch for patch in patches if not patch.get_fill()]
    return [(to_hex(p.get_edgecolor()), p.get_linewidth(), p.get_linestyle()) for p in shown]


def shown_images(widget: PictureBox) -> int:
    """Return how many images stand in a widget's pictures."""
    return sum(len(axes.images) for figure in widget.figures() for axes in figure.axes)


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_widget_has_a_live_view_and_a_small_picture(each: dict[str, Shown]) -> None:
    for name, one in each.items():
        assert VIEW in one.forms and len(one.forms[one.kind]) < 150_000, name
        with Image.open(io.BytesIO(one.picture)) as picture:
            assert picture.width > 600 and np.asarray(picture.convert("L")).std() > 5, name
        assert len(one.forms["text/plain"]) > 20 and "<" not in one.forms["text/plain"], name
        alt = one.metadata[one.kind]["alt"]
        assert alt.startswith(plain_text(one.widget.reading()[0])) and len(alt) <= 2000, name


def test_the_widget_and_its_twin_show_the_same_picture(each: dict[str, Shown]) -> None:
    for name, one in each.items():
        live = [Image.open(io.BytesIO(content)).convert("L") for content in images_of(one.widget)]
        with Image.open(io.BytesIO(one.picture)) as twin:
            twin, top = twin.convert("L"), 0
        for picture in live:
            size = (round(picture.width / 1.5), round(picture.height / 1.5))  # 150 dots an inch, the twin has 100
            part = np.asarray(twin.crop((0, top, *np.add(size, (0, top)))).resize((114, 60)), dtype=float)
            assert np.abs(part - np.asarray(picture.resize((114, 60)))).mean() < 4, name
            top += size[1]


def test_the_alt_text_says_what_the_pictures_show(each: dict[str, Shown]) -> None:
    explorer, ((kind, metadata),) = each["GroupExplorer"].widget, each["GroupExplorer"].metadata.items()
    assert kind == "image/png"
    for row in explorer.group.head(3).to_dict("records"):
        assert f"reward {row['reward']:.3f}, advantage {signed(row['advantage'])}" in metadata["alt"]
        assert row["enhanced_prompt"] in metadata["alt"]


def test_no_widget_uses_output(each: dict[str, Shown]) -> None:
    for one in each.values():
        assert not any(isinstance(part, ipywidgets.Output) for part in tree(one.widget))


@pytest.mark.parametrize("name", ["GroupExplorer", "EpisodeExplorer", "ImageCompare"])
def test_stepping_moves_nothing_below(synthetic_run: Path, name: str) -> None:
    widget = getattr(show, name)(with_turns(synthetic_run) if name == "EpisodeExplorer" else synthetic_run)
    before, sizes = images_of(widget), []
    for _, prompt in widget.prompt.options[:3]:
        widget.prompt.value = prompt
        sizes.append(Image.open(io.BytesIO(images_of(widget)[0])).size)
    assert images_of(widget) != before and len(set(sizes)) == 1
    assert widget.words.layout.min_height and widget.folded.selected_index is None


def test_widgets_are_loaded_only_when_they_are_used() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from grpo_kit import show; print([n for n in ('torch', 'ipywidgets') if n in sys.modules]);"
        "show.GroupExplorer; print('ipywidgets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True"]
    with pytest.raises(AttributeError, match="GruopExplorer"):
        _ = show.GruopExplorer


def test_a_picture_of_photographs_keeps_to_the_budget() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (8, 256, 256, 3), dtype=np.uint8)
    figure = show.image_grid([Image.fromarray(image) for image in noise], ["photo"] * 8)
    kind, content = encode([figure])
    assert kind == "image/jpeg" and len(content) <= BUDGET
    assert encode([show.image_grid(pictures(3), ["flat"] * 3)])[0] == "image/png"


def test_several_figures_stand_one_below_the_other(each: dict[str, Shown]) -> None:
    alone, both = as_shown(show.LossPlayground()), each["LossPlayground"]
    heights = [Image.open(io.BytesIO(one.picture)).height for one in (alone, both)]
    assert heights[1] > heights[0] + 300


def test_frames_grow_with_the_advantage_and_tell_its_sign_without_colour() -> None:
    sizes = [frame_of(advantage)["linewidth"] for advantage in (0.0, 0.2, 1.0, 2.0, 5.0)]
    assert sizes == sorted(sizes) and sizes[-1] == sizes[-2] > sizes[0]
    assert frame_of(-1.0)["linestyle"] != "-" == frame_of(1.0)["linestyle"]
    assert frame_of(float("nan")) == frame_of(0.0)
    assert (signed(1.094), signed(-0.306), signed(-0.001)) == ("+1.09", "−0.31", "0.00")


# --- where nothing runs ---------------------------------------------------------------------------------------------


def executed(one: Shown) -> nbformat.NotebookNode:
    """Return a notebook that shows a widget, as a run leaves it."""
    output = nbformat.v4.new_output("display_data", data=one.forms, metadata=one.metadata)
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("widget", outputs=[output], execution_count=1)])


def test_nbconvert_shows_the_picture_without_the_state_and_the_widget_with_it(each: dict[str, Shown]) -> None:
    one = each["AdvantagePlayground"]
    without = executed(one)
    page = HTMLExporter(template_name="lab").from_notebook_node(without)[0]
    assert "data:image/png;base64" in page and "jp-RenderedWidget" not in page and '"model_id"' not in page
    held = executed(one)
    state = {"state": {one.widget.model_id: {"model_name": "VBoxModel"}}, "version_major": 2, "version_minor": 0}
    held.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": state}
    assert '"model_id"' in HTMLExporter(template_name="lab").from_notebook_node(held)[0]


def test_the_pages_of_a_report_show_the_pictures(each: dict[str, Shown], tmp_path: Path) -> None:
    for name, one in each.items():
        nbformat.write(executed(one), tmp_path / f"{name}.ipynb")
    pages = write_notebook_pages(tmp_path)
    assert len(pages) == len(each)
    for page in pages:
        text = page.file.read_text(encoding="utf-8")
        assert text.count('src="data:image/') == 1 and not active_nodes(text), page.file.name
        assert "model_id" not in text and text.count(' alt="') == 1, page.file.name


HEADLESS = """
from IPython.display import display
from PIL import Image
from grpo_kit import show
watch = show.LiveTraining({run!r})
display(watch)
watch.update(dict(show.read_run({run!r}).metrics.iloc[-1]))
---
show.GroupExplorer({run!r})
---
show.EpisodeExplorer({turns!r})
---
show.AdvantagePlayground()
---
show.LossPlayground({run!r})
---
show.ImageCompare({run!r})
---
reward = show.BeTheReward([Image.new("RGB", (8, 8))] * 2, ["a", "b"], "a prompt", default=[0.2, 0.7])
reward
"""


@pytest.mark.slow
def test_a_headless_run_leaves_a_picture_for_each(synthetic_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT_ROOT))
    cells = [
        nbformat.v4.new_code_cell(text.strip())
        for text in HEADLESS.format(run=str(synthetic_run), turns=str(with_turns(synthetic_run))).split("---")
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    options = {"resources": {"metadata": {"path": "/"}}, "kernel_manager_class": OwnKernel}
    NotebookClient(notebook, timeout=600, startup_timeout=600, kernel_name="python3", **options).execute()
    for cell in notebook.cells:
        shown = [output for output in cell.outputs if "data" in output]
        assert len(shown) == 1, cell.source
        assert "image/png" in shown[0].data and VIEW in shown[0].data, cell.source
        assert len(shown[0].metadata["image/png"]["alt"]) > 20, cell.source
    assert "iteration 24 of 24" in notebook.cells[0].outputs[0].data["text/plain"]


# --- hostile text ---------------------------------------------------------------------------------------------------

PAYLOADS = [*hostile_texts(199), "\ud800 lone surrogate"]
TAGS, ATTRIBUTES = {"div"}, {"style"}


class Page(HTMLParser):
    """Collect the tags, the attributes' names, the styles and the text of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.styles: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.styles += [value or "" for name, value in attrs if name == "style"]

    def handle_data(self, data: str) -> None:
        """Note text."""
        self.text += data


def hostile_run(run: Path) -> Path:
    """Write a run in which every prompt, rewrite and token is one of the payloads, and each of them is used."""
    assert len(PAYLOADS) == 200
    storable = [text.encode("utf-8", "replace").decode() for text in PAYLOADS]  # a file holds no lone surrogate
    prompts = [(text, text, text) for text in storable]
    write_synthetic_run(run, iterations=4, seeds=1, prompts=prompts)
    write_rollout(run, 4, 4, prompts, np.random.default_rng(0))
    path = run / "rollouts" / "iter_000004.parquet"
    rollout = pd.read_parquet(path)
    rollout["enhanced_prompt"] = rollout["user_prompt"]
    rollout["tokens"] = [[text, "a", text[::-1]] for text in rollout["user_prompt"]]
    rollout["group_id"] = np.arange(len(rollout)) // 20
    rollout.to_parquet(path)
    return run


def assert_inert(page: str, texts: list[str]) -> None:
    """Check that a page has no active node, no element but ours, and shows each text as it is."""
    found = Page()
    found.feed(page)
    assert active_nodes(page) == []
    assert found.tags <= TAGS and found.attributes <= ATTRIBUTES
    assert not [style for style in found.styles if "url(" in style or "expression" in style or "fixed" in style]
    for text in texts:
        assert plain_text(text, 50).rstrip("…") in found.text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of nothing but payloads."""
    return hostile_run(tmp_path_factory.mktemp("hostile") / "run")


def undrawn(kind: type[PictureBox]) -> type[PictureBox]:
    """The same widget with empty figures, for what it hands over as HTML: what is drawn has its own tests."""

    class Undrawn(kind):
        def figures(self) -> list[Drawing]:
            return [Drawing(figsize=(1, 1)) for _ in self.pictures]

    return Undrawn


def check_explorer(run: Path) -> None:
    """Every payload, as prompt, rewrite and token, through the explorer's HTML."""
    explorer = undrawn(show.GroupExplorer)(run, iteration=4)
    for (_, group), tint in itertools.product(explorer.prompt.options, ("change", "ratio", "kl", None)):
        explorer.prompt.value, explorer.tint.value = group, tint
        assert_inert(markup(explorer), [plain_text(text) for text in explorer.group["enhanced_prompt"]])


@pytest.mark.abuse("S5")
def test_the_explorer_shows_200_hostile_texts_as_text(hostile: Path, attempts: Count) -> None:
    with attempts(200):
        check_explorer(hostile)


@pytest.mark.abuse("S5", broken="explorer_that_escapes_badly")
@pytest.mark.parametrize(
    "broken", [lambda text, limit=0: str(text), lambda text, limit=0: str(text).replace("<", "&lt;")]
)
def test_an_explorer_that_escapes_badly_is_caught(
    hostile: Path, broken: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_box, "escape", broken)
    with pytest.raises(AssertionError):
        check_explorer(hostile)


def test_the_others_show_hostile_texts_as_text(hostile: Path, unrendered: None) -> None:
    assert_inert(markup(show.LiveTraining(hostile)), [])
    compare = undrawn(show.ImageCompare)(hostile)
    for _, prompt_id in compare.prompt.options:
        compare.prompt.value = prompt_id
        assert_inert(markup(compare), [compare.rows["user_prompt"].iloc[0]])
    what_if = show.LossPlayground(hostile, iteration=4)
    what_if.what_if.presets[1].click()
    assert_inert(markup(what_if), [])
    for start in range(0, 200, 20):
        texts, default = PAYLOADS[start : start + 20], [0.5] * 20 if start % 40 else None
        assert_inert(markup(undrawn(show.BeTheReward)(pictures(20), texts, texts[0], default)), texts)


@pytest.mark.slow
def test_hostile_texts_can_be_drawn_and_sent(hostile: Path) -> None:
    explorer = show.GroupExplorer(hostile, iteration=4)
    explorer.prompt.value = 0  # the group of what breaks layouts
    widgets = [explorer, show.ImageCompare(hostile), show.LossPlayground(hostile, iteration=4)]
    widgets.append(show.BeTheReward(pictures(8), PAYLOADS[-8:], PAYLOADS[-1]))
    for widget in widgets:
        json.dumps(widget._repr_mimebundle_(), ensure_ascii=False).encode("utf-8")
        for part in tree(widget):
            state = {
                name: value for name, value in part.get_state().items() if not isinstance(value, bytes | memoryview)
            }
            json.dumps(state, ensure_ascii=False, default=str).encode("utf-8")
            assert not getattr(part, "description_allow_html", False)


def test_escaped_text_is_whole_and_bounded() -> None:
    assert escape("a <b> & \"c\" 'd'\x00") == "a &lt;b&gt; &amp; &quot;c&quot; &#x27;d&#x27;\ufffd"
    assert len(escape("x" * 10_000)) == 2000


# --- the group explorer ---------------------------------------------------------------------------------------------


def test_the_explorer_opens_the_last_iteration_at_its_widest_group(demo: show.RunRecord, unrendered: None) -> None:
    explorer = show.GroupExplorer(demo)
    last = demo.rollout(demo.rollout_iterations[-1])
    widest = (last.groupby("group_id")["reward"].max() - last.groupby("group_id")["reward"].min()).idxmax()
    assert explorer.iteration.value == demo.rollout_iterations[-1] and explorer.prompt.value == widest
    assert list(explorer.group["reward"]) == sorted(last[last["group_id"] == widest]["reward"], reverse=True)


def test_the_explorer_shows_every_sample_with_its_frame_and_numbers(demo: show.RunRecord, unrendered: None) -> None:
    explorer = show.GroupExplorer(demo, iteration=1)
    page, framed = drawn(explorer), frames(explorer)
    assert shown_images(explorer) - 1 == len(explorer.group) == len(framed)  # and the scale of the tints
    for row, (colour, width, line) in zip(explorer.group.to_dict("records"), framed, strict=True):
        frame = frame_of(row["advantage"])
        assert (colour, width) == (frame["edgecolor"], frame["linewidth"])
        assert (line == "-") == (frame["linestyle"] == "-")
        assert signed(row["advantage"]) in page and f"{row['reward']:.3f}".replace("-", "−") in page
    for text in (page, markup(explorer)):
        assert f"standard deviation {explorer.group['reward'].std():.3f}" in text


def test_the_explorer_draws_each_rewrite_and_has_it_as_text(demo: show.RunRecord, unrendered: None) -> None:
    explorer = show.GroupExplorer(demo, iteration=1)
    page = "".join(drawn(explorer).split())
    for row in explorer.group.to_dict("records"):
        assert "".join("".join(row["tokens"]).split()) in page
        assert escape(row["enhanced_prompt"]) in markup(explorer)
    value = token_values(explorer.group, "change")[0][0]
    assert f"{explorer.group['tokens'][0][0]} ({value:.3f})" in markup(explorer)


def test_a_rewrite_that_is_too_long_is_cut_with_an_ellipsis_and_whole_as_text(
    synthetic_run: Path, unrendered: None
) -> None:
    path = synthetic_run / "rollouts" / "iter_000024.parquet"
    rollout, long = pd.read_parquet(path), [f"word{i} " for i in range(60)]
    rollout["enhanced_prompt"] = "".join(long).strip()
    rollout["tokens"] = [long] * len(rollout)
    for name in ("old", "new", "ref"):
        rollout[f"{name}_logprobs"] = [[-0.1] * 60] * len(rollout)
    rollout.to_parquet(path)
    explorer = show.GroupExplorer(synthetic_run)
    for tint in ("change", None):
        explorer.tint.value = tint
        assert "word59" not in drawn(explorer) and drawn(explorer).count("…") == 4
        assert "word58 word59" in markup(explorer)


def test_every_control_of_the_explorer_changes_the_page(demo: show.RunRecord) -> None:
    explorer = show.GroupExplorer(demo, iteration=1)
    seen = [images_of(explorer)[0]]
    changes = [
        lambda: setattr(explorer.order, "value", "sample"),
        lambda: setattr(explorer.tint, "value", "ratio"),
        lambda: setattr(explorer.tint, "value", "kl"),
        lambda: setattr(explorer.tint, "value", None),
        lambda: setattr(explorer.iteration, "value", 120),
        lambda: setattr(explorer.prompt, "value", (explorer.prompt.value + 1) % 4),
    ]
    for change in changes:
        change()
        seen.append(images_of(explorer)[0])
    assert len(set(seen)) == len(seen)
    assert list(explorer.group["sample"]) == sorted(explorer.group["sample"])


def test_previous_and_next_walk_through_every_group_of_every_iteration(demo: show.RunRecord) -> None:
    explorer = undrawn(show.GroupExplorer)(demo, iteration=1)
    explorer.prompt.value = 0
    buttons = {w.description: w for w in tree(explorer) if isinstance(w, ipywidgets.Button)}
    groups = [(i, g) for i in demo.rollout_iterations for g in sorted(demo.rollout(i)["group_id"].unique())]
    walked = []
    for _ in groups:
        walked.append((explorer.iteration.value, explorer.prompt.value))
        buttons["next ›"].click()
    assert walked == groups and (explorer.iteration.value, explorer.prompt.value) == groups[0]
    buttons["‹ previous"].click()
    assert (explorer.iteration.value, explorer.prompt.value) == groups[-1]


def test_token_values_are_change_ratio_and_kl(demo: show.RunRecord) -> None:
    group = demo.widest_group(20)
    row = group.iloc[0]
    new, old, reference = (np.array(row[f"{name}_logprobs"]) for name in ("new", "old", "ref"))
    assert np.allclose(token_values(group, "change")[0], new - old)
    assert np.allclose(token_values(group, "ratio")[0], np.exp(new - old))
    assert np.allclose(token_values(group, "kl")[0], np.exp(reference - new) - 1 - (reference - new), atol=1e-6)


def test_tints_have_the_sign_of_the_change_and_mark_what_is_clipped(demo: show.RunRecord) -> None:
    group = demo.widest_group(20)
    tokens, full = tinted(group, "ratio", (0.98, 1.02))
    for token in itertools.chain(*tokens):
        assert np.sign(token.tint) == np.sign(np.log(token.value)) and abs(token.tint) <= 1
        assert token.clipped == (not 0.98 <= token.value <= 1.02)
    assert full >= 0.02 and any(token.clipped for token in itertools.chain(*tokens))
    unmoved = group.assign(new_logprobs=group["old_logprobs"])
    assert all(token.tint == 0 for token in itertools.chain(*tinted(unmoved, "change")[0]))


def test_a_run_without_log_probabilities_is_shown_untinted(synthetic_run: Path) -> None:
    path = synthetic_run / "rollouts" / "iter_000024.parquet"
    pd.read_parquet(path).drop(columns=["tokens", "new_logprobs", "ref_logprobs"]).to_parquet(path)
    explorer = show.GroupExplorer(synthetic_run)
    assert [value for _, value in explorer.tint.options] == [None]
    assert "rewrite 0 of" in markup(explorer) and as_shown(explorer).picture
    with pytest.raises(KitError, match="found no ref_logprobs, new_logprobs"):
        show.LossPlayground(synthetic_run)


def test_unscored_samples_and_lost_pictures_are_said(synthetic_run: Path) -> None:
    path = synthetic_run / "rollouts" / "iter_000024.parquet"
    rollout = pd.read_parquet(path)
    rollout.loc[rollout.index[:2], ["reward", "advantage"]] = [float("nan"), 0.0]
    rollout.loc[rollout.index[2], "thumbnail"] = None
    rollout.to_parquet(path)
    explorer = show.GroupExplorer(synthetic_run)
    explorer.prompt.value = 0
    assert drawn(explorer).count("not scored") == 2 and drawn(explorer).count("no picture") == 1
    assert as_shown(explorer).picture


def test_what_a_run_does_not_have_is_one_clear_line(synthetic_run: Path) -> None:
    for widget in (show.GroupExplorer, show.LossPlayground):
        with pytest.raises(KitError, match=r"iteration 7: not kept .*allowed: 1, 24") as caught:
            widget(synthetic_run, iteration=7)
        assert "\n" not in str(caught.value)


def test_a_run_without_rollouts_or_evaluation_says_so(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="found no kept rollout"):
        show.GroupExplorer(tmp_path)
    with pytest.raises(KitError, match="found no evaluation"):
        show.ImageCompare(tmp_path)


# --- the advantage playground ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def playground() -> show.AdvantagePlayground:
    """An advantage playground for tests that set its rewards first."""
    return show.AdvantagePlayground()


@pytest.mark.parametrize("rewards", [*advantage_playground.PRESETS.values(), (0.1, 0.95, 0.3, 0.3, 0.62)])
def test_the_playground_has_the_advantages_of_their_definitions(
    rewards: tuple, playground: show.AdvantagePlayground
) -> None:
    values, second = np.array(rewards), np.array(advantage_playground.SECOND_GROUP)
    centred, other = values - values.mean(), second - second.mean()
    everyone = np.concatenate([values, second])
    expected = {
        "group": centred / (values.std(ddof=1) + 1e-4),
        "batch": centred / (everyone.std(ddof=1) + 1e-4),
        "none": centred,
        "leave_one_out": np.array([r - np.delete(values, i).mean() for i, r in enumerate(values)]),
    }
    playground.rewards = rewards
    found = advantage_playground.advantages_of(playground.rewards)
    for name, advantages in expected.items():
        assert np.allclose(found[name][: len(rewards)], advantages, atol=1e-9), name
    assert np.allclose(found["group"][len(rewards) :], other / (other.std(ddof=1) + 1e-4))


def test_the_playground_computes_with_the_kits_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advantage_playground, "group_advantages", lambda r, g, **_: torch.full_like(r, 0.25))
    assert set(advantage_playground.advantages_of((0.8, 0.2))["group"]) == {0.25}


def test_dragging_a_reward_or_changing_the_size_redraws() -> None:
    playground = show.AdvantagePlayground()
    before = images_of(playground)
    playground.sliders[0].value = 0.1
    after = images_of(playground)
    playground.size.value = 6
    assert len({*before, *after, *images_of(playground)}) == 3
    assert len(playground.rewards) == 6
    assert [slider.layout.display for slider in playground.sliders] == [None] * 6 + ["none"] * 2


def test_two_threads_may_move_the_same_sliders(playground: show.AdvantagePlayground) -> None:
    playground.rewards, failures = advantage_playground.PRESETS["toy group"], []

    def drag(number: int) -> None:
        try:
            for value in np.linspace(0.1, 0.9, 5):
                playground.sliders[number].value = float(value)
        except Exception as error:  # of any kind: it is reported below
            failures.append(error)

    threads = [threading.Thread(target=drag, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and playground.rewards[:2] == [0.9, 0.9]
    alone = show.AdvantagePlayground()
    alone.rewards = playground.rewards
    assert images_of(playground) == images_of(alone)


def test_each_preset_sets_its_rewards_and_draws_once(monkeypatch: pytest.MonkeyPatch) -> None:
    playground = show.AdvantagePlayground()
    draws = []
    monkeypatch.setattr(playground._live, "to_png", lambda dpi: draws.append(dpi) or b"x")
    for button in playground.presets:
        button.click()
        assert playground.rewards == list(advantage_playground.PRESETS[button.description])
    assert len(draws) == len(playground.presets)


def test_the_words_say_what_is_surprising_in_numbers(playground: show.AdvantagePlayground) -> None:
    def reading(rewards: tuple) -> str:
        playground.rewards = rewards
        return playground.reading()[0]

    assert "the gap cancels" in reading((0.51, 0.50)) and "±0.71" in reading((0.51, 0.50))
    assert "may be noise" in reading((0.703, 0.702, 0.701, 0.700)) and "+1.08" in reading((0.703, 0.702, 0.701, 0.700))
    assert "exactly 0" in reading((0.6, 0.6, 0.6))
    assert "noise" not in reading((0.8, 0.6, 0.4, 0.2))


def test_bars_never_leave_their_axes() -> None:
    rng = np.random.default_rng(0)
    for size in range(2, 9):
        for rewards in [rng.integers(0, 2, size).astype(float) for _ in range(10)]:
            for values in advantage_playground.advantages_of(rewards).values():
                assert max(map(abs, values)) < advantage_playground.HIGHEST


# --- the loss playground --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.5])
@pytest.mark.parametrize("delta", [None, 2.0])
def test_the_push_is_ratio_times_advantage_until_the_bound_holds(advantage: float, delta: float | None) -> None:
    ratios = torch.linspace(0.053, 3.01, 61, dtype=torch.float64)  # none of them a bound
    losses, pushes = loss_and_push(ratios, advantage, epsilon=0.2, epsilon_high=0.3, delta=delta)
    upper = 1.3 if advantage > 0 else delta or torch.inf
    held = ratios > upper if advantage > 0 else (ratios < 0.8) | (ratios > upper)
    assert torch.allclose(pushes, torch.where(held, 0.0, ratios * advantage), atol=1e-9)
    free = ~held
    assert torch.allclose(losses[free], -ratios[free] * advantage, atol=1e-9)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_at_ratio_1_every_loss_type_pushes_by_the_advantage(loss_type: str) -> None:
    high = 5.0 if loss_type == "cispo" else 0.2
    _, push = loss_and_push(torch.ones(1, dtype=torch.float64), 0.7, loss_type=loss_type, epsilon_high=high)
    assert float(push) == pytest.approx(0.7, abs=1e-6)


def test_every_control_of_the_curves_redraws_them() -> None:
    playground = show.LossPlayground()
    seen = [images_of(playground)[0]]
    for control, value in (
        (playground.ratio, 1.1),
        (playground.advantage, -1.0),
        (playground.epsilon, 0.4),
        (playground.epsilon_high, 0.6),
        (playground.ratio, 2.4),
        (playground.bounded, True),
        (playground.delta, 2.6),
        (playground.loss_type, "sapo"),
    ):
        control.value = value
        seen.append(images_of(playground)[0])
    assert all(first != second for first, second in itertools.pairwise(seen))


def test_only_the_bounds_that_a_loss_type_has_can_be_moved() -> None:
    playground = show.LossPlayground()
    playground.loss_type.value = "cispo"
    assert playground.epsilon.disabled and not playground.epsilon_high.disabled
    assert playground.epsilon_high.value == 5.0  # it bounds the ratio itself
    playground.loss_type.value = "sapo"
    assert playground.epsilon_high.disabled and playground.bounded.disabled
    playground.loss_type.value = "grpo"
    assert not playground.epsilon.disabled and playground.epsilon_high.value == playground.epsilon.value


def test_the_words_of_the_curves_follow_the_point() -> None:
    playground = show.LossPlayground()
    assert playground.push == 0 and "The bound holds" in markup(playground)
    playground.ratio.value = 1.0
    assert playground.push == pytest.approx(1.0) and "nothing is held back" in markup(playground)
    playground.ratio.value = 1.1
    assert playground.push == pytest.approx(1.1, abs=1e-12) and "nothing is held back" in markup(playground)
    playground.advantage.value = 0.0
    assert "the advantage is 0" in markup(playground)


def settings(**changes: object) -> TrainingSettings:
    """Return training settings with what a step needs."""
    return TrainingSettings.model_construct(**changes)


def test_recorded_settings_give_the_recorded_advantages(demo: show.RunRecord, unrendered: None) -> None:
    recorded = show.LossPlayground(demo).what_if.recorded
    assert recorded.beta == 0.04
    for iteration in demo.rollout_iterations:
        rollout = demo.rollout(iteration)
        assert np.allclose(recompute(rollout, recorded).advantages, rollout["advantage"], atol=1e-4)


def test_pushes_are_advantage_times_weight_times_tokens(demo: show.RunRecord) -> None:
    rollout = demo.rollout(20)
    lengths = rollout["completion_ids"].map(len).to_numpy()
    count, longest = len(rollout), 40
    rewards, groups = torch.tensor(rollout["reward"].to_numpy()), torch.tensor(rollout["group_id"].to_numpy())
    for loss_type, weights in {
        "grpo": 1 / (count * lengths),
        "dr_grpo": np.full(count, 1 / (count * longest)),
        "dapo": np.full(count, 1 / lengths.sum()),
    }.items():
        for scale in ("group", "none"):
            found = recompute(rollout, settings(loss_type=loss_type, scale_rewards=scale), longest)
            advantages = group_advantages(rewards, groups, scale_rewards=scale).numpy()
            assert np.allclose(found.weights, weights, rtol=1e-5)
            assert np.allclose(found.pushes, advantages * weights * lengths, rtol=1e-5, atol=1e-9)
            assert np.abs(found.shares).sum() == pytest.approx(1.0)


def test_after_the_step_a_narrow_clip_holds_tokens_back(demo: show.RunRecord) -> None:
    rollout = demo.rollout(20)
    wide, narrow = (recompute(rollout, settings(epsilon=e), after=True).total for e in (0.9, 0.001))
    assert narrow < 0.9 * wide
    assert recompute(rollout, settings(epsilon=0.001)).total == pytest.approx(
        recompute(rollout, settings(epsilon=0.9)).total
    )


def test_unscored_rows_take_no_part(demo: show.RunRecord) -> None:
    rollout = demo.rollout(20)
    unscored = rollout.assign(reward=rollout["reward"].where(rollout.index != 3))
    found = recompute(unscored, settings())
    assert found.pushes[3] == found.weights[3] == 0
    rest = recompute(rollout.drop(index=3), settings())
    assert np.allclose(np.delete(found.pushes, 3), rest.pushes)


def test_dr_grpo_with_this_step_is_compared_with_what_was_done(demo: show.RunRecord) -> None:
    what_if = show.LossPlayground(demo, iteration=120).what_if
    presets = {button.description: button for button in what_if.presets}
    presets["as recorded"].click()
    assert what_if.settings == what_if.recorded and "that the step was made with" in markup(what_if)
    before = images_of(what_if)
    presets["Dr. GRPO"].click()
    assert (what_if.settings.loss_type, what_if.settings.scale_rewards) == ("dr_grpo", "none")
    recorded, other = what_if.pushes
    assert images_of(what_if) != before
    assert f"{other.total / recorded.total:.2f} times the recorded one" in markup(what_if)
    choices = [what_if.choices[name] for name in ("loss_type", "scale_rewards", "baseline")]
    others = [control for control in what_if.choices.values() if control not in choices]  # may change no picture
    for some in (*([choice] for choice in choices), others, [what_if.moment], [what_if.iteration]):
        seen = images_of(what_if)
        with what_if.drawn_once():
            for control in some:
                control.value = next(v for v in reversed(options(control)) if v != control.value)
        assert images_of(what_if) != seen or some is others


def options(control: ipywidgets.Widget) -> list:
    """Return the values that a chooser offers."""
    return [option[1] if isinstance(option, tuple) else option for option in control.options]


# --- live training --------------------------------------------------------------------------------------------------


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the live view."""
    clock = Clock()
    monkeypatch.setattr(live_training, "time", clock)
    return clock


def log(run: Path, iteration: int) -> dict:
    """Add an iteration to a run as training does, and return its metrics."""
    metrics = {"iteration": iteration, "reward": 0.5 + iteration / 100, "kl": 0.1, "step_time": 1.5}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics) + "\n")
    return metrics


def empty_run(run: Path, iterations: int) -> Path:
    """Make a run that has only begun."""
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"training_settings": {"num_iterations": iterations}}))
    return run


def test_every_iteration_moves_the_line_but_not_the_curves(tmp_path: Path, clock: Clock) -> None:
    run = empty_run(tmp_path / "run", 100)
    watch = show.LiveTraining(run)
    curves = []
    for iteration in range(1, 9):
        clock.now += 0.5
        watch.update(log(run, iteration))
        assert f"iteration {iteration} of 100" in markup(watch)
        curves.append(images_of(watch)[0])
    assert len(set(curves)) == 3  # no line yet, one from the second iteration, and again two seconds later


def test_a_slow_picture_is_drawn_less_often(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    run = empty_run(tmp_path / "run", 1000)
    watch = show.LiveTraining(run)
    drawn = []

    def slow() -> object:
        clock.now += 1.0
        drawn.append(clock.now)
        return show.image_grid(pictures(1))

    monkeypatch.setattr(watch, "_draw_curves", slow)
    for iteration in range(1, 101):
        clock.now += 1.0
        watch.update(log(run, iteration))
    assert 4 <= len(drawn) <= 8  # the first two, and then a twentieth of some hundred seconds


def test_the_last_iteration_is_always_drawn(tmp_path: Path, clock: Clock) -> None:
    run = empty_run(tmp_path / "run", 4)
    watch = show.LiveTraining(run)
    for iteration in (1, 2):
        watch.update(log(run, iteration))
    before = images_of(watch)
    watch.update(log(run, 3))
    assert images_of(watch) == before
    watch.update(log(run, 4))
    assert images_of(watch) != before and "iteration 4 of 4" in watch.reading()[0]


def test_an_interrupt_in_the_middle_of_a_picture_leaves_a_view_that_goes_on(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = empty_run(tmp_path / "run", 10)
    watch = show.LiveTraining(run)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    clock.now = 10.0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(live_training, "training_curves", interrupted)
        for iteration in (1, 2):
            watch.update(log(run, iteration))
    before = images_of(watch)
    watch.update(log(run, 3))
    assert images_of(watch) != before and "iteration 3 of 10" in markup(watch)


def test_a_run_that_does_not_exist_yet_is_waited_for_and_not_made(tmp_path: Path) -> None:
    watch = show.LiveTraining(tmp_path / "later")
    assert not (tmp_path / "later").exists()
    assert "no iteration yet" in markup(watch) and "no iteration" in watch.reading()[0]
    assert as_shown(watch).picture


def test_the_newest_kept_group_is_shown(synthetic_run: Path, unrendered: None) -> None:
    watch = show.LiveTraining(synthetic_run)
    group, page = show.read_run(synthetic_run).widest_group(24), drawn(watch)
    assert plain_text(group["user_prompt"].iloc[0]) in markup(watch) and "iteration 24" in markup(watch)
    assert plain_text(group["user_prompt"].iloc[0]) in page and shown_images(watch) == len(group)
    assert [signed(advantage) in page for advantage in group["advantage"]] == [True] * len(group)


@pytest.mark.slow
def test_it_watches_a_real_training_that_stops_and_goes_on(kit: Experiment, tmp_path: Path) -> None:
    kit = fresh(kit, prompts_per_iteration=1, group_size=2, save_every=1)
    watch = show.LiveTraining(tmp_path / "run")

    def stop_at_2(metrics: dict) -> None:
        watch.update(metrics)
        if metrics["iteration"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(kit, tmp_path / "run", progress=False, on_iteration=stop_at_2)
    assert "iteration 2 of 4" in markup(watch)
    train(kit, tmp_path / "run", progress=False, on_iteration=watch.update)
    assert "iteration 4 of 4" in markup(watch) and "iteration 4, the group whose rewards differ most" in drawn(watch)


# --- the episode explorer -------------------------------------------------------------------------------------------


def marked(tokens: list[Token]) -> list[str]:
    """Return the words that are marked as changed."""
    return [token.text.strip() for token in tokens if token.tint]


@pytest.mark.parametrize(
    ("before", "after", "gone", "new"),
    [
        ("a red circle, sharp", "a blue circle, sharp", ["red"], ["blue"]),
        ("a red circle", "keep it", ["a", "red", "circle"], ["keep", "it"]),
        ("a red circle", "a red circle", [], []),
        ("a red ball", "a red, red ball", [], ["red,"]),
        ("", "two rings", [], ["two", "rings"]),
    ],
)
def test_words_that_differ_are_marked(before: str, after: str, gone: list[str], new: list[str]) -> None:
    found = changed_words(before, after)
    assert "".join(token.text for token in found[0]) == before and "".join(token.text for token in found[1]) == after
    assert (marked(found[0]), marked(found[1])) == (gone, new)


def test_it_opens_at_the_episodes_that_were_given_most_and_least(synthetic_run: Path, unrendered: None) -> None:
    explorer = show.EpisodeExplorer(with_turns(synthetic_run))
    for place, _ in enumerate(explorer.prompt.options):
        explorer.prompt.value = place
        last = explorer.rows.query("group_id == @place * 2 + 1")["reward"].tolist()
        assert last[explorer.left.value] == max(last) and last[explorer.right.value] == min(last)


@pytest.mark.parametrize("turns", [2, 3])
def test_each_turn_of_an_episode_has_its_picture_frame_and_numbers(
    synthetic_run: Path, turns: int, unrendered: None
) -> None:
    explorer = show.EpisodeExplorer(with_turns(synthetic_run, turns))
    explorer.prompt.value, explorer.left.value, explorer.right.value = 1, 2, 0
    page, words, framed = drawn(explorer), markup(explorer), frames(explorer)
    assert shown_images(explorer) == len(framed) == 2 * turns and PROMPTS[1][0] in page
    shown = [(number, *pair) for number in (2, 0) for pair in enumerate(explorer.episode(number))]
    for (number, turn, one), (colour, width, _) in zip(shown, framed, strict=True):
        assert one["group_id"] == turns + turn and one["sample"] == number
        assert (colour, width) == (frame_of(one["advantage"])["edgecolor"], frame_of(one["advantage"])["linewidth"])
        assert f"{number + 1}, turn {turn + 1}: {signed(one['advantage'])}" in page
        assert f"given {one['reward']:.3f}" in page and escape(one["enhanced_prompt"]) in words


@pytest.mark.parametrize("branches", [False, True])
def test_an_episode_of_a_rollout_is_what_its_rows_answer(kit: Experiment, branches: bool, unrendered: None) -> None:
    with kit.generator.steps(1):
        rollout = collect_rollout(
            kit.policy, kit.generator, kit.rewards, kit.train_prompts[:2], 4, turns=2, branches=branches
        )
    explorer = show.EpisodeExplorer(rollout)
    for prompt, number in itertools.product(range(2), range(4)):
        explorer.prompt.value = prompt
        row, (first, second) = prompt * 8 + 4 + number, explorer.episode(number)
        (before,) = rollout.contexts[rollout.context_ids[row]].turns
        assert (first["enhanced_prompt"], second["enhanced_prompt"]) == (before.rewrite, rollout.enhanced_prompts[row])
        assert second["image"] is rollout.images[row][0] and first["image"] is before.image
    given = explorer.rows["advantage"].to_numpy()
    assert np.allclose(given, group_advantages(rollout.rewards.float(), rollout.group_ids), atol=1e-6)


def test_one_turn_is_no_episode(synthetic_run: Path) -> None:
    with pytest.raises(KitError, match="found a rollout of 1 turn, allowed: 2 or more"):
        show.EpisodeExplorer(synthetic_run)


def test_episodes_of_hostile_texts_are_shown_as_text(synthetic_run: Path, hostile: Path, unrendered: None) -> None:
    run = with_turns(synthetic_run)
    path = run / "rollouts" / "iter_000024.parquet"
    rollout, texts = pd.read_parquet(path), pd.read_parquet(hostile / "rollouts" / "iter_000004.parquet")["user_prompt"]
    for start in range(0, 200, len(rollout)):
        some = texts.iloc[start : start + len(rollout)].tolist()
        rollout["enhanced_prompt"] = (some * len(rollout))[: len(rollout)]
        rollout.assign(user_prompt=rollout["enhanced_prompt"]).to_parquet(path)
        explorer = show.EpisodeExplorer(run)
        assert_inert(markup(explorer), [one["enhanced_prompt"] for one in explorer.episode(explorer.left.value)])


# --- image compare --------------------------------------------------------------------------------------------------


def test_image_compare_shows_every_variant_at_every_seed_that_has_pictures(
    synthetic_run: Path, unrendered: None
) -> None:
    compare = show.ImageCompare(synthetic_run)
    compare.prompt.value = 2
    page, words = drawn(compare), markup(compare)
    assert shown_images(compare) == 4 * 2
    rows = show.read_run(synthetic_run).evaluation.query("prompt_id == 2")
    for row in rows.to_dict("records"):
        assert f"reward {row['reward']:.3f}" in page and escape(row["text"]) in words
    for text in (page, words):
        places = [text.index(name) for name in ("raw prompt", "initial policy", "trained policy", "oracle rewrite")]
        assert places == sorted(places)


def test_image_compare_walks_through_the_prompts(synthetic_run: Path, unrendered: None) -> None:
    compare = show.ImageCompare(synthetic_run)
    buttons = {w.description: w for w in tree(compare) if isinstance(w, ipywidgets.Button)}
    buttons["‹ previous"].click()
    assert compare.prompt.value == 5
    buttons["next ›"].click()
    assert compare.prompt.value == 0 and "crimson ball" in markup(compare)


def test_image_compare_takes_what_evaluate_returned(synthetic_run: Path) -> None:
    record = show.read_run(synthetic_run)

    class Result:
        rows, images = record.evaluation, dict(record.evaluation_images())

    compared = show.ImageCompare(Result()), show.ImageCompare(synthetic_run)
    assert markup(compared[0]) == markup(compared[1]) and images_of(compared[0]) == images_of(compared[1])


def test_seeds_without_pictures_are_left_out_but_counted(demo: show.RunRecord, unrendered: None) -> None:
    compare = show.ImageCompare(demo)
    assert compare.seeds == [0] and "no picture" not in drawn(compare)
    mean = compare.rows.query("variant == 'trained'")["reward"].mean()
    assert f"mean {mean:.3f}" in drawn(compare) and "of 4 seeds" in drawn(compare)
    assert f"trained policy {mean:.3f}" in markup(compare) and "of 4 seeds" in markup(compare)


def test_a_comparison_without_an_oracle_keeps_its_columns(synthetic_run: Path, unrendered: None) -> None:
    record = show.read_run(synthetic_run)

    class Result:
        rows, images = record.evaluation.query("variant != 'oracle'"), record.evaluation_images()

    compare = show.ImageCompare(Result())
    titles = [text for text in compare.figures()[0].findobj(Text) if text.get_text() == "trained policy"]
    assert len(titles) == 2 and len({text.get_position()[0] for text in titles}) == 1


# --- be the reward --------------------------------------------------------------------------------------------------


def test_the_order_of_the_clicks_is_the_reward(unrendered: None) -> None:
    reward = show.BeTheReward(pictures(5), list("abcde"), "a prompt")
    for number in (3, 0, 4, 1, 2):
        reward.buttons[number].click()
    assert reward.rewards == [0.75, 0.25, 0.0, 1.0, 0.5]
    assert [button.description for button in reward.buttons] == ["2", "4", "5 (worst)", "1 (best)", "3"]
    assert "1.00" in markup(reward)
    assert "1 (best)" in drawn(reward) and "5 (worst)" in drawn(reward) and "image 1" not in drawn(reward)


def test_clicks_draw_no_picture_so_that_quick_ones_keep_their_order() -> None:
    reward = show.BeTheReward(pictures(5), list("abcde"), "a prompt")
    before = images_of(reward)
    reward.figures = lambda: pytest.fail("a click draws")
    for button in reward.buttons:
        button.click()
    assert images_of(reward) == before and reward.order == [0, 1, 2, 3, 4]


def test_a_second_click_takes_an_image_out_and_reset_all(unrendered: None) -> None:
    reward = show.BeTheReward(pictures(3), list("abc"), "a prompt")
    for number in (2, 1, 2):
        reward.buttons[number].click()
    assert reward.order == [1] and reward.buttons[2].description == "choose"
    reward.reset_button.click()
    assert reward.order == [] and {button.description for button in reward.buttons} == {"choose"}


def test_before_all_are_ranked_there_is_no_reward_unless_a_default_is_given(unrendered: None) -> None:
    reward = show.BeTheReward(pictures(3), list("abc"), "a prompt")
    reward.buttons[0].click()
    with pytest.raises(KitError, match="found 1 of 3 images ranked") as caught:
        _ = reward.rewards
    assert "\n" not in str(caught.value)
    headless = show.BeTheReward(pictures(3), list("abc"), "a prompt", default=[0.1, 0.9, 0.5])
    assert headless.rewards == [0.1, 0.9, 0.5] and "default rewards count" in markup(headless)
    for number in (1, 0, 2):
        headless.buttons[number].click()
    assert headless.rewards == [0.5, 1.0, 0.0]


@pytest.mark.parametrize(
    ("images", "texts", "default", "message"),
    [
        (1, 1, None, "found 1 images and 1 texts"),
        (3, 2, None, "found 3 images and 2 texts"),
        (3, 3, [0.1], "found 1 rewards, .*allowed: 3"),
        (2, 2, [0.1, float("nan")], "1 of them finite, allowed: 2 finite ones"),
    ],
)
def test_what_is_no_group_cannot_be_ranked(images: int, texts: int, default: list | None, message: str) -> None:
    with pytest.raises(KitError, match=message):
        show.BeTheReward(pictures(images), ["t"] * texts, "p", default)


def test_its_picture_shows_the_ranking_and_stands_a_missing_image() -> None:
    reward = show.BeTheReward([*pictures(3), None], list("abcd"), "a prompt")
    unranked = as_shown(reward).picture
    assert drawn(reward).count("no picture") == 1 and "image 4" in drawn(reward)
    for number in range(4):
        reward.buttons[number].click()
    assert as_shown(reward).picture != unranked
