"""Intervals that keep their word, rates, what could be detected, and training seeds pooled; each with a broken twin."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from grpo_kit.config import KitError
from grpo_kit.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    percentile_interval,
    pooled_interval,
    share_interval,
    success_rate,
    win_rate,
)
from grpo_kit.evaluation.pools import pool_evaluations
from grpo_kit.evaluation.power import detectable_difference, variance_parts
from grpo_kit.evaluation.table import compared_pairs, complete_cells, score_tables

Method = Callable[[np.ndarray], Interval]
REPEATS = 300
SLACK = 0.032  # 2.5 standard errors of a share near 0.95 out of 300


def cells(rng: np.random.Generator, prompts: int, seeds: int, between: float, within: float) -> np.ndarray:
    """(P, K) scores around 0: a part that a prompt's pictures share, and each picture's own."""
    return between * rng.normal(size=(prompts, 1)) + within * rng.normal(size=(prompts, seeds))


def covers(method: Method, draw: Callable[[np.random.Generator], np.ndarray], truth: float = 0.0) -> float:
    """How often the method's interval holds the truth."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(REPEATS):
        found = method(draw(rng))
        hits += found["low"] <= truth <= found["high"]
    return hits / REPEATS


# --- intervals over prompts -------------------------------------------------------------------------------------------


def over_prompts(table: np.ndarray) -> Interval:
    return bootstrap_interval(table.mean(axis=1), n_resamples=500)


def over_pictures(table: np.ndarray) -> Interval:
    """The broken twin: it resamples pictures, as if those of one prompt were independent."""
    return bootstrap_interval(table.flatten(), n_resamples=500)


def test_interval_over_prompts_covers_as_often_as_it_says_and_one_over_pictures_does_not():
    def draw(rng: np.random.Generator) -> np.ndarray:
        return cells(rng, 24, 4, between=1.0, within=0.5)

    assert abs(covers(over_prompts, draw) - 0.95) <= SLACK
    assert covers(over_pictures, draw) < 0.8


def plain_percentile(values: np.ndarray) -> Interval:
    """The broken twin: without the correction for few prompts."""
    low, high = np.quantile(np.random.default_rng(0).choice(values, (500, len(values))).mean(axis=1), [0.025, 0.975])
    return Interval(float("nan"), low, high)


def test_few_prompts_get_the_wider_interval_that_they_need():
    def draw(rng: np.random.Generator) -> np.ndarray:
        return rng.normal(size=8)

    assert abs(covers(bootstrap_interval, draw) - 0.95) <= SLACK
    assert covers(plain_percentile, draw) < 0.95 - SLACK


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30))
@settings(max_examples=30, deadline=None)
def test_an_interval_holds_its_mean_and_stays_within_the_values(values: list[float]):
    found = bootstrap_interval(np.array(values), n_resamples=200)
    assert min(values) - 1e-12 <= found["low"] <= found["mean"] + 1e-12
    assert found["mean"] - 1e-12 <= found["high"] <= max(values) + 1e-12


def test_an_interval_is_deterministic_widens_with_confidence_and_leaves_out_what_is_not_scored():
    values = np.random.default_rng(0).normal(size=20)
    assert bootstrap_interval(values) == bootstrap_interval(np.append(values, np.nan))
    wide, narrow = (bootstrap_interval(values, level) for level in (0.99, 0.8))
    assert wide["low"] < narrow["low"] < narrow["high"] < wide["high"]


def test_one_prompt_has_no_interval_and_equal_ones_a_point():
    assert np.isnan([bootstrap_interval(np.array([0.4]))[end] for end in ("low", "high")]).all()
    assert bootstrap_interval(np.array([0.4, 0.4])) == Interval(0.4, 0.4, 0.4)
    assert np.isnan(list(bootstrap_interval(np.array([np.nan])).to_dict().values())).all()


def test_an_interval_reads_as_its_file_does_and_turns_round():
    found = Interval(0.25, -0.5, 1.0)
    assert found.to_dict() == {end: found[end] for end in ("mean", "low", "high")}
    assert (-found).to_dict() == {"mean": -0.25, "low": -1.0, "high": 0.5}
    assert str(found) == "0.250 [-0.500, 1.000]" and np.isnan(Interval(0.25).low)


def test_a_percentile_interval_leaves_out_what_could_not_be_computed():
    resampled = np.arange(101.0)
    found = percentile_interval(3, resampled, 0.9)
    assert found.to_dict() == pytest.approx({"mean": 3.0, "low": 5.0, "high": 95.0})
    assert percentile_interval(3, np.append(resampled, [np.nan, np.inf]), 0.9) == found
    assert np.isnan(percentile_interval(3, np.array([1.0, np.nan])).high)


