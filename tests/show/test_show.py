"""What a person looks at: records, figures that stand hostile text, a page that runs nothing and fetches nothing."""

from __future__ import annotations

import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support.synthetic_run import write_synthetic_run

from grpo_kit.config import KitError
from grpo_kit.show import (
    category_plot,
    comparison_plot,
    comparison_table,
    gallery_figure,
    group_figure,
    image_grid,
    learning_figure,
    loop_figure,
    read_run,
    representative_cases,
    training_curves,
    worst_cases,
    write_report,
)
from grpo_kit.show.loop import STAGES, TOY_REWARDS, toy_advantages
from grpo_kit.show.pages import clean_html
from grpo_kit.show.style import Drawing, plain_text
from grpo_kit.show.summary import headline, paragraph

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><a xlink:href='javascript:alert(1)'>x</a></svg>",
    "</style><iframe src=javascript:alert(1)>",
    "\" onmouseover=alert(1) x='",
    "{{ 7 * 7 }} {% include 'x' %}",
    "$\\frac{$ $x_{y$",
    "\x00\x1b[31mred\x07",
    "\ud800 lone surrogate",
    "مرحبا 😀 日本語 " + "x" * 500,
    "",
]


class Active(HTMLParser):
    """Collect what a page could run or fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note scripts, handlers, foreign content and addresses that would be fetched."""
        if tag in {"script", "iframe", "object", "embed", "svg", "link", "base", "form", "video", "audio", "math"}:
            self.found.append(tag)
        for name, value in attrs:
            value = (value or "").strip().lower()
            fetched = name in {"src", "srcset", "data", "poster", "action", "xlink:href"} and not value.startswith(
                "data:image/"
            )
            if name.startswith("on") or fetched or value.startswith(("javascript:", "vbscript:", "data:text")):
                self.found.append(f"{tag} {name}={value[:40]}")


def active_nodes(page: str) -> list[str]:
    """Return everything in a page that could run or be fetched."""
    parser = Active()
    parser.feed(page)
    return parser.found


def pixels(figure: Drawing) -> np.ndarray:
    """Return the figure as an array, to see that something was drawn."""
    with Image.open(io.BytesIO(figure.to_png(dpi=50))) as image:
        return np.asarray(image.convert("L"))


def hostile_run(run: Path) -> Path:
    """Write a run whose prompts, categories and rewrites are hostile."""
    return write_synthetic_run(
        run, iterations=4, prompts=[(text, f"c{i} {text[:30]}", "easy") for i, text in enumerate(HOSTILE[:8])]
    )


# --- reading a run back ---------------------------------------------------------------------------------------------


def test_a_record_holds_what_the_run_wrote(synthetic_run: Path) -> None:
    record = read_run(synthetic_run)
    assert record.iterations == len(record.metrics) == 24
    assert [v["iteration"] for v in record.validations] == [0, 8, 16, 24]
    assert record.rollout_iterations == [1, 24]
    assert len(record.rollout(24)) == 12
    assert len(record.evaluation_images()) == len(record.evaluation) == 6 * 4 * 2
    assert record.evaluation_images()[(0, "raw", 0)].size == (48, 48)


def test_an_empty_run_reads_as_empty_and_has_a_page(tmp_path: Path) -> None:
    record = read_run(tmp_path)
    assert record.iterations == 0 and record.evaluation.empty and not record.results
    assert "not been evaluated" in write_report(tmp_path).read_text()


def test_no_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="not found") as caught:
        read_run(tmp_path / "absent")
    assert "\n" not in str(caught.value)


def test_a_line_still_being_written_is_left_out_and_a_damaged_one_named(synthetic_run: Path) -> None:
    metrics = synthetic_run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"iteration": 25, "rew')
    assert read_run(synthetic_run).iterations == 24
    metrics.write_text('{"iteration": 1}\nbroken\n{"iteration": 2}\n')
    with pytest.raises(KitError, match=r"metrics\.jsonl:2: not JSON"):
        read_run(synthetic_run)


def test_an_iteration_repeated_after_a_resume_counts_once(synthetic_run: Path) -> None:
    metrics = synthetic_run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + json.dumps({"iteration": 24, "reward": 9.0}) + "\n")
    record = read_run(synthetic_run)
    assert len(record.metrics) == 24 and record.metrics["reward"].iloc[-1] == 9.0


