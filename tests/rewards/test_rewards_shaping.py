"""Composition: clipping, scaling, normalising, the two ways to combine, and running statistics that can be resumed."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from PIL import Image

from grpo_kit.config import load_config
from grpo_kit.experiment import Experiment
from grpo_kit.grpo import group_advantages
from grpo_kit.rewards import RewardError, Rewards, Shaping, load_rewards
from grpo_kit.rewards.shaping import RunningMoments, within_groups
from grpo_kit.rollout import collect_rollout

IDS = torch.arange(4).repeat_interleave(6)
GROUP = {"a": Shaping("group"), "b": Shaping("group")}


def _scores(seed: int = 0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {
        "a": torch.rand(24, generator=source, dtype=torch.float64),
        "b": 5 * torch.randn(24, generator=source, dtype=torch.float64) - 2,
    }


def _rewards(**settings: object) -> Rewards:
    """Two parts whose scores a test makes up."""
    return Rewards(dict.fromkeys("ab", _never_called), {"a": 1.0, "b": 0.5}, **settings)


def _never_called(images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]) -> object:
    raise AssertionError


# --- without shaping nothing changes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shaping", [{}, {"a": Shaping()}, {"b": Shaping("none", None, 1.0)}])
def test_without_shaping_training_sees_the_raw_total_bit_for_bit(shaping: dict[str, Shaping]):
    rewards, scores = _rewards(shaping=shaping), _scores()
    scores["a"][3] = torch.nan
    combined = rewards.combined(scores, IDS)
    assert combined.numpy().tobytes() == rewards.total(scores).numpy().tobytes()
    assert combined.numpy().tobytes() == (scores["a"] * 1.0 + scores["b"] * 0.5).numpy().tobytes()
    assert not rewards.is_shaped and rewards.state_dict() == {}


def test_shaped_rollout_keeps_raw_parts_and_logs_the_raw_total(kit: Experiment):
    def words(images, prompts, enhanced_prompts):
        return [float(len(text.split())) for text in enhanced_prompts]

    plain = Rewards({"words": words, **kit.rewards.parts}, {"words": 0.1, "clip_similarity": 1.0})
    shaped = dataclasses.replace(plain, combine="normalize_then_sum")
    found = [collect_rollout(kit.policy, kit.generator, r, kit.train_prompts[:2], 4, seed=0) for r in (plain, shaped)]
    assert all(torch.equal(found[0].reward_parts[name], found[1].reward_parts[name]) for name in plain.parts)
    assert found[0].metrics()["reward"] == found[1].metrics()["reward"] == pytest.approx(float(found[0].rewards.mean()))
    assert found[0].metrics()["reward_std"] == found[1].metrics()["reward_std"]
    assert found[0].totals is None and torch.equal(found[1].totals, found[0].rewards)
    torch.testing.assert_close(found[1].rewards.reshape(2, 4).mean(dim=1), torch.zeros(2, dtype=torch.float64))


# --- clipping and scaling ---------------------------------------------------------------------------------------------


def test_part_is_clipped_in_its_own_units_then_scaled_then_weighted():
    rewards = _rewards(shaping={"b": Shaping(clip=(-4.0, 1.0), scale=10.0)})
    scores = _scores()
    expected = scores["a"] + 0.5 * 10 * scores["b"].clamp(-4, 1)
    torch.testing.assert_close(rewards.combined(scores, IDS), expected)
    assert rewards.is_shaped and torch.equal(rewards.total(scores), scores["a"] + 0.5 * scores["b"])


def test_clip_bounds_what_a_single_huge_value_does():
    scores = _scores()
    scores["b"][0] = 1e38
    loose, bounded = _rewards(shaping=GROUP), _rewards(shaping=GROUP | {"b": Shaping("group", (-20.0, 20.0))})
    of_b = [(r.combined(scores, IDS) - within_groups(scores["a"], IDS))[1:6] for r in (loose, bounded)]
    assert of_b[0].std() < 1e-6 and of_b[1].std() > 0.05  # bounded, part b still tells the others of the group apart


# --- normalising: properties and broken twins -------------------------------------------------------------------------

Within = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def over_the_batch(values: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """Takes mean and deviation over all prompts."""
    return (values - values.nanmean()) / (values[values.isfinite()].std() + 1e-4)


def not_centred(values: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """Divides by the deviation alone."""
    return torch.cat([values[group_ids == g] / (values[group_ids == g].std() + 1e-4) for g in group_ids.unique()])


def only_centred(values: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """Forgets to divide."""
    return torch.cat([values[group_ids == g] - values[group_ids == g].mean() for g in group_ids.unique()])


def nan_as_zero(values: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """A failed sample counts as one of the group."""
    return within_groups(values.nan_to_num(0.0), group_ids)


def noise_made_loud(values: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """Divides the rounding error of equal values by a deviation that is not there."""
    groups = [values[group_ids == g] for g in group_ids.unique()]
    return torch.cat([(g - g.sum() / len(g)) / (g.std() + 1e-30) for g in groups])


def _ignores_constants(within: Within) -> bool:
    """A constant added to a prompt's scores changes nothing."""
    values = _scores()["a"]
    moved = values + torch.tensor([100.0, -3.0, 0.0, 7.0], dtype=torch.float64)[IDS]
    return torch.allclose(within(values, IDS), within(moved, IDS), atol=1e-6)