# --- rates ------------------------------------------------------------------------------------------------------------


def test_a_tie_is_no_success_and_half_a_win():
    differences = np.array([[1.0, 1.0], [0.5, -0.5], [1e-12, 0.0], [-1.0, -1.0]])
    success, wins = success_rate(differences), win_rate(differences)
    assert (success["mean"], success["ties"]) == (0.25, 0.5)  # the second prompt's mean is level
    assert wins["mean"] == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)


def test_success_is_of_prompts_and_wins_are_of_pictures():
    differences = np.array([[3.0, -1.0, -1.0]] * 6)  # the mean rises by luck of one picture
    assert success_rate(differences)["mean"] == 1.0
    assert win_rate(differences)["mean"] == pytest.approx(1 / 3)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_what_one_side_wins_the_other_loses(seed: int):
    differences = np.random.default_rng(seed).integers(-2, 3, size=(9, 3)).astype(float)
    there, back = win_rate(differences, n_resamples=200), win_rate(-differences, n_resamples=200)
    assert there["mean"] + back["mean"] == pytest.approx(1)
    up, down = success_rate(differences), success_rate(-differences)
    assert up["mean"] + down["mean"] + up["ties"] == pytest.approx(1)
    for found in (there, up):
        assert 0 <= found["low"] <= found["mean"] <= found["high"] <= 1


def test_cells_without_a_score_count_neither_way():
    differences = np.array([[1.0, np.nan], [-1.0, 1.0], [np.nan, np.nan]])
    assert success_rate(differences)["mean"] == 0.5  # of two prompts; the second one's mean is level
    assert win_rate(differences)["mean"] == pytest.approx((1.0 + 0.5) / 2)


def test_a_share_near_one_is_not_certain():
    def draw(rng: np.random.Generator) -> np.ndarray:
        return rng.random(40) < 0.96

    def naive(values: np.ndarray) -> Interval:  # the broken twin: mean ± 1.96 standard errors
        half = 1.96 * values.std() / len(values) ** 0.5
        return Interval(values.mean(), values.mean() - half, values.mean() + half)

    assert covers(lambda values: share_interval(int(values.sum()), 40), draw, 0.96) >= 0.95 - SLACK
    assert covers(naive, draw, 0.96) < 0.85
    assert share_interval(40, 40)["low"] < 1 and np.isnan(share_interval(0, 0)["mean"])


# --- what could be detected -------------------------------------------------------------------------------------------


def test_the_parts_of_the_variance_are_found():
    parts = variance_parts(cells(np.random.default_rng(0), 3000, 4, between=0.3, within=0.6))
    assert parts.prompt == pytest.approx(0.09, rel=0.1) and parts.seed == pytest.approx(0.36, rel=0.1)
    assert (parts.num_prompts, parts.seeds_per_prompt) == (3000, 4)


def test_the_standard_error_is_the_paired_one_and_is_predicted_for_other_numbers():
    rng = np.random.default_rng(1)
    table = cells(rng, 200, 4, between=0.3, within=0.6)
    parts = variance_parts(table)
    assert parts.standard_error() == pytest.approx(stats.sem(table.mean(axis=1)))
    for prompts, seeds in ((50, 1), (50, 8), (400, 2)):
        means = [cells(rng, prompts, seeds, 0.3, 0.6).mean() for _ in range(400)]
        assert parts.standard_error(prompts, seeds) == pytest.approx(np.std(means), rel=0.2)
    assert parts.standard_error(50, np.inf) == pytest.approx((parts.prompt / 50) ** 0.5)


def test_pictures_that_are_missing_change_the_parts_little():
    rng = np.random.default_rng(2)
    table = cells(rng, 2000, 4, between=0.3, within=0.6)
    whole = variance_parts(table)
    table[rng.random(table.shape) < 0.2] = np.nan
    holed = variance_parts(table)
    assert holed.seeds_per_prompt < 4
    assert (holed.prompt, holed.seed) == pytest.approx((whole.prompt, whole.seed), rel=0.15)


def power(difference: float) -> float:
    """How often a true difference is found: its paired t-test over 20 prompts rejects."""
    rng = np.random.default_rng(3)
    means = np.stack([(difference + cells(rng, 20, 3, 0.3, 0.4)).mean(axis=1) for _ in range(1500)])
    return float(np.mean(stats.ttest_1samp(means, 0, axis=1).pvalue < 0.05))