def test_a_damaged_table_is_named(synthetic_run: Path) -> None:
    (synthetic_run / "evaluation" / "rows.parquet").write_bytes(b"not a table")
    with pytest.raises(KitError, match=r"rows\.parquet"):
        _ = read_run(synthetic_run).evaluation


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "thumbnails/../../x.jpg"])
def test_a_thumbnail_cannot_lead_out_of_the_run(synthetic_run: Path, name: str) -> None:
    with pytest.raises(KitError, match="leads out of the run"):
        read_run(synthetic_run).file(name)


def test_a_rollout_that_was_not_kept_says_which_were(synthetic_run: Path) -> None:
    with pytest.raises(KitError, match="allowed: 1, 24"):
        read_run(synthetic_run).rollout(7)


# --- what the numbers say -------------------------------------------------------------------------------------------


def results_with(reward: tuple[float, float], gold: tuple[float, float]) -> dict:
    """Return results in which trained − raw has these intervals."""
    interval = {m: {"mean": sum(v) / 2, "low": v[0], "high": v[1]} for m, v in {"reward": reward, "gold": gold}.items()}
    return {"differences": {"trained-raw": interval}}


@pytest.mark.parametrize(
    ("reward", "gold", "words"),
    [
        ((0.1, 0.2), (0.1, 0.2), "drawn better"),
        ((0.1, 0.2), (-0.1, 0.2), "no clear change"),
        ((0.1, 0.2), (-0.3, -0.1), "gaming"),
        ((-0.1, 0.2), (0.1, 0.2), "No clear difference"),
        ((-0.3, -0.1), (0.1, 0.2), "worse"),
    ],
)
def test_the_headline_claims_no_more_than_the_intervals(reward: tuple, gold: tuple, words: str) -> None:
    assert words in headline(results_with(reward, gold))


def test_what_got_worse_stands_in_the_headline() -> None:
    results = results_with((0.1, 0.2), (0.1, 0.2))
    change = results["differences"]["trained-raw"]
    change["grammatical"] = {"mean": -0.01, "low": -0.03, "high": 0.01}  # could be chance
    assert "worse" not in headline(results)
    change["keeps_objects"] = {"mean": -0.047, "low": -0.085, "high": -0.016}
    assert headline(results).endswith(" What got worse: keeps the objects −4.7 [−8.5, −1.6] points.")


def test_the_paragraph_gives_the_computed_figures(synthetic_run: Path) -> None:
    record = read_run(synthetic_run)
    means = record.evaluation.groupby("variant")[["reward", "gold"]].mean()
    text = paragraph(record)
    assert f"from {means.loc['raw', 'reward']:.3f} to {means.loc['trained', 'reward']:.3f}" in text
    assert f"from {100 * means.loc['raw', 'gold']:.1f} % to {100 * means.loc['trained', 'gold']:.1f} %" in text
    assert "24 iterations of 3 prompts × 4 rewrites" in text


def test_the_table_holds_every_variant_difference_and_share(synthetic_run: Path) -> None:
    table = comparison_table(read_run(synthetic_run).results)
    for label in ("raw prompt", "initial policy", "trained policy", "oracle rewrite", "trained − raw", "way from raw"):
        assert label in table
    assert "keeps the objects" in table and max(map(len, table.splitlines())) <= 80
    assert comparison_table({}) == "not evaluated yet"


def test_cases_are_chosen_over_categories_and_not_by_score(synthetic_run: Path) -> None:
    rows = read_run(synthetic_run).evaluation
    more = pd.concat([rows, rows.assign(prompt_id=rows["prompt_id"] + 6)])
    shuffled = more.assign(reward=np.random.default_rng(1).normal(size=len(more)))
    assert representative_cases(more, 8) == representative_cases(shuffled, 8)
    assert [case[0] for case in representative_cases(more, 6)] == [0, 1, 2, 3, 4, 5]


def test_the_worst_cases_are_losses_worst_first(synthetic_run: Path) -> None:
    rows = read_run(synthetic_run).evaluation
    rows.loc[(rows["prompt_id"] == 4) & (rows["variant"] == "trained") & (rows["seed"] == 1), "gold"] = 0.0
    rows.loc[(rows["prompt_id"] == 2) & (rows["variant"] == "trained") & (rows["seed"] == 0), "gold"] = 0.3
    assert worst_cases(rows, 5) == [(4, 1), (2, 0)]


