"""The figures on rewards, groups and the loss draw what the numbers say and what the kit's functions return."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from PIL import Image

from grpo_kit.config import KitError
from grpo_kit.grpo import LossOutput
from grpo_kit.show import (
    agreement_figure,
    clipping_figure,
    group_rows_figure,
    group_size_figure,
    kl_estimators_figure,
    pushes,
    similarity_figure,
    token_weights_figure,
    vectors_figure,
    winners_figure,
)
from grpo_kit.show.style import BLUE, INK, VERMILION, Drawing

HOSTILE = [
    "<script>alert(1)</script>",
    "$\\frac{$ $x_{y$",
    "\x00\x1b[31mred",
    "\ud800 lone",
    "مرحبا 😀 " + "x" * 300,
    "",
]
PICTURES = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]


def words(figure: Drawing) -> list[str]:
    """Every text of a figure, once it has been laid out."""
    figure.to_png(dpi=50)
    labels = [label for axes in figure.axes for label in axes.get_yticklabels()]
    texts = [text for axes in figure.axes for text in [*axes.texts, axes.title, axes._left_title]]
    return [text.get_text() for text in [*texts, *labels]]


def curve(axes: Axes, colour: str) -> np.ndarray:
    """(K, 2) the points of the axes' longest line of a colour."""
    lines = [line for line in axes.lines if to_rgba(line.get_color()) == to_rgba(colour)]
    return max((line.get_xydata() for line in lines), key=len)


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_vectors_carry_their_cosine_whatever_their_length() -> None:
    vectors = {"picture": (3.0, 0.0), "near": (0.5, 0.5), "far": (-20.0, 0.0), "right angle": (0.0, 2.0)}
    shown = words(vectors_figure(vectors, "picture"))
    assert {"picture", "near\ncosine +0.71", "far\ncosine −1.00", "right angle\ncosine +0.00"} <= set(shown)


@pytest.mark.parametrize("vectors", [{"other": (1.0, 0.0)}, {"anchor": (0.0, 0.0)}, {}])
def test_vectors_without_a_direction_are_refused(vectors: dict) -> None:
    with pytest.raises(KitError, match="vectors_figure: found 'anchor'"):
        vectors_figure(vectors, "anchor")


def test_the_best_picture_of_each_text_is_framed() -> None:
    table = [[0.1, 0.9, 0.2], [0.3, -0.2, 0.5]]
    figure = similarity_figure(table, PICTURES, ["one", "two"])
    frames = [patch for patch in figure.axes[-1].patches if isinstance(patch, Rectangle)]
    assert [(round(frame.get_x() + 0.47), round(frame.get_y() + 0.44)) for frame in frames] == [(1, 0), (2, 1)]
    assert {"0.90", "−0.20"} <= set(words(figure))


@pytest.mark.parametrize("table", [[[1.0, 2.0]], [[1.0, 2.0, 3.0]] * 3, []])
def test_a_table_that_does_not_fit_is_refused(table: list) -> None:
    with pytest.raises(KitError, match="3 images"):
        similarity_figure(table, PICTURES, ["one", "two"])


def test_agreement_shows_the_mean_of_each_third_and_leaves_nan_out() -> None:
    gold = [0.0, 0.2, 0.5, 1.0, 1.0, math.nan, 0.9]
    proxy = [0.1, 0.3, -0.5, 0.8, 0.9, 9.0, math.nan]
    figure = agreement_figure(proxy, gold)
    assert [text for text in words(figure) if text.startswith("mean")] == ["mean 0.20", "mean −0.50", "mean 0.85"]
    assert len(curve(figure.axes[0], BLUE)) == 5
    with pytest.raises(KitError, match="no sample with both"):
        agreement_figure([math.nan], [1.0])


def test_winners_that_reach_the_blind_choice_are_marked() -> None:
    chosen = {
        "good": {"mean": 0.6, "low": 0.5, "high": 0.7},
        "no better": {"mean": 0.35, "low": 0.2, "high": 0.5},
        "worse": {"mean": 0.1, "low": 0.0, "high": 0.2},
    }
    axes = winners_figure(chosen, 0.3).axes[0]
    marks = {line.get_xdata()[0]: line for line in axes.lines if line.get_marker() not in ("None", "", None)}
    assert {x: mark.get_color() for x, mark in marks.items()} == {0.6: BLUE, 0.35: VERMILION, 0.1: VERMILION}
    assert {x: mark.get_marker() for x, mark in marks.items()} == {0.6: "o", 0.35: "s", 0.1: "s"}


# --- groups ----------------------------------------------------------------------------------------------------------


