"""The lessons' figures draw the numbers they are given, in their order, readable without colour, whatever the text."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from PIL import Image
from test_show import HOSTILE

from grpo_kit import show
from grpo_kit.config import KitError
from grpo_kit.show.style import Drawing

PICTURES = pd.DataFrame(
    {
        "user_prompt": ["high"] * 3 + ["low"] * 3 + ["middle"] * 3,
        "reward": [0.7, 0.8, 0.9, 0.0, 0.1, 0.2, 0.4, 0.5, 0.6],
    }
)


def interval(mean: float, half: float = 0.1) -> dict[str, float]:
    """Return an interval as a file of results holds it."""
    return {"mean": mean, "low": mean - half, "high": mean + half}


def marks(figure: Drawing, marker: str, panel: int = 0) -> list[Line2D]:
    """Return the lines of a panel that have this marker."""
    return [line for line in figure.axes[panel].lines if line.get_marker() == marker]


def texts(figure: Drawing) -> list[str]:
    """Return what is written in the first panel."""
    return [text.get_text() for text in figure.axes[0].texts]


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_prompts_stand_in_the_order_of_their_means_with_a_dot_a_picture() -> None:
    axes = show.seed_figure(PICTURES).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["high", "middle", "low"]
    assert axes.yaxis_inverted()  # the first row stands on top
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [sorted(line.get_xdata()) for line in dots] == [[0.7, 0.8, 0.9], [0.4, 0.5, 0.6], [0.0, 0.1, 0.2]]
    bars = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|"]
    assert bars == pytest.approx([0.8, 0.5, 0.1])


def test_two_prompts_of_the_same_words_have_a_row_each() -> None:
    numbered = PICTURES.assign(prompt_id=pd.factorize(PICTURES["user_prompt"])[0], user_prompt="the same")
    figure = show.seed_figure(numbered)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["the same"] * 3
    assert len(marks(figure, "|")) == 3


def test_a_picture_without_a_score_is_left_out_of_its_row() -> None:
    holed = PICTURES.assign(reward=PICTURES["reward"].where(PICTURES["reward"] != 0.2))
    bars = marks(show.seed_figure(holed), "|")
    assert bars[-1].get_xdata()[0] == pytest.approx(0.05)


@pytest.mark.parametrize("table", [PICTURES.rename(columns={"reward": "gold"}), PICTURES.assign(reward=np.nan)])
def test_a_table_without_values_is_refused(table: pd.DataFrame) -> None:
    with pytest.raises(KitError, match="seed_figure: found no values in reward"):
        show.seed_figure(table)


# --- intervals ------------------------------------------------------------------------------------------------------


def test_each_interval_reaches_from_low_to_high_with_its_mean_marked() -> None:
    figure = show.interval_figure({"reward": {"": {"a": interval(0.3), "b": interval(0.6, 0.2)}}})
    reaches = [list(line.get_xdata()) for line in marks(figure, "None")]
    assert reaches == [pytest.approx([0.2, 0.4]), pytest.approx([0.4, 0.8])]
    assert [line.get_xdata()[0] for line in marks(figure, "o")] == [0.3, 0.6]


def test_rows_stand_from_the_top_in_the_order_given() -> None:
    figure = show.interval_figure({"reward": {"": {"first": interval(0.1), "second": interval(0.2)}}})
    low, high = figure.axes[0].get_ylim()
    assert low > high and [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["first", "second"]


def test_series_share_a_row_without_hiding_each_other_and_have_a_key() -> None:
    series = {"own": {"red": interval(0.8)}, "user": {"red": interval(0.8), "blue": interval(0.1)}}
    figure = show.interval_figure({"reward": series, "gold": series})
    own, user = marks(figure, "o")[0], marks(figure, "D")
    assert own.get_ydata()[0] < user[0].get_ydata()[0] and len(user) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["own", "user"]
    assert not show.interval_figure({"reward": {"": {"red": interval(0.5)}}}).legends


def test_a_mean_that_is_not_a_number_draws_nothing() -> None:
    figure = show.interval_figure({"gold": {"": {"a": interval(float("nan")), "b": interval(0.5)}}})
    assert len(marks(figure, "o")) == 1


@pytest.mark.parametrize("panels", [{}, {"reward": {}}, {"reward": {str(i): {"a": interval(0.1)} for i in range(9)}}])
def test_no_rows_or_too_many_series_are_refused(panels: dict) -> None:
    with pytest.raises(KitError, match="interval_figure: found"):
        show.interval_figure(panels)


# --- curves ---------------------------------------------------------------------------------------------------------


def test_curves_are_named_at_their_ends_and_differ_without_colour() -> None:
    curves = {"vague": ([1, 2, 4], [0.1, 0.3, 0.4]), "precise": ([1, 2, 4], [0.9, 0.9, 0.9])}
    axes = show.curve_figure({"reward": curves}, "steps", log_x=True).axes[0]
    assert {text.get_text(): tuple(text.xy) for text in axes.texts} == {"vague": (4, 0.4), "precise": (4, 0.9)}
    assert len({(line.get_marker(), str(line.get_linestyle())) for line in axes.lines}) == 2
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]


def test_the_name_of_the_lowest_curve_stands_lower() -> None:
    curves = {"a": ([1, 2], [0.5, 0.5]), "b": ([1, 2], [0.5, 0.49])}
    above, below = show.curve_figure({"": curves}, "x").axes[0].texts
    assert above.xyann[1] > 0 > below.xyann[1]


@pytest.mark.parametrize("panels", [{}, {"reward": {}}, {"reward": {str(i): ([1], [1]) for i in range(9)}}])
def test_no_curve_or_too_many_are_refused(panels: dict) -> None:
    with pytest.raises(KitError, match="curve_figure: found"):
        show.curve_figure(panels, "x")


# --- paths, distributions -------------------------------------------------------------------------------------------


def test_paths_run_from_noise_on_the_left_to_data_on_the_right() -> None:
    positions = np.array([[1.5, -1.5], [1.2, -1.2], [1.0, -1.0]])
    axes = show.flow_figure({"2 steps": ([1.0, 0.5, 0.0], positions)}, [-1.0, 1.0]).axes[0]
    left, right = axes.get_xlim()
    assert left > right
    assert [list(line.get_ydata()) for line in axes.lines if line.get_marker() == "."] == positions.T.tolist()


@pytest.mark.parametrize("positions", [np.zeros((2, 4)), np.zeros(3)])
def test_paths_need_a_row_for_each_noise_level(positions: np.ndarray) -> None:
    with pytest.raises(KitError, match="flow_figure: positions of shape"):
        show.flow_figure({"2 steps": ([1.0, 0.5, 0.0], positions)}, [1.0])


def test_bars_are_as_high_as_the_probabilities_and_say_so() -> None:
    figure = show.distribution_figure(["sharp", "<end>"], {"T = 1": [0.75, 0.25], "T = 2": [0.6, 0.4]})
    assert [bar.get_height() for bar in figure.axes[1].patches] == [0.6, 0.4]
    assert texts(figure) == ["0.75", "0.25"]


def test_a_distribution_over_other_words_is_refused() -> None:
    with pytest.raises(KitError, match=r"found \[3\] values, allowed: 2"):
        show.distribution_figure(["a", "b"], {"T": [0.2, 0.3, 0.5]})


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_every_token_is_written_with_its_probability() -> None:
    figure = show.token_figure([["a", " red", " circle", "<|im_end|>"]], [[0.9, 0.25, 1.0, 0.5]])
    assert texts(figure) == ["a", "0.90", "red", "0.25", "circle", "1.00", "<|im_end|>", "0.50"]


def test_an_unlikely_token_is_not_said_to_be_impossible() -> None:
    assert texts(show.token_figure([["a", "b"]], [[0.001, 0.0]])) == ["a", "<.01", "b", "0.00"]


def test_the_less_certain_a_token_the_darker_it_is() -> None:
    boxes = show.token_figure([["sure", "so", "guess"]], [[1.0, 0.5, 0.01]]).axes[0].patches
    lightness = [sum(to_rgb(box.get_facecolor())) for box in boxes]
    assert lightness[0] == pytest.approx(3.0) and lightness == sorted(lightness, reverse=True)


def test_long_texts_go_on_in_the_next_line_inside_the_figure() -> None:
    figure = show.token_figure([["masterpiece"] * 40, ["short"]], [[0.5] * 40, [0.5]])
    axes = figure.axes[0]
    ends = [(box.get_x() + box.get_width(), box.get_y()) for box in axes.patches]
    assert max(x for x, _ in ends) <= axes.get_xlim()[1] and min(y for _, y in ends) >= axes.get_ylim()[0]
    corners = {(round(box.get_x(), 6), round(box.get_y(), 6)) for box in axes.patches}
    assert len(corners) == 41  # no token stands on another


@pytest.mark.parametrize(("rows", "chances"), [([], []), ([["a"]], [[0.5, 0.5]]), ([["a"], ["b"]], [[0.5]])])
def test_tokens_and_probabilities_must_match(rows: list, chances: list) -> None:
    with pytest.raises(KitError, match="token_figure: found"):
        show.token_figure(rows, chances)


# --- any text -------------------------------------------------------------------------------------------------------

WITH_TEXT: dict[str, Callable[[str], Drawing]] = {
    # a frame holds no half characters
    "seeds": lambda text: show.seed_figure(PICTURES.assign(user_prompt=text.encode(errors="replace").decode())),
    "intervals": lambda text: show.interval_figure({text: {text: {text: interval(0.5)}}}),
    "curves": lambda text: show.curve_figure({text: {text: ([1, 2], [0.1, 0.2])}}, text, text),
    "distributions": lambda text: show.distribution_figure([text, text + "x"], {text: [0.5, 0.5]}),
    "tokens": lambda text: show.token_figure([[text, text]], [[0.5, 0.5]]),
}


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("name", WITH_TEXT)
def test_hostile_text_is_drawn_as_text(name: str, text: str) -> None:
    with Image.open(io.BytesIO(WITH_TEXT[name](text).to_png(40))) as image:
        assert np.asarray(image.convert("L")).std() > 1