# --- figures --------------------------------------------------------------------------------------------------------


def test_every_figure_draws_from_a_run(synthetic_run: Path) -> None:
    record = read_run(synthetic_run)
    figures = [
        training_curves(record.metrics, record.validations),
        comparison_plot(record.results),
        category_plot(record.results),
        gallery_figure(record.evaluation, record.evaluation_images(), [(0, 0), (3, 1)]),
    ]
    assert all(pixels(figure).std() > 5 for figure in figures)


def test_figures_of_an_empty_run_say_what_is_missing(tmp_path: Path) -> None:
    record = read_run(tmp_path)
    for draw in (lambda: training_curves(record.metrics), lambda: comparison_plot({}), lambda: category_plot({})):
        with pytest.raises(KitError, match="found no"):
            draw()


@pytest.mark.parametrize("text", HOSTILE)
def test_figures_stand_hostile_text(text: str) -> None:
    picture = Image.new("RGB", (16, 16), "red")
    group_figure([picture] * 2, [text, text], [0.1, float("nan")], [0.7, 0.0], text).to_png(50)
    image_grid([picture], [text]).to_svg()


def test_user_text_is_never_read_as_mathematics() -> None:
    figure = image_grid([Image.new("RGB", (8, 8))], ["$x^2$"])
    assert not figure.axes[0].xaxis.label.get_parse_math()
    assert figure.axes[0].get_xlabel() == "$x^2$"


def test_a_group_is_shown_best_first_and_framed_by_its_advantage() -> None:
    picture = Image.new("RGB", (8, 8))
    figure = group_figure([picture] * 3, ["low", "high", "mid"], [0.1, 0.9, 0.5], [-1.0, 1.0, 0.0], "p")
    assert [axes.get_xlabel() for axes in figure.axes[:3]] == ["high", "mid", "low"]
    widths = [axes.spines["left"].get_linewidth() for axes in figure.axes[:3]]
    assert widths[0] == widths[2] > widths[1]
    assert len({axes.spines["left"].get_edgecolor() for axes in figure.axes[:3]}) == 3


def test_a_step_is_drawn_with_better_and_worse_samples_apart() -> None:
    figure = learning_figure([1.0, -1.0, 0.5, 0.0], [0.2, -0.3, 0.1, 0.0])
    better, worse = figure.axes[0].lines[2:]
    assert list(better.get_xdata()) == [1.0, 0.5] and list(worse.get_ydata()) == [-0.3, 0.0]
    assert better.get_marker() != worse.get_marker()


def test_a_sample_without_a_picture_is_shown_as_such() -> None:
    figure = group_figure([None, Image.new("RGB", (8, 8))], ["a", "b"], [float("nan"), 0.5], [0.0, 0.0], "p")
    assert [text.get_text() for text in figure.axes[1].texts] == ["no picture"]


def test_grid_refuses_captions_that_do_not_match() -> None:
    with pytest.raises(KitError, match="found 2 images and 1 captions"):
        image_grid([Image.new("RGB", (8, 8))] * 2, ["one"])


def test_a_figure_shows_itself_and_leaves_pyplot_alone() -> None:
    from matplotlib import pyplot, rcParams

    before = dict(rcParams)
    figure = loop_figure()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert not pyplot.get_fignums() and dict(rcParams) == before
    assert figure.to_svg() == loop_figure().to_svg()


def test_plain_text_is_printable_and_bounded() -> None:
    assert plain_text("a\x00b\ud800c\nd") == "a\ufffdb\ufffdc d"
    assert len(plain_text("x" * 10_000, 50)) == 50


# --- the loop -------------------------------------------------------------------------------------------------------


def test_the_loop_lights_each_stage_by_its_number() -> None:
    pictures = [pixels(loop_figure(stage)) for stage in ((), *range(1, len(STAGES) + 1), [1, 2])]
    assert all((pictures[i] != pictures[j]).any() for i in range(8) for j in range(i))


@pytest.mark.parametrize("stage", [0, 7, "rewards", -1])
def test_an_unknown_stage_is_refused(stage: object) -> None:
    with pytest.raises(KitError, match="allowed: 1 to 6"):
        loop_figure(stage)