def test_each_group_has_its_mean_its_spread_and_all_its_samples() -> None:
    figure = group_rows_figure({"easy": [0.9, 0.8, 0.8, math.nan], "hard": [0.1, 0.3]})
    axes = figure.axes[0]
    ticks = [line.get_xdata()[0] for line in axes.lines if line.get_color() == INK]
    assert ticks == pytest.approx([2.5 / 3, 0.2])
    points = [tuple(xy) for line in axes.lines if line.get_marker() in ("o", "s") for xy in line.get_xydata()]
    assert len(points) == len(set(points)) == 5, "equal rewards must not hide each other"
    assert {"std 0.058", "std 0.141"} <= set(words(figure))


@pytest.mark.parametrize("groups", [{}, {"empty": []}, {"unscored": [math.nan]}])
def test_groups_without_a_reward_are_refused(groups: dict) -> None:
    with pytest.raises(KitError, match="each with a reward"):
        group_rows_figure(groups)


def test_group_sizes_are_drawn_beside_the_law_of_the_mean() -> None:
    sizes, chances = [2, 8, 32], [0.2, 0.5, 0.9]
    left, right = group_size_figure(sizes, [0.2, 0.1, 0.05], 0.28, {"of the best tenth": chances}).axes
    law = left.lines[0].get_xydata()
    assert law[:, 1] == pytest.approx(0.28 / np.sqrt(law[:, 0]))
    assert right.lines[0].get_ydata().tolist() == chances


# --- the loss --------------------------------------------------------------------------------------------------------


def clip_panels(epsilon: float) -> None:
    """Assert that both panels show PPO's clip: its loss and, in grey, where it has no gradient."""
    figure = clipping_figure(epsilon)
    for axes, advantage, colour in zip(figure.axes, (1, -1), (BLUE, VERMILION), strict=True):
        ratio, loss = curve(axes, colour).T
        clipped = np.clip(ratio, 1 - epsilon, 1 + epsilon)
        assert loss == pytest.approx(-np.minimum(ratio * advantage, clipped * advantage))
        spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
        expected = [(1 + epsilon, 3.0)] if advantage > 0 else [(0.02, 1 - epsilon)]
        assert np.array(spans) == pytest.approx(np.array(expected), abs=0.011)


@pytest.mark.parametrize("epsilon", [0.2, 0.35])
def test_the_clip_is_drawn_as_the_loss_computes_it(epsilon: float) -> None:
    clip_panels(epsilon)


def unclipped(logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, **settings: object) -> LossOutput:
    """A broken loss without a clip."""
    ratio = (logprobs - settings["old_logprobs"]).exp()
    return LossOutput((-ratio * advantages.unsqueeze(1) * settings["weights"]).sum(), {})


def clipped_on_both_sides(
    logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, **settings: object
) -> LossOutput:
    """A broken loss that forgets the unclipped branch."""
    ratio = (logprobs - settings["old_logprobs"]).exp().clamp(1 - settings["epsilon"], 1 + settings["epsilon"])
    return LossOutput((-ratio * advantages.unsqueeze(1) * settings["weights"]).sum(), {})


@pytest.mark.parametrize("broken", [unclipped, clipped_on_both_sides])
def test_another_loss_would_be_another_picture(broken: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushes, "grpo_loss", broken)
    with pytest.raises(AssertionError):
        clip_panels(0.2)


def test_kl_estimates_and_their_slopes_are_the_formulas() -> None:
    values, slopes = kl_estimators_figure().axes
    for panel, formulas in ((values, (lambda d: d, lambda d: d**2 / 2, lambda d: np.exp(-d) - 1 + d)),
                            (slopes, (np.ones_like, lambda d: d, lambda d: 1 - np.exp(-d)))):  # fmt: skip
        drawn = [line.get_xydata() for line in panel.lines if len(line.get_xdata()) > 2]
        for points, formula in zip(drawn, formulas, strict=True):
            assert points[:, 1] == pytest.approx(formula(points[:, 0]))


def test_token_weights_say_how_a_short_row_compares() -> None:
    shown = words(token_weights_figure((10, 100)))
    assert shown.count("10 : 1") == 2 and shown.count("1 : 1") == 6  # grpo and sapo; the six others
    assert words(token_weights_figure((5, 100))).count("20 : 1") == 2


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_can_be_laid_out(text: str) -> None:
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    for figure in (
        similarity_figure([[1.0, 0.0, 0.5]], PICTURES, [text]),
        agreement_figure([0.1, 0.2], [0.0, 1.0], text),
        winners_figure({text: interval}, 0.3, text),
        group_rows_figure({text: [0.1, 0.2]}, text),
        group_size_figure([2, 4], [0.2, 0.1], 0.3, {text: [0.1, 0.2]}),
        vectors_figure({text: (1.0, 0.0), "other": (0.0, 1.0)}, "other"),
    ):
        assert figure.to_png(dpi=40).startswith(b"\x89PNG")
