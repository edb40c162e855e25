"""Group advantages: the properties that known mistakes violate (CORRECTNESS.md T3, T4, T5, T15, T16); TRL's formula.

The properties are those of `grpo-kit doctor` (preflight/loss_checks): these advantages have them, broken ones do not.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from support.broken_twins import Known, holding, twins

from grpo_kit.grpo import group_advantages, group_spread
from grpo_kit.preflight.loss_checks import Subject, group_properties, subject_of
from grpo_kit.preflight.loss_checks.cases import unlike_groups

Advantages = Callable[..., torch.Tensor]
SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out")


# --- properties that only these advantages need have ------------------------------------------------------------------


def a_pair_gets_the_same_for_any_gap(subject: Subject) -> None:
    """T5: the unbiased deviation of two is their gap over √2."""
    for gap in (0.5, 1.0, 40.0):
        found = subject.advantages(rewards=torch.tensor([0.0, gap]), group_ids=torch.tensor([0, 0]))
        torch.testing.assert_close(found, torch.tensor([-(0.5**0.5), 0.5**0.5]), rtol=1e-3, atol=1e-3)


def a_spread_under_the_noise_floor_teaches_nothing(subject: Subject) -> None:
    """T5: a spread up to the floor is noise, one above it is what it is without a floor."""
    rewards = torch.tensor([0.0, 0.25, 0.125, 0.0, 0.375, 0.25]).double()
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    for scale in SCALES:
        plain = subject.advantages(rewards=rewards, group_ids=ids, scale_rewards=scale)
        found = subject.advantages(rewards=rewards, group_ids=ids, scale_rewards=scale, noise_floor=0.25)
        assert plain[:3].any() and not found[:3].any()
        assert torch.equal(found[3:], plain[3:])


def a_failed_sample_does_not_widen_a_spread(subject: Subject) -> None:
    """T5, T16: the floor looks at the scored rewards alone."""
    rewards, ids = torch.tensor([5.0, torch.nan, 5.1, 0.0, 1.0, torch.nan]), torch.tensor([0, 0, 0, 1, 1, 1])
    found = subject.advantages(rewards=rewards, group_ids=ids, noise_floor=0.2)
    assert not found[:3].any() and found[3:5].all() and not found[5]


# --- broken on purpose ------------------------------------------------------------------------------------------------


def _grouped(rewards: torch.Tensor, ids: torch.Tensor, one: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    result = torch.zeros_like(rewards)
    for group in ids.unique():
        result[ids == group] = one(rewards[ids == group])
    return result


def one_group_of_all(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def discounted_returns(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    returns, total = [], 0.0
    for reward in reversed(rewards.tolist()):
        total = reward + 0.99 * total
        returns.insert(0, total)
    return torch.tensor(returns, dtype=rewards.dtype) - rewards.mean()


def rounding_error_divided_by_eps(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    return _grouped(rewards, group_ids, lambda r: (r - r.sum() / len(r)) / (r.std() + 1e-4))


def not_scaled(rewards: torch.Tensor, group_ids: torch.Tensor, scale_rewards: str = "group") -> torch.Tensor:
    return _grouped(rewards, group_ids, lambda r: r - r.mean())


def scaled_by_the_square(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    return _grouped(rewards, group_ids, lambda r: (r - r.mean()) / (r.var() + 1e-4))


def mean_not_taken_away(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    return _grouped(rewards, group_ids, lambda r: r / (r.std() + 1e-4))


def biased_deviation(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    return _grouped(rewards, group_ids, lambda r: (r - r.mean()) / (r.std(correction=0) + 1e-4))


def failure_counts_as_zero_reward(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    return group_advantages(rewards.nan_to_num(0.0), group_ids)


@functools.wraps(group_advantages, assigned=(), updated=())
def noise_floor_ignored(*args: object, noise_floor: float = 0.0, **options: object) -> torch.Tensor:
    return group_advantages(*args, **options)


@functools.wraps(group_advantages, assigned=(), updated=())
def noise_floor_of_the_whole_batch(
    *, rewards: torch.Tensor, noise_floor: float = 0.0, **options: object
) -> torch.Tensor:
    quiet = rewards.max() - rewards.min() <= noise_floor
    return torch.zeros_like(rewards) if quiet else group_advantages(rewards, **options)


Property = Callable[[Subject], object]
PROPERTIES: Known = [
    ("T3", group_properties.groups_do_not_leak, [one_group_of_all]),
    ("T4", group_properties.order_does_not_matter, [discounted_returns]),
    ("T4", group_properties.equal_rewards_give_exactly_zero, [rounding_error_divided_by_eps]),
    ("T5", group_properties.scaling_is_the_stated_one, [not_scaled, scaled_by_the_square, mean_not_taken_away]),
    ("T5", a_pair_gets_the_same_for_any_gap, [biased_deviation]),
    ("T5", a_spread_under_the_noise_floor_teaches_nothing, [noise_floor_ignored, noise_floor_of_the_whole_batch]),
    ("T16", a_failed_sample_does_not_widen_a_spread, [noise_floor_ignored]),
    ("T16", group_properties.unscored_rows_change_nothing, [failure_counts_as_zero_reward]),
]


@pytest.mark.parametrize("holds", holding(PROPERTIES))
def test_property_holds(holds: Property):
    holds(subject_of(None, advantages=group_advantages))


@pytest.mark.parametrize(("holds", "mutant"), twins(PROPERTIES))
def test_broken_version_is_caught(holds: Property, mutant: Advantages):
    with pytest.raises(AssertionError):
        holds(subject_of(None, advantages=mutant))


@pytest.mark.trap("T3")
@pytest.mark.trap("T5")
def test_these_advantages_are_stricter_than_any_correct_ones_have_to_be():
    subject = subject_of(None, advantages=group_advantages)
    assert group_properties.groups_do_not_leak(subject).endswith("bit for bit")
    assert "±0.707" in group_properties.scaling_is_the_stated_one(subject)


# --- for every setting ------------------------------------------------------------------------------------------------


@pytest.mark.trap("T3")
@pytest.mark.trap("T4")
@pytest.mark.trap("T16")
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_settings_share_order_equality_and_failed_samples(scale: str, baseline: str):
    def advantages(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
        return group_advantages(rewards, group_ids, scale_rewards=scale, baseline=baseline)

    subject = subject_of(None, advantages=advantages)
    group_properties.order_does_not_matter(subject)
    group_properties.equal_rewards_give_exactly_zero(subject)
    group_properties.unscored_rows_change_nothing(subject)
    leakage = group_properties.groups_do_not_leak(subject)
    assert (
        "only the scale" if scale == "batch" else "bit for bit"
    ) in leakage  # a batch's deviation is shared by design


@pytest.mark.parametrize("scale", SCALES)
def test_every_group_averages_to_zero(scale: str):
    rewards, ids = unlike_groups(4)
    found = group_advantages(rewards, ids, scale_rewards=scale).reshape(4, 5)
    torch.testing.assert_close(found.mean(dim=1), torch.zeros(4, dtype=torch.float64))


def test_leave_one_out_compares_with_the_mean_of_the_others():
    rewards, ids = unlike_groups(5)
    found = group_advantages(rewards, ids, scale_rewards="none", baseline="leave_one_out")
    rows = rewards.reshape(4, 5)
    torch.testing.assert_close(found.reshape(4, 5), rows - (rows.sum(dim=1, keepdim=True) - rows) / 4)


def test_group_scale_is_trls_formula():
    rewards, ids = unlike_groups(6, groups=8, size=6)
    rows = rewards.reshape(8, 6)
    expected = (rows - rows.mean(dim=1, keepdim=True)) / (rows.std(dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, ids), expected.flatten())


def test_batch_scale_divides_by_the_deviation_of_allunlike_groups():
    rewards, ids = unlike_groups(7)
    plain = group_advantages(rewards, ids, scale_rewards="none")
    torch.testing.assert_close(group_advantages(rewards, ids, scale_rewards="batch"), plain / (rewards.std() + 1e-4))


@pytest.mark.trap("T3")
@pytest.mark.trap("T4")
def test_groups_are_told_apart_by_id_wherever_their_rows_stand_and_however_many_there_are():
    rewards, ids = torch.tensor([1.0, 10.0, 2.0, 20.0, 30.0]), torch.tensor([7, -3, 7, -3, -3])
    found = group_advantages(rewards, ids, scale_rewards="none")
    torch.testing.assert_close(found, torch.tensor([-0.5, -10.0, 0.5, 0.0, 10.0]))


@pytest.mark.trap("T16")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_group_with_no_or_one_scored_sample_teaches_nothing(scale: str, baseline: str):
    rewards = torch.tensor([torch.nan, torch.nan, torch.nan, 5.0, 1.0, 2.0])
    found = group_advantages(rewards, torch.tensor([0, 0, 1, 1, 2, 2]), scale_rewards=scale, baseline=baseline)
    assert found.isfinite().all() and not found[:4].any() and found[4:].all()


@pytest.mark.trap("T16")
def test_nothing_scored_at_all_is_zero_everywhere():
    found = group_advantages(torch.full((4,), torch.nan), torch.tensor([0, 0, 1, 1]), scale_rewards="batch")
    assert torch.equal(found, torch.zeros(4))


@pytest.mark.trap("T5")
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


# --- two processes (T15) ----------------------------------------------------------------------------------------------


def _own_part(rank: int) -> slice:
    return slice(0, 12) if rank == 0 else slice(12, 20)  # whole groups: three, and the two others


def batch_deviation_of_all_processes(rewards: torch.Tensor, group_ids: torch.Tensor, scale: str) -> torch.Tensor:
    everyone: list[torch.Tensor | None] = [None, None]
    torch.distributed.all_gather_object(everyone, rewards)
    return group_advantages(rewards, group_ids, scale_rewards=scale, batch_rewards=torch.cat(everyone))


def batch_deviation_of_each_process(rewards: torch.Tensor, group_ids: torch.Tensor, scale: str) -> torch.Tensor:
    return group_advantages(rewards, group_ids, scale_rewards=scale)


def _spread_out_rewards() -> tuple[torch.Tensor, torch.Tensor]:
    rewards, ids = unlike_groups(8, groups=5, size=4)
    rewards[[2, 17]] = torch.nan
    return rewards, ids


def _work(rank: int, folder: str) -> None:
    """One of two processes: its part of the rewards, its advantages by both ways and every scale."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rewards, ids = (values[_own_part(rank)] for values in _spread_out_rewards())
    ways = (batch_deviation_of_all_processes, batch_deviation_of_each_process)
    found = {(way.__name__, scale): way(rewards, ids, scale) for way in ways for scale in SCALES}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def by_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], torch.Tensor]:
    """What two processes compute from their parts, put together."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_work, (str(folder),), nprocs=2)
    one, other = (torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1))
    return {key: torch.cat([one[key], other[key]]) for key in one}


@pytest.mark.trap("T15")
@pytest.mark.parametrize("scale", SCALES)
def test_two_processes_get_the_advantages_of_one(by_two_processes: dict[tuple[str, str], torch.Tensor], scale: str):
    expected = group_advantages(*_spread_out_rewards(), scale_rewards=scale)
    assert torch.equal(by_two_processes["batch_deviation_of_all_processes", scale], expected)


@pytest.mark.trap("T15", broken="batch_deviation_of_each_process")
def test_deviation_of_each_process_alone_is_noticed(by_two_processes: dict[tuple[str, str], torch.Tensor]):
    expected = group_advantages(*_spread_out_rewards(), scale_rewards="batch")
    found = by_two_processes["batch_deviation_of_each_process", "batch"]
    assert float((found - expected).abs().max()) > 0.05


# --- TRL's formula as the oracle --------------------------------------------------------------------------------------


def _trls_advantages(rewards: torch.Tensor, num_generations: int, scale_rewards: str) -> torch.Tensor:
    """TRL 1.16's formula, of GRPOTrainer._generate_and_score_completions with "sum_then_normalize"; no reward is NaN.

    It stands in the midst of a method that needs models, so it is written out here: rows of a group follow each other.
    """
    grouped = rewards.view(-1, num_generations)
    mean_grouped_rewards = grouped.mean(dim=1).repeat_interleave(num_generations, dim=0)
    if scale_rewards == "batch":
        std_rewards = rewards.std().expand_as(rewards) if rewards.numel() > 1 else torch.zeros_like(rewards)
    elif num_generations > 1:
        std_rewards = grouped.std(dim=1).repeat_interleave(num_generations, dim=0)
    else:
        std_rewards = torch.zeros_like(rewards)
    advantages = rewards - mean_grouped_rewards
    if scale_rewards != "none":
        advantages = advantages / (std_rewards + 1e-4)
    return advantages


def _differs_from_trls_formula(advantages: Advantages, seed: int) -> float:
    """The largest difference on one random case: 1 to 6 groups of 1 to 8 rows, some of coarse rewards with ties."""
    source = torch.Generator().manual_seed(seed)
    groups, size = (int(torch.randint(1, top, (), generator=source)) for top in (7, 9))
    rewards, ids = unlike_groups(seed, groups, size)
    rewards = (rewards * 2).round() / 2 if seed % 4 == 0 else rewards
    scale = SCALES[seed % 3]
    mine = advantages(rewards, ids, scale_rewards=scale)
    return float((mine - _trls_advantages(rewards, size, scale)).abs().max())


def test_advantages_are_trls_in_300_random_cases():
    differences = {seed: _differs_from_trls_formula(group_advantages, seed) for seed in range(300)}
    assert max(differences.values()) <= 1e-6, max(differences, key=differences.get)


@pytest.mark.parametrize(
    "mutant",
    [functools.partial(group_advantages, eps=1e-8), functools.partial(group_advantages, baseline="leave_one_out")],
    ids=["another_eps", "another_baseline"],
)
def test_difference_from_trls_formula_is_found(mutant: Advantages):
    assert max(_differs_from_trls_formula(mutant, seed) for seed in range(30)) > 1e-4
