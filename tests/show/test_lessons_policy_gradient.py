"""The figures of notebook 02b draw what they are given, and say it in words too."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_kit.config import KitError
from grpo_kit.show import climb_figure, estimates_figure, texts_figure


def test_texts_stand_in_the_order_of_their_rewards_with_a_bar_for_each_policy():
    before, after = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.1, 0.8])
    figure = texts_figure(["a", "$b$", "c"], [0.0, -0.5, 1.0], {"before": before, "after": after})
    figure.to_png(dpi=50)
    (axes,) = figure.axes
    names = [label.get_text().split()[0] for label in axes.get_yticklabels()]
    assert names == ["c", "a", "$b$"]
    assert [round(bar.get_width(), 3) for bar in axes.patches] == [0.2, 0.5, 0.3, 0.8, 0.1, 0.1]
    assert "c: reward 1.0, 20.0% then 80.0%" in figure.alt
    assert len(texts_figure(["a", "b"], [0, 1], {"now": np.array([0.4, 0.6])}).axes[0].patches) == 2


@pytest.mark.parametrize("policies", [{}, {"one": np.ones(3)}, dict.fromkeys("abc", np.ones(2))])
def test_policies_of_another_number_of_texts_are_refused(policies: dict[str, np.ndarray]):
    with pytest.raises(KitError, match=r"texts_figure: found .* allowed: 1 or 2"):
        texts_figure(["a", "b"], [0.0, 1.0], policies)


def test_an_estimate_lies_as_far_along_the_gradient_as_it_does():
    exact = np.array([3.0, 0.0, 0.0])
    found = np.array([[3.0, 1.0, 0.0], [6.0, -1.0, 0.0], [-3.0, 2.0, 0.0], [0.0, -2.0, 0.0]])
    figure = estimates_figure({"plain": found, "other": 0.5 * found + 0.5 * exact}, exact)
    figure.to_png(dpi=50)
    dots = figure.axes[0].lines[0]
    assert np.allclose(dots.get_xdata(), [1, 2, -1, 0]) and np.allclose(
        np.abs(dots.get_ydata()), [1 / 3, 1 / 3, 2 / 3, 2 / 3]
    )
    assert figure.axes[0].lines[1].get_xdata() == pytest.approx(0.5)  # their mean
    assert "plain: 50.0% of the estimates point downhill" in figure.alt and "other: 25.0% of" in figure.alt


def test_a_climb_has_a_line_for_each_seed_their_mean_and_the_exact_one():
    curves = np.array([[0.1, 0.5, 0.9], [0.1, 0.3, 0.7]])
    figure = climb_figure({"a": curves, "b": curves}, [0.1, 0.4, 0.8], goal=0.9)
    figure.to_png(dpi=50)
    lines = figure.axes[1].lines
    assert len(lines) == 5 and np.allclose(lines[2].get_ydata(), [0.1, 0.4, 0.8])
    assert "a: mean 0.80, lowest 0.70" in figure.alt


def test_a_figure_with_words_gives_them_to_the_page():
    figure = climb_figure({"a": np.zeros((1, 3))}, [0.0, 0.0, 0.0], goal=1.0)
    picture, metadata = figure._repr_png_()
    assert picture.startswith(b"\x89PNG") and metadata == {"alt": figure.alt}