def _ignores_units(within: Within) -> bool:
    """A factor changes nothing, but for eps."""
    values = _scores()["b"]
    return torch.allclose(within(values, IDS), within(1000 * values, IDS), atol=1e-3)


def _leaves_out_one(within: Within) -> bool:
    """NaN in one place leaves out that one; the others are as if it had not been there."""
    values = _scores()["a"]
    spoiled, rest = values.clone(), torch.arange(24) != 7
    spoiled[7] = torch.nan
    found = within(spoiled, IDS)
    return bool(found.isnan().sum() == found[7].isnan() == 1) and torch.allclose(
        found[rest], within(values[rest], IDS[rest])
    )


def _silent_where_all_are_equal(within: Within) -> bool:
    values = torch.full((24,), 0.1, dtype=torch.float64)
    return not within(values, IDS).any()


PROPERTIES = [_ignores_constants, _ignores_units, _leaves_out_one, _silent_where_all_are_equal]


@pytest.mark.parametrize("holds", PROPERTIES)
def test_normalising_within_groups_has_its_properties(holds: Callable[[Within], bool]):
    assert holds(within_groups)


@pytest.mark.parametrize(
    ("mutant", "caught_by"),
    [
        (over_the_batch, _ignores_constants),
        (not_centred, _ignores_constants),
        (only_centred, _ignores_units),
        (nan_as_zero, _leaves_out_one),
        (noise_made_loud, _silent_where_all_are_equal),
    ],
)
def test_broken_normalisation_is_noticed(mutant: Within, caught_by: Callable[[Within], bool]):
    assert not caught_by(mutant)


def test_constant_on_a_normalised_part_changes_nothing_and_on_a_raw_one_it_does():
    scores = _scores()
    moved = scores | {"b": scores["b"] + 100.0}
    for settings in ({"shaping": GROUP}, {"combine": "normalize_then_sum"}):
        rewards = _rewards(**settings)
        torch.testing.assert_close(rewards.combined(moved, IDS), rewards.combined(scores, IDS), rtol=0, atol=1e-6)
    raw = _rewards()
    assert not torch.allclose(raw.combined(moved, IDS), raw.combined(scores, IDS))


def test_loud_part_drowns_the_other_in_a_raw_sum_and_not_in_a_normalised_one():
    scores = _scores()
    loud = scores | {"b": 1000 * scores["b"]}
    normalised, raw = _rewards(combine="normalize_then_sum"), _rewards()
    torch.testing.assert_close(normalised.combined(loud, IDS), normalised.combined(scores, IDS), rtol=0, atol=1e-3)

    def agreement(rewards: Rewards, name: str) -> float:
        advantages = group_advantages(rewards.combined(loud, IDS), IDS)
        return float(torch.corrcoef(torch.stack([advantages, within_groups(loud[name], IDS)]))[0, 1])

    assert agreement(raw, "b") > 0.999 and abs(agreement(raw, "a")) < 0.5
    assert agreement(normalised, "a") > 0.8  # its weight is twice that of b


def test_nan_in_one_part_leaves_out_that_sample_alone():
    scores, rest = _scores(), torch.arange(24) != 9
    spoiled = scores | {"b": scores["b"].where(rest, torch.nan)}
    for settings in ({}, {"shaping": GROUP}, {"combine": "normalize_then_sum"}, {"shaping": {"b": Shaping("running")}}):
        found = _rewards(**settings).combined(spoiled, IDS)
        assert found.isnan().nonzero().flatten().tolist() == [9]
        without = _rewards(**settings).combined({name: values[rest] for name, values in spoiled.items()}, IDS[rest])
        torch.testing.assert_close(found[rest], without)  # as if the sample had not been there


def test_normalize_then_sum_gives_trls_advantages():
    """TRL 1.16, `multi_objective_aggregation="normalize_then_sum"`: its lines, on the same scores."""
    scores, weights = _scores(), torch.tensor([1.0, 0.5], dtype=torch.float64)
    grouped = torch.stack([scores["a"], scores["b"]], dim=1).view(-1, 6, 2)
    reward_k = (grouped - grouped.mean(dim=1, keepdim=True)) / (grouped.std(dim=1, keepdim=True) + 1e-4)
    sums = (reward_k.view(-1, 2) * weights).sum(dim=1)
    expected = (sums - sums.mean()) / (sums.std() + 1e-4)
    combined = _rewards(combine="normalize_then_sum").combined(scores, IDS)
    torch.testing.assert_close(combined, sums)
    torch.testing.assert_close(group_advantages(combined, IDS, scale_rewards="batch"), expected)


# --- running statistics -----------------------------------------------------------------------------------------------


