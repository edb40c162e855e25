"""The exercises of 08_evaluate: the solution passes, the stub does not, and misconceptions are named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from grpo_kit.course.exercise import check
from tests.support.course import solution, stub


@pytest.mark.parametrize(("name", "what"), [("08.1", "interval"), ("08.2", "got_worse")])
def test_the_solution_passes_and_the_stub_does_not(name: str, what: str) -> None:
    passed, empty = check(name, solution(name)[what]), check(name, stub(name)[what])
    assert passed.passed, passed
    assert not empty.passed and "not written yet" in empty.message


def ends(means: np.ndarray) -> tuple[float, float]:
    """The quantiles of the means."""
    low, high = np.quantile(means, [0.025, 0.975])
    return low, high


def pictures_always(cells: np.ndarray, unit: str) -> tuple[float, float]:
    """Single cells, whatever the unit."""
    return ends(np.random.default_rng(1).choice(cells.ravel(), size=(4000, cells.size)).mean(axis=1))


def prompts_always(cells: np.ndarray, unit: str) -> tuple[float, float]:
    """Whole prompts, whatever the unit."""
    rows = np.random.default_rng(1).integers(len(cells), size=(4000, len(cells)))
    return ends(cells.mean(axis=1)[rows].mean(axis=1))


def no_means(cells: np.ndarray, unit: str) -> tuple[float, float]:
    """The quantiles of what was drawn."""
    return ends(np.random.default_rng(1).choice(cells.mean(axis=1), size=(4000, len(cells))))


def without_replacement(cells: np.ndarray, unit: str) -> tuple[float, float]:
    """Each draw is a permutation."""
    rng = np.random.default_rng(1)
    return ends(np.array([rng.permutation(cells.mean(axis=1)).mean() for _ in range(4000)]))


@pytest.mark.parametrize(
    ("wrong", "idea"),
    [
        (pictures_always, "single pictures were drawn"),
        (prompts_always, "the wrong interval draws single cells"),
        (no_means, "no mean was taken"),
        (without_replacement, "rows without replacement"),
        (lambda cells, unit: pictures_always(cells.mean(axis=0), unit), "columns were drawn, not prompts"),
    ],
)
def test_a_wrong_interval_is_told_what_it_did(wrong: Callable, idea: str) -> None:
    found = check("08.1", wrong)
    assert not found.passed and idea in found.message, found


def fell_on_average(differences: dict[str, np.ndarray]) -> list[str]:
    """No interval."""
    return [name for name, cells in differences.items() if cells.mean() < 0]


def over_pictures(differences: dict[str, np.ndarray]) -> list[str]:
    """All cells as independent values."""
    return [n for n, c in differences.items() if c.mean() + 1.96 * c.std(ddof=1) / c.size**0.5 < 0]


def the_other_way(differences: dict[str, np.ndarray]) -> list[str]:
    """Raw − trained."""
    means = {name: cells.mean(axis=1) for name, cells in differences.items()}
    return [name for name, m in means.items() if m.mean() - 1.96 * m.std(ddof=1) / len(m) ** 0.5 > 0]


def the_lowest(differences: dict[str, np.ndarray]) -> list[str]:
    """One name."""
    return [min(differences, key=lambda name: differences[name].mean())]


@pytest.mark.parametrize(
    ("wrong", "idea"),
    [
        (fell_on_average, "a mean below 0 may be chance"),
        (over_pictures, "pictures were counted as independent"),
        (the_other_way, "these rose"),
        (the_lowest, "only the one that fell most"),
    ],
)
def test_a_wrong_list_of_losses_is_told_what_it_did(wrong: Callable, idea: str) -> None:
    found = check("08.2", wrong)
    assert not found.passed and idea in found.message, found


def test_the_recorded_evaluation_lost_the_users_objects_and_nothing_else() -> None:
    from grpo_kit.config import PROJECT_ROOT
    from grpo_kit.course.exercises_08 import pd, recorded_differences

    rows = pd.read_parquet(PROJECT_ROOT / "data/demo_run/evaluation/rows.parquet")
    assert solution("08.2")["got_worse"](recorded_differences(rows)) == ["reward/keeps_objects"]
