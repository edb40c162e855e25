"""Group advantages: the properties that known mistakes violate (CORRECTNESS.md T3, T4, T5, T16)."""

from collections.abc import Callable

import pytest
import torch

from grpo_kit.grpo import group_advantages, group_spread

Advantages = Callable[..., torch.Tensor]
SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out")


def _rewards(seed: int, groups: int = 4, size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of groups with unlike levels and spreads, and whom they belong to."""
    source = torch.Generator().manual_seed(seed)
    level, spread = torch.randn(groups, 1, generator=source), torch.rand(groups, 1, generator=source) + 0.1
    rewards = level + spread * torch.randn(groups, size, generator=source)
    return rewards.double().flatten(), torch.arange(groups).repeat_interleave(size)


# --- properties, each a function of the implementation, so that broken ones can be held against it --------------------


def groups_do_not_leak(advantages: Advantages) -> None:
    rewards, ids = _rewards(0)
    changed = rewards.clone()
    changed[ids == 1] = changed[ids == 1] * 7 - 3
    elsewhere = ids != 1
    assert torch.equal(advantages(rewards, ids)[elsewhere], advantages(changed, ids)[elsewhere])


def order_does_not_matter(advantages: Advantages) -> None:
    rewards, ids = _rewards(1)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(advantages(rewards[order], ids[order]), advantages(rewards, ids)[order])


def equal_rewards_give_exactly_zero(advantages: Advantages) -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        for size in (2, 3, 7, 11):
            ids = torch.arange(50).repeat_interleave(size)
            assert not advantages(values.to(dtype).repeat_interleave(size), ids).any()


def scale_and_shift_cancel(advantages: Advantages) -> None:
    rewards, ids = _rewards(2)
    torch.testing.assert_close(advantages(3 * rewards - 5, ids), advantages(rewards, ids), rtol=1e-3, atol=1e-3)


def a_pair_gets_the_same_for_any_gap(advantages: Advantages) -> None:
    for gap in (0.5, 1.0, 40.0):
        found = advantages(torch.tensor([0.0, gap]), torch.tensor([0, 0]))
        torch.testing.assert_close(found, torch.tensor([-(0.5**0.5), 0.5**0.5]), rtol=1e-3, atol=1e-3)


def unscored_rows_are_as_if_they_were_not_there(advantages: Advantages) -> None:
    rewards, ids = _rewards(3)
    missing = torch.tensor([0, 7, 8, 14])
    rewards[missing] = torch.nan
    scored = ~rewards.isnan()
    found = advantages(rewards, ids)
    assert not found[missing].any()
    torch.testing.assert_close(found[scored], advantages(rewards[scored], ids[scored]))


# --- broken on purpose ------------------------------------------------------------------------------------------------


def _grouped(rewards: torch.Tensor, ids: torch.Tensor, one: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    result = torch.zeros_like(rewards)
    for group in ids.unique():
        result[ids == group] = one(rewards[ids == group])
    return result


def one_group_of_all(rewards: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def discounted_returns(rewards: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    returns, total = [], 0.0
    for reward in reversed(rewards.tolist()):
        total = reward + 0.99 * total
        returns.insert(0, total)
    return torch.tensor(returns, dtype=rewards.dtype) - rewards.mean()


def rounding_error_divided_by_eps(rewards: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return _grouped(rewards, ids, lambda r: (r - r.sum() / len(r)) / (r.std() + 1e-4))


def not_scaled(rewards: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return _grouped(rewards, ids, lambda r: r - r.mean())


def biased_deviation(rewards: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return _grouped(rewards, ids, lambda r: (r - r.mean()) / (r.std(correction=0) + 1e-4))


def failure_counts_as_zero_reward(rewards: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return group_advantages(rewards.nan_to_num(0.0), ids)


PROPERTIES = {
    groups_do_not_leak: one_group_of_all,
    order_does_not_matter: discounted_returns,
    equal_rewards_give_exactly_zero: rounding_error_divided_by_eps,
    scale_and_shift_cancel: not_scaled,
    a_pair_gets_the_same_for_any_gap: biased_deviation,
    unscored_rows_are_as_if_they_were_not_there: failure_counts_as_zero_reward,
}
_named = {"ids": lambda value: value.__name__}


@pytest.mark.parametrize("holds", PROPERTIES, **_named)
def test_property_holds(holds: Callable[[Advantages], None]):
    holds(group_advantages)


@pytest.mark.parametrize(("holds", "mutant"), PROPERTIES.items(), **_named)
def test_broken_version_is_caught(holds: Callable[[Advantages], None], mutant: Advantages):
    with pytest.raises(AssertionError):
        holds(mutant)


# --- for every setting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_settings_share_order_equality_and_failed_samples(scale: str, baseline: str):
    def advantages(rewards: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return group_advantages(rewards, ids, scale_rewards=scale, baseline=baseline)

    order_does_not_matter(advantages)
    equal_rewards_give_exactly_zero(advantages)
    unscored_rows_are_as_if_they_were_not_there(advantages)
    if scale != "batch":  # the batch's deviation is shared by design
        groups_do_not_leak(advantages)


@pytest.mark.parametrize("scale", SCALES)
def test_every_group_averages_to_zero(scale: str):
    rewards, ids = _rewards(4)
    found = group_advantages(rewards, ids, scale_rewards=scale).reshape(4, 5)
    torch.testing.assert_close(found.mean(dim=1), torch.zeros(4, dtype=torch.float64))


def test_leave_one_out_compares_with_the_mean_of_the_others():
    rewards, ids = _rewards(5)
    found = group_advantages(rewards, ids, scale_rewards="none", baseline="leave_one_out")
    rows = rewards.reshape(4, 5)
    torch.testing.assert_close(found.reshape(4, 5), rows - (rows.sum(dim=1, keepdim=True) - rows) / 4)


def test_group_scale_is_trls_formula():
    rewards, ids = _rewards(6, groups=8, size=6)
    rows = rewards.reshape(8, 6)
    expected = (rows - rows.mean(dim=1, keepdim=True)) / (rows.std(dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, ids), expected.flatten())


def test_batch_scale_divides_by_the_deviation_of_all_rewards():
    rewards, ids = _rewards(7)
    plain = group_advantages(rewards, ids, scale_rewards="none")
    torch.testing.assert_close(group_advantages(rewards, ids, scale_rewards="batch"), plain / (rewards.std() + 1e-4))


def test_groups_are_told_apart_by_id_wherever_their_rows_stand_and_however_many_there_are():
    rewards, ids = torch.tensor([1.0, 10.0, 2.0, 20.0, 30.0]), torch.tensor([7, -3, 7, -3, -3])
    found = group_advantages(rewards, ids, scale_rewards="none")
    torch.testing.assert_close(found, torch.tensor([-0.5, -10.0, 0.5, 0.0, 10.0]))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_group_with_no_or_one_scored_sample_teaches_nothing(scale: str, baseline: str):
    rewards = torch.tensor([torch.nan, torch.nan, torch.nan, 5.0, 1.0, 2.0])
    found = group_advantages(rewards, torch.tensor([0, 0, 1, 1, 2, 2]), scale_rewards=scale, baseline=baseline)
    assert found.isfinite().all() and not found[:4].any() and found[4:].all()


def test_nothing_scored_at_all_is_zero_everywhere():
    found = group_advantages(torch.full((4,), torch.nan), torch.tensor([0, 0, 1, 1]), scale_rewards="batch")
    assert torch.equal(found, torch.zeros(4))


def test_spread_shows_what_scaling_hides():
    rewards = torch.tensor([0.0, 1e-6, 0.0, 1.0, torch.nan, 3.0, torch.nan, torch.nan])
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert group_advantages(rewards, ids, eps=1e-9)[1] > 0.7  # a millionth of reward, a whole advantage
    torch.testing.assert_close(group_spread(rewards, ids), torch.tensor([1e-6, 1.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("shape", "options", "named"),
    [
        ((4,), {"scale_rewards": "std"}, "scale_rewards"),
        ((4,), {"baseline": "median"}, "baseline"),
        ((2, 2), {}, "rewards"),
        ((3,), {}, "rewards"),
    ],
)
def test_mistake_is_one_line_that_names_it(shape: tuple[int, ...], options: dict[str, str], named: str):
    with pytest.raises(ValueError, match=named) as error:
        group_advantages(torch.zeros(shape), torch.zeros(4, dtype=torch.int64), **options)
    assert "\n" not in str(error.value)