def test_running_moments_are_those_of_everything_seen():
    moments, seen = RunningMoments(), []
    for seed in range(20):
        values = 1e4 + torch.randn(7 + seed, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values[0] = torch.nan
        seen.append(values[1:])
        moments.update(values)
    everything = torch.cat(seen)
    assert moments.count == len(everything) and moments.mean == pytest.approx(float(everything.mean()))
    expected = (everything - everything.mean()) / (everything.std() + 1e-4)
    torch.testing.assert_close(moments.normalized(everything), expected)


def test_running_moments_of_nothing_and_of_one_value_are_silent():
    moments = RunningMoments()
    moments.update(torch.tensor([torch.nan, torch.nan]))
    assert moments.state().tolist() == [0, 0, 0]
    moments.update(torch.tensor([3.0]))
    assert moments.normalized(torch.tensor([3.0])).tolist() == [0.0]
    moments.update(torch.tensor([3.0, 3.0]))
    assert not moments.normalized(torch.tensor([3.0, 3.0])).any()


def test_running_moments_survive_the_largest_numbers_that_count():
    moments = RunningMoments()
    moments.update(torch.tensor([3e38, -3e38, 1.0], dtype=torch.float64))
    assert moments.normalized(torch.tensor([1.0, 3e38], dtype=torch.float64)).isfinite().all()


RUNNING = {"a": Shaping("running"), "b": Shaping("running", clip=(-10.0, 10.0))}


def _stream(rewards: Rewards, seeds: Sequence[int]) -> bytes:
    return b"".join(rewards.combined(_scores(seed), IDS).numpy().tobytes() for seed in seeds)


class Forgetful(Rewards):
    """Saves mean and deviation, but not how much they are worth."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: state * torch.tensor([0.5, 1.0, 0.5]) for name, state in super().state_dict().items()}


def _continues(kind: type[Rewards]) -> bool:
    """Whether statistics that were saved and loaded go on as those of a run that did not stop, bit for bit."""

    def fresh() -> Rewards:
        return kind(dict.fromkeys("ab", _never_called), {"a": 1.0, "b": 0.5}, shaping=RUNNING)

    whole, stopped, resumed = fresh(), fresh(), fresh()
    uninterrupted = _stream(whole, range(6))
    first = _stream(stopped, range(3))
    resumed.load_state_dict({name: value.clone() for name, value in stopped.state_dict().items()})
    return first + _stream(resumed, range(3, 6)) == uninterrupted


def test_saved_running_statistics_continue_bit_for_bit():
    assert _continues(Rewards) and not _continues(Forgetful)


def test_empty_state_resets_and_a_foreign_one_is_refused():
    rewards = _rewards(shaping=RUNNING)
    first = _stream(rewards, range(2))
    assert _stream(rewards, range(2)) != first
    rewards.load_state_dict({})
    assert _stream(rewards, range(2)) == first
    with pytest.raises(RewardError, match="running statistics: found 'c', allowed: a, b"):
        rewards.load_state_dict({"c": torch.zeros(3)})
    with pytest.raises(RewardError, match="running statistics: found 'a', allowed: none"):
        _rewards().load_state_dict({"a": torch.zeros(3)})


def test_copies_share_their_statistics_and_scoring_does_not_move_them(kit: Experiment):
    config = load_config(kit.config, {"reward_settings.shaping.clip_similarity.normalize": "running"})
    rewards = load_rewards(config)
    images = kit.generator.generate_images(["a red circle", "a blue square"], [1, 2])
    rewards(images, ["a red circle", "a blue square"])
    assert rewards.state_dict()["clip_similarity"].tolist() == [0, 0, 0]
    copy = dataclasses.replace(rewards, on_error="raise")
    collect_rollout(kit.policy, kit.generator, copy, kit.train_prompts[:2], 3, seed=0)
    assert rewards.state_dict()["clip_similarity"][0] == 6


# --- what is impossible -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "part"),
    [
        (lambda: Shaping("batch"), "normalize: found 'batch', allowed: none, running, group"),
        (lambda: Shaping(clip=(1.0, 1.0)), r"clip: found \[1.0, 1.0\], allowed: \[low, high\] with low < high"),
        (lambda: _rewards(combine="sum"), "combine: found 'sum', allowed: sum_then_normalize, normalize_then_sum"),
        (lambda: _rewards(on_error="drop"), "on_error: found 'drop', allowed: raise, nan"),
        (lambda: _rewards(shaping={"c": Shaping()}), "shaping: found 'c', allowed: a, b"),
        (lambda: _rewards(monitors={"a": _never_called}), "monitors: found 'a', which is a part too"),
        (lambda: Rewards({"a": _never_called}, {"b": 1.0}), "weights: found b; the part 'a' has none"),
        (lambda: Rewards({"a": _never_called}, {}), "weights: found none; the part 'a' has none"),
    ],
)
def test_impossible_composition_is_one_line(build: Callable[[], object], part: str):
    with pytest.raises(RewardError, match=part) as error:
        build()
    assert "\n" not in str(error.value)
