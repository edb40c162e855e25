"""The split of a group's variance into rewrites and latent seeds, and the advice that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from grpo_kit.config import KitError
from grpo_kit.evaluation import noise
from grpo_kit.evaluation.noise import VarianceSplit, advise, expected_maximum, split_variance

TRUE = {"rewrite": 0.04, "seed": 0.02, "rest": 0.03}


def scores(P: int, N: int, M: int, rng: np.random.Generator, **variances: float) -> np.ndarray:
    """(P, N, M) scores with known variances, around prompt means that differ by far more."""
    std = {name: value**0.5 for name, value in (TRUE | variances).items()}
    parts = rng.normal(0, std["rewrite"], (P, N, 1)), rng.normal(0, std["seed"], (P, 1, M))
    return 3 * rng.normal(size=(P, 1, 1)) + sum(parts) + rng.normal(0, std["rest"], (P, N, M))


def known(**variances: float) -> VarianceSplit:
    return VarianceSplit(**(TRUE | variances), intervals={}, prompts=9, rewrites=8, seeds=4)


# --- the split --------------------------------------------------------------------------------------------------------


def assert_it_finds_known_variances(split: Callable[[np.ndarray], VarianceSplit]) -> None:
    for N, M in ((3, 2), (6, 4), (2, 8)):
        found = split(scores(4000, N, M, np.random.default_rng(N)))
        for part, variance in TRUE.items():
            assert getattr(found, part) == pytest.approx(variance, rel=0.12), (part, N, M)


def test_known_variances_are_found_in_tables_of_any_shape() -> None:
    assert_it_finds_known_variances(partial(split_variance, n_resamples=20))


def unpaired(values: np.ndarray) -> VarianceSplit:
    """A broken twin that forgets which images share a seed."""
    rng = np.random.default_rng(0)
    return split_variance(rng.permuted(values, axis=2), n_resamples=20)


def miscounted(values: np.ndarray) -> VarianceSplit:
    """A broken twin that divides by the number of cells in place of the degrees of freedom."""
    _, N, M = values.shape
    right = noise._mean_squares(values).mean(axis=0, keepdims=True)
    wrong = right * [(N - 1) / N, (M - 1) / M, (N - 1) * (M - 1) / (N * M)]
    return VarianceSplit(*noise._components(wrong, N, M)[:, 0], intervals={}, prompts=len(values), rewrites=N, seeds=M)


@pytest.mark.parametrize("twin", [unpaired, miscounted])
def test_a_broken_split_is_caught(twin: Callable[[np.ndarray], VarianceSplit]) -> None:
    with pytest.raises(AssertionError):
        assert_it_finds_known_variances(twin)


def test_by_hand() -> None:
    # rows differ by 2, columns by 4, nothing else: mean squares M·2 = 4, N·8 = 16 and 0
    found = split_variance(np.array([[[1.0, 5.0], [3.0, 7.0]]]))
    assert (found.rewrite, found.seed, found.rest) == (2.0, 8.0, 0.0)
    assert found.shares() == {"rewrite": 0.2, "seed": 0.8, "rest": 0.0}
    assert found.reliability() == 1.0 and found.reliability(common_seeds=False) == 0.2
    assert found.intervals["rewrite"].mean == 2.0 and np.isnan(found.intervals["rewrite"].low)


def test_prompts_of_another_level_change_nothing() -> None:
    values = scores(6, 4, 3, np.random.default_rng(0))
    moved = split_variance(values + 100 * np.arange(6)[:, None, None])
    for part in TRUE:
        assert getattr(moved, part) == pytest.approx(getattr(split_variance(values), part), abs=1e-9)


def test_intervals_hold_the_true_variances_about_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(0), dict.fromkeys(TRUE, 0)
    for _ in range(200):
        found = split_variance(scores(24, 6, 4, rng), n_resamples=300)
        for part, variance in TRUE.items():
            held[part] += found.intervals[part].low <= variance <= found.intervals[part].high
    assert min(held.values()) >= 0.85 * 200, held


def test_a_prompt_that_was_not_wholly_scored_is_left_out() -> None:
    values = scores(5, 4, 3, np.random.default_rng(0))
    holed = values.copy()
    holed[2, 1, 1] = np.nan
    found, without = split_variance(holed), split_variance(np.delete(values, 2, axis=0))
    assert found == without and found.prompts == 4


def test_scores_that_never_vary_have_no_shares() -> None:
    found = split_variance(np.ones((3, 2, 2)))
    assert np.isnan(list(found.shares().values())).all() and np.isnan(found.reliability())
    with pytest.raises(KitError, match="no variance of rewrites"):
        advise(found, 32)


@pytest.mark.parametrize("shape", [(4, 6), (4, 1, 3), (4, 3, 1)])
def test_a_table_that_cannot_be_split_is_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(KitError, match="found shape"):
        split_variance(np.zeros(shape))
    with pytest.raises(KitError, match="all finite"):
        split_variance(np.full((2, 2, 2), np.nan))


# --- reliability: a simulation agrees ---------------------------------------------------------------------------------


def measured_correlation(N: int, M: int, common: bool) -> float:
    """Between true and measured advantages in simulated groups."""
    rng, groups = np.random.default_rng(1), 20_000 // N
    std = {name: value**0.5 for name, value in TRUE.items()}
    true = rng.normal(0, std["rewrite"], (groups, N))
    luck = rng.normal(0, std["seed"], (groups, 1 if common else N, M)) + rng.normal(0, std["rest"], (groups, N, M))
    seen = true + luck.mean(axis=2)
    centred = [table - table.mean(axis=1, keepdims=True) for table in (true, seen)]
    return float(np.corrcoef(*(table.ravel() for table in centred))[0, 1])


def assert_reliability_is_the_squared_correlation(reliability: Callable[[int, bool], float]) -> None:
    for N, M, common in ((2, 1, True), (8, 1, True), (8, 1, False), (8, 4, False), (4, 4, True)):
        assert reliability(M, common) == pytest.approx(measured_correlation(N, M, common) ** 2, abs=0.02)


def test_reliability_is_the_squared_correlation_of_true_and_measured_advantages() -> None:
    assert_reliability_is_the_squared_correlation(lambda M, common: known().reliability(M, common_seeds=common))


def test_a_reliability_that_ignores_common_seeds_is_caught() -> None:
    with pytest.raises(AssertionError):
        assert_reliability_is_the_squared_correlation(lambda M, common: known().reliability(M, common_seeds=False))


# --- the advice -------------------------------------------------------------------------------------------------------


def simulated_signal(P: int, N: int, M: int) -> float:
    """Squared signal-to-noise of the mean over P groups of the covariance of scores with one score function."""
    rng, repeats = np.random.default_rng(2), 12_000
    std = {name: value**0.5 for name, value in TRUE.items()}
    direction = rng.normal(size=(repeats, P, N))
    true = std["rewrite"] * (0.1 * direction + 0.99**0.5 * rng.normal(size=(repeats, P, N)))
    seen = true + rng.normal(0, std["rest"] / M**0.5, (repeats, P, N))
    centred = seen - seen.mean(axis=2, keepdims=True)
    gradient = (centred * direction).sum(axis=2).mean(axis=1) / (N - 1)
    return float(gradient.mean() ** 2 / gradient.var())


def test_the_signal_ranks_choices_as_a_simulated_gradient_does() -> None:
    table = advise(known(), 32, min_prompts=1).table.set_index(["prompts", "group_size", "images_per_rewrite"])
    choices = [(4, 8, 1), (8, 4, 1), (16, 2, 1), (4, 2, 4), (2, 4, 4), (2, 16, 1)]
    said = np.array([table.loc[choice, "signal"] for choice in choices])
    seen = np.array([simulated_signal(*choice) for choice in choices])
    assert said / said[0] == pytest.approx(seen / seen[0], rel=0.25)


def test_new_rewrites_beat_more_images_unless_they_cost_something() -> None:
    free = advise(known(), 32)
    assert (free.prompts, free.group_size, free.images_per_rewrite) == (4, 8, 1)
    noisy = known(rest=0.4)  # luck ten times the rewrites': √(2.5 · 10) = 5 images each
    dear = advise(noisy, 256, rewrite_cost=2.5)
    assert dear.images_per_rewrite == 4
    assert advise(noisy, 256).images_per_rewrite == 1


def test_every_choice_keeps_to_the_budget_and_the_best_stands_first() -> None:
    for cost in (0.0, 0.7):
        advice = advise(known(), 48, min_prompts=3, rewrite_cost=cost)
        table = advice.table
        spent = table["prompts"] * table["group_size"] * (table["images_per_rewrite"] + cost)
        assert (spent <= 48 + 1e-9).all() and (table["group_size"] >= 2).all() and (table["prompts"] >= 3).all()
        assert table["signal"].iloc[0] == 1 and table["signal"].is_monotonic_decreasing
    assert "16 rewrites × 1 image," in str(advise(known(), 48, min_prompts=3))


def test_own_seeds_lower_every_correlation() -> None:
    shared, own = (advise(known(), 32, common_seeds=choice).table["correlation"].max() for choice in (True, False))
    assert own < shared
    still = known(seed=0.0)
    assert still.reliability() == still.reliability(common_seeds=False)


def test_the_expected_best_of_a_group() -> None:
    draws = np.random.default_rng(0).normal(size=(100_000, 8)).max(axis=1).mean()
    assert expected_maximum(8) == pytest.approx(draws, abs=0.01)
    assert expected_maximum(1) == pytest.approx(0, abs=1e-9)


def test_a_budget_for_nothing_is_one_line() -> None:
    with pytest.raises(KitError, match="images: found 6"):
        advise(known(), 6, min_prompts=4)
    with pytest.raises(KitError, match="min_prompts 0"):
        advise(known(), 32, min_prompts=0)