def test_the_toy_advantages_are_those_of_the_kit() -> None:
    import torch

    from grpo_kit.grpo import group_advantages

    rewards = torch.tensor(TOY_REWARDS, dtype=torch.float64)
    expected = group_advantages(rewards, torch.zeros(4, dtype=torch.int64))
    assert np.allclose(toy_advantages(), expected.numpy(), atol=1e-6)


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(synthetic_run_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run, which may be written again."""
    return write_report(Path(shutil.copytree(synthetic_run_template, tmp_path_factory.mktemp("written") / "run")))


def test_the_page_is_self_contained_and_runs_nothing(written: Path) -> None:
    page = written.read_text()
    assert active_nodes(page) == []
    assert "http://" not in page and "https://" not in page
    assert page.count("data:image/jpeg") >= 6 * 4 and page.count("data:image/svg+xml") == 4
    for heading in ("Did it work?", "How it learned", "Before and after", "By category", "Where the minutes went"):
        assert heading in page


def test_hostile_prompts_stay_text(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "run")
    page = write_report(run).read_text(errors="strict")
    assert active_nodes(page) == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "{{ 7 * 7 }}" in page


def test_the_page_survives_what_a_run_has_not_written_yet(synthetic_run: Path) -> None:
    (synthetic_run / "final_results.json").unlink()
    (synthetic_run / "evaluation" / "rows.parquet").unlink()
    page = write_report(synthetic_run).read_text()
    assert "not been evaluated" in page and "How it learned" in page and "Did it work?" not in page


def test_a_missing_picture_is_said_and_not_invented(synthetic_run: Path) -> None:
    for picture in (synthetic_run / "thumbnails").glob("eval_0_raw_*.jpg"):
        picture.unlink()
    assert "no picture kept" in write_report(synthetic_run).read_text()


def executed_notebook(folder: Path, name: str = "00_start_here") -> Path:
    """Write a notebook as papermill leaves it, with outputs that try to run something."""
    outputs = [
        nbformat.v4.new_output("stream", text="a line\n\rbar 1%"),
        nbformat.v4.new_output("stream", text="\rbar 50%"),
        nbformat.v4.new_output("stream", text="\rbar 100%\n"),
        nbformat.v4.new_output(
            "display_data",
            data={
                "text/html": "<table><tr><td onclick='alert(1)'>cell</td></tr></table>" + "".join(HOSTILE[:4]),
                "application/javascript": "alert(2)",
                "image/svg+xml": "<svg onload='alert(3)'/>",
            },
        ),
    ]
    source = "# A title\n\nSee [the next](07_train.ipynb). <script>alert(4)</script> ![far](https://example.com/a.png)"
    cells = [nbformat.v4.new_markdown_cell(source), nbformat.v4.new_code_cell("1 + 1", outputs=outputs)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.papermill = {"duration": 90.0}
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def test_notebooks_become_safe_pages_with_their_minutes(synthetic_run: Path) -> None:
    path = executed_notebook(synthetic_run / "notebooks")
    index = write_report(synthetic_run).read_text()
    page = path.with_suffix(".html").read_text()
    assert active_nodes(page) == [] and "example.com" not in page
    assert 'href="07_train.html"' in page and "cell</td>" in page and "A title</h1>" in page
    assert "bar 100%" in page and "bar 50%" not in page and "a line" in page
    assert 'href="notebooks/00_start_here.html"' in index and "1.5 min" in index


def test_a_failed_notebook_is_named_with_its_error(synthetic_run: Path) -> None:
    path = executed_notebook(synthetic_run / "notebooks")
    notebook = nbformat.read(path, as_version=4)
    error = nbformat.v4.new_output("error", ename="KitError", evalue="group_size: <b>1</b>", traceback=["boom"])
    notebook.cells[1].outputs.append(error)
    nbformat.write(notebook, path)
    index = write_report(synthetic_run).read_text()
    assert "stopped: KitError: group_size: &lt;b&gt;1&lt;/b&gt;" in index
    assert "Stopped with KitError" in path.with_suffix(".html").read_text()


@pytest.mark.parametrize(
    "payload", [*HOSTILE[:6], "<scr<script></script>ipt>alert(1)</script>", "<a href='java\tscript:x'>y</a>"]
)
def test_cleaned_html_runs_nothing(payload: str) -> None:
    assert active_nodes(clean_html(f"<p>before {payload} after</p>")) == []


def test_writing_the_page_twice_gives_the_same_bytes(written: Path) -> None:
    first = written.read_bytes()
    assert write_report(written.parent).read_bytes() == first