def test_a_difference_of_the_detectable_size_is_found_four_times_out_of_five():
    table = cells(np.random.default_rng(4), 20_000, 3, 0.3, 0.4)
    parts = variance_parts(table)
    assert power(detectable_difference(parts, num_prompts=20)) == pytest.approx(0.8, abs=0.04)
    pictures = variance_parts(table.reshape(-1, 1))  # the broken twin counts pictures as prompts
    assert power(detectable_difference(pictures, num_prompts=60)) < 0.65


@pytest.mark.parametrize("prompts", [2, 3, 5, 129])
def test_the_detectable_difference_has_its_power_under_the_noncentral_t(prompts: int):
    parts = variance_parts(np.array([[0.1], [0.3]]))
    moved = detectable_difference(parts, prompts) / parts.standard_error(prompts)
    limit = stats.t.ppf(0.975, prompts - 1)
    assert stats.nct.sf(limit, prompts - 1, moved) == pytest.approx(0.8, abs=1e-5)
    central = limit + stats.t.ppf(0.8, prompts - 1)  # the broken twin adds two t: too few prompts for little power
    assert prompts > 100 or stats.nct.sf(limit, prompts - 1, central) < 0.8


def test_more_prompts_detect_more_and_more_latents_only_up_to_a_point():
    parts = variance_parts(cells(np.random.default_rng(5), 100, 4, 0.3, 0.6))
    now, prompts = detectable_difference(parts), detectable_difference(parts, num_prompts=400)
    assert prompts == pytest.approx(now / 2, rel=0.02)
    latents = [detectable_difference(parts, seeds_per_prompt=k) for k in (1, 4, 16, 1e6, np.inf)]
    assert latents == sorted(latents, reverse=True) and latents[-1] == pytest.approx(latents[-2], rel=1e-3)
    assert latents[-1] > 0.5 * now
    assert detectable_difference(parts, power=0.95) > now


def test_one_latent_does_not_tell_what_latents_matter():
    parts = variance_parts(cells(np.random.default_rng(6), 30, 1, 0.3, 0.6))
    assert parts.seed is None and detectable_difference(parts, num_prompts=120) < detectable_difference(parts)
    with pytest.raises(KitError, match="seeds_per_prompt: found 4, allowed: 1") as error:
        parts.standard_error(seeds_per_prompt=4)
    assert "\n" not in str(error.value)
    with pytest.raises(KitError, match="found 1 with scores"):
        variance_parts(np.array([[1.0, 2.0], [np.nan, np.nan]]))


# --- several training seeds -------------------------------------------------------------------------------------------


def trained(rng: np.random.Generator, seeds: int, prompts: int, of_seed: float, of_prompt: float) -> np.ndarray:
    """(S, P) means around 0 of policies from several training seeds."""
    shared = of_seed * rng.normal(size=(seeds, 1)) + of_prompt * rng.normal(size=(1, prompts))
    return shared + 0.1 * rng.normal(size=(seeds, prompts))


def as_if_independent(values: np.ndarray) -> Interval:
    """A broken twin: every (seed, prompt) is taken for an observation of its own."""
    return bootstrap_interval(values.flatten(), n_resamples=300)


