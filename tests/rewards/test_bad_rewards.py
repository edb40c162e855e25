"""What a reward that is not finite leads to, as `on_bad_reward` says (CORRECTNESS.md T16)."""

import dataclasses
import math

import pytest
import torch

from grpo_kit.config import KitError, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.models.policy import Policy
from grpo_kit.rewards import usable_rewards
from grpo_kit.rollout import Rollout
from grpo_kit.training.step import grpo_step

IDS = torch.tensor([0, 0, 0, 1, 1, 1])
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    ("on_bad_reward", "left"), [("drop_sample", [0, 2, 3, 4, 5]), ("drop_group", [3, 4, 5])], ids=["sample", "group"]
)
def test_sample_or_group_is_left_out(value: float, on_bad_reward: str, left: list[int]):
    rewards = torch.tensor([1.0, value, 3.0, 4.0, 5.0, 6.0])
    found = usable_rewards(rewards, IDS, on_bad_reward)
    assert torch.equal(found[left], rewards[left])
    assert found.isnan().sum() == 6 - len(left)


@pytest.mark.parametrize("value", BAD)
def test_raise_names_the_row_the_value_and_what_to_do(value: float):
    rewards = torch.tensor([1.0, 2.0, 3.0, value, 5.0, value])
    with pytest.raises(KitError, match=r"rewards: found (nan|-?inf) in row 3 \(2 of 6 rows.*drop_sample") as error:
        usable_rewards(rewards, IDS, "raise")
    assert "\n" not in str(error.value)


def test_raise_names_the_reward_that_is_to_blame():
    rewards, parts = torch.tensor([1.0, 2.0, math.nan, 4.0, 5.0, math.nan]), {"clip": torch.arange(6.0)}
    for bad, named in ((2, "row 2 .*, from sharp; mend"), (5, "row 2 .*not finite.; mend")):
        parts["sharp"] = torch.arange(6.0).masked_fill(torch.arange(6) == bad, math.nan)
        with pytest.raises(KitError, match=named):
            usable_rewards(rewards, IDS, "raise", parts)
    assert torch.equal(usable_rewards(parts["clip"], IDS, "raise", parts), parts["clip"])


@pytest.mark.parametrize("on_bad_reward", ["raise", "drop_sample", "drop_group"])
def test_usable_rewards_stay_as_they_are(on_bad_reward: str):
    rewards = torch.tensor([1.0, -2.0, 3e38, 0.0, 5.0, 6.0])
    assert torch.equal(usable_rewards(rewards, IDS, on_bad_reward), rewards)


def test_unknown_choice_is_one_line():
    with pytest.raises(ValueError, match="on_bad_reward: found 'ignore', allowed: 'raise'"):
        usable_rewards(torch.ones(6), IDS, "ignore")


def _step(policy: Policy, rollout: Rollout, kit: Experiment, rewards: torch.Tensor, on_bad_reward: str):
    config = load_config(kit.config, {"training_settings.on_bad_reward": on_bad_reward})
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-3)
    return grpo_step(policy, optimizer, dataclasses.replace(rollout, rewards=rewards), config)


def _rewards(bad: dict[int, float]) -> torch.Tensor:
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, value in bad.items():
        rewards[row] = value
    return rewards


@pytest.mark.parametrize(("on_bad_reward", "unscored"), [("drop_sample", 2), ("drop_group", 8)])
def test_step_leaves_out_counts_and_stays_finite(
    own_policy: Policy, rollout: Rollout, kit: Experiment, on_bad_reward: str, unscored: int
):
    stats = _step(own_policy, rollout, kit, _rewards({0: math.inf, 5: math.nan}), on_bad_reward)
    assert stats.metrics["unscored"] == unscored == int((stats.advantages == 0).sum())
    assert stats.updates == 2 and stats.metrics["grad_norm"] > 0
    assert all(p.isfinite().all() for p in own_policy.trainable_parameters())


def test_step_that_raises_changes_nothing(own_policy: Policy, rollout: Rollout, kit: Experiment):
    before = [p.detach().clone() for p in own_policy.trainable_parameters()]
    with pytest.raises(KitError, match="row 5"):
        _step(own_policy, rollout, kit, _rewards({5: math.nan}), "raise")
    assert all(torch.equal(a, b) for a, b in zip(before, own_policy.trainable_parameters(), strict=True))


def test_noise_below_the_floor_teaches_nothing(own_policy: Policy, rollout: Rollout, kit: Experiment):
    config = load_config(kit.config, {"training_settings.beta": 0.0, "training_settings.reward_noise_floor": 0.01})
    rewards = torch.cat([0.5 + 0.009 * torch.rand(8, dtype=torch.float64), _rewards({})[8:]])
    optimizer = torch.optim.SGD(own_policy.trainable_parameters(), lr=0.1)
    stats = grpo_step(own_policy, optimizer, dataclasses.replace(rollout, rewards=rewards), config)
    assert not stats.advantages[:8].any() and stats.advantages[8:].all()
    without = load_config(config, {"training_settings.reward_noise_floor": 0.0})
    stats = grpo_step(own_policy, optimizer, dataclasses.replace(rollout, rewards=rewards), without)
    assert stats.advantages[:8].all()  # and as loud as real differences
