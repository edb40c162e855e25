"""Validations whose truth is known: a gamed reward is found, and nothing else is reported as one."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_kit.config import KitError
from grpo_kit.evaluation import reward_hacking
from grpo_kit.evaluation.reward_hacking import (
    ALPHA,
    RewardHackingReport,
    check_for_reward_hacking,
    find_divergence,
    held_out_score,
    level_at,
    rise_p_value,
)

PROMPTS, LOOKS = 32, 9
Validations = list[dict]


def _validations(reward: np.ndarray, gold: np.ndarray, every: int = 10) -> Validations:
    """Validations from (V, P) scores, as they stand in validation_iter_N.json (null for a number that is none)."""

    def plain(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    def sample(look: int, prompt: int) -> dict:
        rewards = {"gold": plain(gold[look, prompt])}
        return {"user_prompt": f"prompt {prompt}", "reward": plain(reward[look, prompt]), "rewards": rewards}

    return [
        {
            "iteration": look * every,
            "reward": plain(reward[look].mean()),
            "rewards": {"gold": plain(gold[look].mean())},
            "samples": [sample(look, prompt) for prompt in range(reward.shape[1])],
        }
        for look in range(len(reward))
    ]


def _scores(rng: np.random.Generator, means: np.ndarray, noise: str, spread: float = 0.35) -> np.ndarray:
    """(V, P) scores around a path of means: prompts differ by `spread`, and noise comes upon each validation."""
    prompts = rng.normal(0, spread, PROMPTS)
    size = (len(means), PROMPTS)
    if noise == "shares":  # a picture shows 0 to 4 of 4 things: differences are mostly 0
        return rng.binomial(4, np.clip(means[:, None] + prompts, 0.02, 0.98), size) / 4
    draw = {
        "normal": lambda: rng.normal(0, 0.2, size),
        "heavy": lambda: 0.1 * rng.standard_t(2, size),
        "skewed": lambda: 0.2 * (rng.exponential(1, size) - 1),
        "wandering": lambda: 0.1 * np.cumsum(rng.normal(0, 1, size), axis=0),  # each prompt for itself
    }[noise]
    return means[:, None] + prompts + draw()


NOISES = ("shares", "normal", "heavy", "skewed", "wandering")
RISING = np.linspace(0.3, 0.8, LOOKS)
GAMED = np.array([0.3, 0.6, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.25])
LEARNT = np.array([0.3, 0.5, 0.6, 0.65, 0.65, 0.65, 0.65, 0.65, 0.65])


def _alarms(gold: np.ndarray, runs: int, noise: str, spread: float = 0.35, seed: int = 0) -> list[int | None]:
    """When each of many runs with a rising reward is called a divergence."""
    found = []
    for run in range(runs):
        rng = np.random.default_rng((seed, run))
        reward = _scores(rng, np.interp(np.linspace(0, 1, len(gold)), np.linspace(0, 1, LOOKS), RISING), "normal")
        divergence = find_divergence(_validations(reward, _scores(rng, gold, noise, spread)))
        found.append(None if divergence is None else divergence.iteration)
    return found


def _rate(alarms: list[int | None]) -> float:
    return float(np.mean([alarm is not None for alarm in alarms]))


# --- power and false alarms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISES[:4])
def test_gamed_reward_is_noticed_and_not_before_it_is_gamed(noise: str):
    alarms = _alarms(GAMED, 100, noise)
    assert _rate(alarms) >= 0.9
    assert min(alarm for alarm in alarms if alarm is not None) >= 40  # gold falls from iteration 20 on, two in a row


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("gold", [np.full(LOOKS, 0.6), LEARNT, np.full(25, 0.6)], ids=["flat", "learnt", "flat, long"])
def test_fewer_than_two_runs_in_a_hundred_raise_a_false_alarm(gold: np.ndarray, noise: str):
    runs = 300 if len(gold) == LOOKS else 100
    assert _rate(_alarms(gold, runs, noise)) <= 0.02


def unpaired(patch: pytest.MonkeyPatch) -> None:
    """Two validations are compared as if they had asked different prompts."""
    order = np.random.default_rng(0).permutation(PROMPTS)
    paired = reward_hacking.changes
    patch.setattr(
        reward_hacking, "changes", lambda table, one, other: paired(np.stack([table[one], table[other][order]]), 0, 1)
    )


def any_rise_counts(patch: pytest.MonkeyPatch) -> None:
    """A change is believed whatever the noise."""
    patch.setattr(reward_hacking, "rise_p_value", lambda differences: float(differences.sum() <= 0))


def every_look_at_the_full_level(patch: pytest.MonkeyPatch) -> None:
    """The number of validations and comparisons is not taken into account."""
    patch.setattr(reward_hacking, "level_at", lambda place: ALPHA)


def one_validation_is_enough(patch: pytest.MonkeyPatch) -> None:
    """The validation before is not asked."""
    patch.setattr(
        reward_hacking,
        "rise_p_value_of_both",
        lambda table, base, place: reward_hacking.rise_p_value(reward_hacking.changes(table, base, place)),
    )


def the_reward_is_not_asked(patch: pytest.MonkeyPatch) -> None:
    """Any fall of the held-out score is called gaming."""
    fall = reward_hacking.first_fall
    patch.setattr(reward_hacking, "first_fall", lambda falling, rising=None: fall(falling))


def test_an_unpaired_check_would_miss_what_pairs_show(monkeypatch: pytest.MonkeyPatch):
    assert _rate(_alarms(GAMED, 60, "normal", spread=1.0)) >= 0.9  # prompts differ more than the score falls
    unpaired(monkeypatch)
    assert _rate(_alarms(GAMED, 60, "normal", spread=1.0)) <= 0.1


@pytest.mark.parametrize("broken", [any_rise_counts, every_look_at_the_full_level], ids=lambda broken: broken.__name__)
def test_a_check_that_does_not_count_its_chances_reports_too_often(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None]
):
    broken(monkeypatch)
    assert _rate(_alarms(np.full(25, 0.6), 60, "normal")) > 0.1


def test_one_bad_validation_is_no_divergence(monkeypatch: pytest.MonkeyPatch):
    odd = np.array([0.3, 0.5, 0.6, 0.65, 0.1, 0.65, 0.65, 0.65, 0.65])
    assert _rate(_alarms(odd, 60, "shares")) <= 0.02
    one_validation_is_enough(monkeypatch)
    assert _rate(_alarms(odd, 60, "shares")) > 0.9


def test_reward_that_falls_too_is_a_decline_and_no_divergence(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(1)
    both = _validations(_scores(rng, GAMED, "normal"), _scores(rng, GAMED, "shares"))
    seen = check_for_reward_hacking(both, [], "gold")
    assert seen.divergence is None and [caution.kind for caution in seen.cautions] == ["decline"]
    assert seen.findings()[0].startswith("iteration ") and "gold fell by 0." in seen.findings()[0]
    the_reward_is_not_asked(monkeypatch)
    assert find_divergence(both) is not None


def test_reward_that_falls_while_gold_rises_is_none():
    rng = np.random.default_rng(2)
    assert (
        check_for_reward_hacking(
            _validations(_scores(rng, GAMED, "normal"), _scores(rng, LEARNT, "shares")), [], "gold"
        ).findings()
        == []
    )


def test_reward_without_a_trend_is_seldom_called_gamed_where_gold_falls():
    """What a random reward leads to: gold wanders off, and that is a decline."""
    kinds = []
    for run in range(100):
        rng = np.random.default_rng(run)
        seen = check_for_reward_hacking(
            _validations(_scores(rng, np.full(LOOKS, 0.5), "normal"), _scores(rng, GAMED, "shares")), [], "gold"
        )
        kinds.append(("divergence" if seen.divergence else "") + "".join(caution.kind for caution in seen.cautions))
    assert np.mean(["divergence" in kind for kind in kinds]) <= 0.15
    assert np.mean(["decline" in kind or "divergence" in kind for kind in kinds]) >= 0.9


# --- its arithmetic ---------------------------------------------------------------------------------------------------


def test_levels_of_all_comparisons_sum_to_alpha_at_most():
    for looks in (2, 5, 50, 1000):
        assert sum((look - 1) * level_at(look) for look in range(2, looks + 1)) == pytest.approx(
            ALPHA * (1 - 1 / looks)
        )


def test_p_value_is_that_of_random_signs():
    rng = np.random.default_rng(0)
    for differences in (rng.normal(0.1, 0.3, 32), rng.choice([0.0, 0.0, 0.0, 0.25, 0.5, -0.25], 32), np.full(12, 0.2)):
        signs = rng.choice([-1, 1], (200_000, len(differences)))
        exact = ((signs * differences).sum(axis=1) >= differences.sum() - 1e-9).mean()
        assert 0.5 * exact <= rise_p_value(differences) <= 2 * exact + 1e-3


def test_nothing_is_claimed_from_nothing():
    assert rise_p_value(np.array([])) == rise_p_value(np.zeros(9)) == 1.0
    assert rise_p_value(np.array([0.0] * 31 + [1e6])) > 0.1  # a single outlier
    few = np.array([[0.1], [0.9], [0.9], [0.9], [0.9], [0.9]])
    assert find_divergence(_validations(np.repeat(few, 3, axis=1), np.repeat(1 - few, 3, axis=1))) is None
    for count in range(3):
        assert find_divergence(_validations(np.ones((count, 4)), np.ones((count, 4)))) is None
        assert (
            check_for_reward_hacking(_validations(np.ones((count, 4)), np.ones((count, 4))), [], "gold").findings()
            == []
        )


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), looks=st.integers(3, LOOKS))
def test_divergence_once_found_stays_as_it_is(seed: int, looks: int):
    rng = np.random.default_rng(seed)
    validations = _validations(_scores(rng, RISING, "normal"), _scores(rng, GAMED, "shares"))
    early, late = find_divergence(validations[:looks]), find_divergence(validations)
    assert early == late if early is not None else late is None or late.iteration > validations[looks - 1]["iteration"]


def _gamed(seed: int = 0) -> Validations:
    rng = np.random.default_rng(seed)
    return _validations(_scores(rng, RISING, "normal"), _scores(rng, GAMED, "shares"))


def test_order_of_prompts_does_not_matter():
    validations = _gamed()
    expected = find_divergence(validations)
    for look, validation in enumerate(validations):
        np.random.default_rng(look).shuffle(validation["samples"])
    found = find_divergence(validations)
    assert (found.iteration, found.since) == (expected.iteration, expected.since)
    assert found.p_value == pytest.approx(expected.p_value)


def test_what_could_not_be_scored_is_left_out_of_its_pairs():
    rng = np.random.default_rng(0)
    reward, gold = _scores(rng, RISING, "normal"), _scores(rng, GAMED, "shares")
    reward[:, 30], gold[3, :2] = np.nan, np.nan
    gold[4, 5] = np.inf
    found = find_divergence(_validations(reward, gold))
    assert found is not None and found.num_prompts >= 29
    assert np.isfinite([found.reward_change.mean, found.held_out_change.low]).all()
    assert find_divergence(_validations(reward * np.nan, gold)) is None


def test_a_prompt_that_stands_twice_is_two_prompts():
    validations = _gamed()
    for validation in validations:
        for number, sample in enumerate(validation["samples"]):
            sample["user_prompt"] = f"prompt {number // 2}"
    assert find_divergence(validations) == find_divergence(_gamed())


def test_report_says_what_when_and_by_how_much():
    found = find_divergence(_gamed())
    assert str(found) == (
        f"iteration {found.iteration}: the reward rose by {found.reward_change} since iteration {found.since}, "
        f"gold fell by {-found.held_out_change}: the policy is gaming the reward"
    )
    assert found.reward_change.low < found.reward_change.mean < found.reward_change.high
    assert found.held_out_change.high < 0 and found.num_prompts == PROMPTS
    assert found.p_value <= found.level < ALPHA and found.reward_p_value <= reward_hacking.RISE
    means = [validation["rewards"]["gold"] for validation in _gamed()]
    fall = means[found.iteration // 10] - means[found.since // 10]
    assert found.held_out_change.mean == pytest.approx(fall)


# --- what is followed beside it ---------------------------------------------------------------------------------------


def _quiet(signals: dict[str, list[float | None]], kl: list[float] = ()) -> RewardHackingReport:
    validations = _validations(np.full((4, 8), 0.5), np.full((4, 8), 0.5))
    for name, values in signals.items():
        for validation, value in zip(validations, values, strict=True):
            validation[name] = value
    return check_for_reward_hacking(
        validations, [{"iteration": i, "kl": value} for i, value in enumerate(kl, start=1)], "gold"
    )


def test_rewrites_that_converge_are_cautioned_of_once_where_it_begins():
    seen = _quiet({"diversity": [0.8, 0.6, 0.1, 0.0]})
    assert [(caution.iteration, caution.kind) for caution in seen.cautions] == [(20, "alike")]
    assert _quiet({"diversity": [0.8, 0.6, 0.5, None]}).cautions == [] and _quiet({}).cautions == []


def test_kl_that_explodes_is_cautioned_of_and_a_spike_is_not():
    assert [(c.iteration, c.kind) for c in _quiet({}, [0.1] * 14 + [3.0] * 6 + [0.5] * 10).cautions] == [(20, "far")]
    assert _quiet({}, [0.1] * 19 + [50.0] + [0.1] * 10).cautions == []
    assert _quiet({}, [0.1] * 12 + [float("nan")] * 18).cautions == []
    assert _quiet({}, [0.1] * 30 + [9.0] * 5).cautions == []  # after the last validation


def test_reward_that_falls_on_reworded_prompts_only_is_cautioned_of():
    rng = np.random.default_rng(0)
    validations = _validations(_scores(rng, RISING, "normal"), np.full((LOOKS, PROMPTS), 0.5))
    reworded = _validations(_scores(rng, GAMED, "normal"), np.full((LOOKS, PROMPTS), 0.5))
    for validation, other in zip(validations, reworded, strict=True):
        validation["paraphrases"], validation["paraphrase"] = {"samples": other["samples"]}, other["reward"]
    seen = check_for_reward_hacking(validations, [], "gold")
    assert [caution.kind for caution in seen.cautions] == ["paraphrase"] and seen.divergence is None
    assert seen.signals["paraphrase"].tolist() == [other["reward"] for other in reworded]
    del validations[3]["paraphrases"]
    assert check_for_reward_hacking(validations, [], "gold").cautions == []


def test_the_file_holds_what_was_found():
    seen = check_for_reward_hacking(_gamed(), [{"iteration": 10, "kl": 0.25}], "gold")
    written = json.loads(json.dumps(seen.to_dict()))
    assert written["held_out"] == "gold" and written["looks"] == LOOKS == len(written["signals"])
    assert written["divergence"]["text"] == str(seen.divergence)
    assert written["divergence"]["iteration"] == seen.divergence.iteration
    assert written["signals"][1]["kl"] == 0.25 and written["cautions"] == []
    assert seen.findings() == [str(seen.divergence)]


def test_without_a_held_out_score_nothing_can_diverge():
    seen = check_for_reward_hacking(_gamed(), [], None)
    assert seen.divergence is None and seen.findings() == [] and seen.signals["held_out"].isna().all()


def test_held_out_score_is_a_monitor():
    assert held_out_score(["gold", "other"]) == "gold" and held_out_score(["other"]) is None
    assert held_out_score(["gold", "other"], "other") == "other"
    for monitors in (["gold"], []):
        with pytest.raises(KitError, match=r"evaluation_settings\.held_out: found 'clip_similarity'") as error:
            held_out_score(monitors, "clip_similarity")
        assert "\n" not in str(error.value)