def over_seeds_and_prompts_resampled(values: np.ndarray) -> Interval:
    """A broken twin: bootstrapping a handful of seeds, which has too few to draw from."""
    rng = np.random.default_rng(0)
    seeds, prompts = (rng.integers(0, n, (300, n)) for n in values.shape)
    means = values[seeds[:, :, None], prompts[:, None, :]].mean(axis=(1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float("nan"), low, high)


@pytest.mark.parametrize("scatter", [(0.05, 0.2), (0.1, 0.1), (0.1, 0.0)])
@pytest.mark.parametrize("seeds", [3, 5])
def test_a_pool_of_training_seeds_covers_as_often_as_it_says(seeds: int, scatter: tuple[float, float]):
    def draw(rng: np.random.Generator) -> np.ndarray:
        return trained(rng, seeds, 24, *scatter)

    assert covers(pooled_interval, draw) >= 0.95 - 1.3 * SLACK


@pytest.mark.parametrize("twin", [as_if_independent, over_seeds_and_prompts_resampled])
def test_a_pool_that_forgets_where_its_numbers_come_from_is_noticed(twin: Method):
    assert covers(twin, lambda rng: trained(rng, 3, 24, 0.1, 0.1)) < 0.9


def test_without_luck_of_training_a_pool_is_as_wide_as_its_prompts_say():
    values = np.repeat(np.random.default_rng(7).normal(size=(1, 40)), 4, axis=0)
    found = pooled_interval(values)
    low, high = stats.t.interval(0.95, 39, values[0].mean(), stats.sem(values[0]))
    assert (found["low"], found["high"]) == pytest.approx((low, high))


def test_without_luck_of_prompts_a_pool_is_the_t_interval_over_seeds():
    values = np.repeat(np.array([[0.1], [0.4], [0.2]]), 10, axis=1)
    found = pooled_interval(values)
    low, high = stats.t.interval(0.95, 2, values[:, 0].mean(), stats.sem(values[:, 0]))
    assert (found["low"], found["high"]) == pytest.approx((low, high))


def test_a_pool_does_not_care_about_order_and_a_pool_of_equals_is_a_point():
    values = trained(np.random.default_rng(8), 4, 9, 0.1, 0.1)
    there, back = pooled_interval(values), pooled_interval(values[::-1, ::-1])
    assert back.to_dict() == pytest.approx(there.to_dict())
    assert pooled_interval(np.full((3, 5), 0.5)) == Interval(0.5, 0.5, 0.5)


@pytest.mark.parametrize("shape", [(1, 9), (4, 1)])
def test_a_pool_of_one_is_one_line(shape: tuple[int, int]):
    with pytest.raises(KitError, match="allowed: at least 2 of each"):
        pooled_interval(np.zeros(shape))


def rows(trained_mean: float, prompts: int = 6, seed: int = 0) -> pd.DataFrame:
    """An evaluation's rows: raw at 0.2, trained at some mean, two latents."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        [
            {"prompt_id": i, "user_prompt": f"prompt {i}", "variant": variant, "seed": k, "reward": mean + noise}
            for variant, mean in (("raw", 0.2), ("trained", trained_mean))
            for i in range(prompts)
            for k, noise in enumerate(0.05 * rng.normal(size=2))
        ]
    )


def test_evaluations_of_several_training_seeds_are_pooled_in_pairs():
    tables = [rows(mean, seed=number) for number, mean in enumerate((0.5, 0.6, 0.7))]
    found = pool_evaluations(tables)
    gains = [
        table.groupby("variant")["reward"].mean().diff().iloc[-1] for table in tables
    ]  # trained − raw, balanced tables
    assert found["training_seeds"] == 3 and found["num_prompts"] == 6
    assert found["differences"]["trained-raw"]["reward"]["mean"] == pytest.approx(np.mean(gains))
    assert found["differences"]["trained-raw"]["reward"]["low"] > 0
    assert set(found["variants"]) == {"raw", "trained"} and set(found["variants"]["raw"]) == {"reward"}


def test_a_prompt_that_one_run_could_not_score_is_left_out_of_all():
    tables = [rows(0.5, seed=0), rows(0.6, seed=1)]
    without = [table[table["prompt_id"] != 4] for table in tables]
    tables[1].loc[(tables[1]["prompt_id"] == 4) & (tables[1]["variant"] == "raw"), "reward"] = np.nan
    assert pool_evaluations(tables)["differences"] == pool_evaluations(without)["differences"]


def test_evaluations_of_other_prompts_are_not_pooled():
    with pytest.raises(KitError, match="evaluation 2 has other prompts than the first"):
        pool_evaluations([rows(0.5), rows(0.5).replace({"user_prompt": {"prompt 2": "another"}})])
    with pytest.raises(KitError, match="found 1 evaluation, allowed: at least 2"):
        pool_evaluations([rows(0.5)])


# --- tables and pairs -------------------------------------------------------------------------------------------------


def test_scores_stand_prompt_by_latent():
    table = score_tables(rows(0.5), ["reward"], ["raw", "trained"])["reward"]["trained"]
    assert table.shape == (6, 2)
    one = rows(0.5).query("prompt_id == 3 and seed == 1 and variant == 'trained'")["reward"].item()
    assert table.loc[3, 1] == one


def test_a_cell_that_failed_in_one_variant_is_left_out_of_both():
    table = rows(0.5)
    table.loc[(table["prompt_id"] == 2) & (table["seed"] == 1) & (table["variant"] == "raw"), "reward"] = np.nan
    kept, excluded = complete_cells(table)
    assert excluded == 1 and len(kept) == len(table) - 2
    assert not ((kept["prompt_id"] == 2) & (kept["seed"] == 1)).any()


@pytest.mark.parametrize(
    ("variants", "pairs"),
    [
        (("raw", "initial", "trained"), ["trained-raw", "trained-initial", "initial-raw"]),
        (("raw", "a", "b"), ["a-raw", "b-raw", "b-a"]),
        (("raw", "trained", "a", "b"), ["trained-raw", "a-raw", "a-trained", "b-raw", "b-trained"]),
        (("a", "b"), ["b-a"]),
        (("raw",), []),
    ],
)
def test_each_policy_is_compared_with_raw_and_with_the_first(variants: tuple[str, ...], pairs: list[str]):
    assert [f"{a}-{b}" for a, b in compared_pairs(variants)] == pairs
