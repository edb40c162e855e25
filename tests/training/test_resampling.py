"""Groups without spread are drawn again, up to a limit; truncated completions are masked or punished."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from support.quick_runs import fresh, left

from grpo_kit.experiment import Experiment
from grpo_kit.grpo.advantages import group_spread
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rewards.shaping import Shaping
from grpo_kit.rollout import Rollout
from grpo_kit.training.iteration import collect, run_iteration
from grpo_kit.training.loop import make_optimizer, train
from grpo_kit.training.processes import ALONE
from grpo_kit.training.replay import replay
from grpo_kit.training.step import grpo_step


def rarely(images: list[Image.Image], prompts: list[str], enhanced_prompts: list[str]) -> list[float]:
    """1 for a long rewrite, else 0: many groups agree."""
    return [float(len(text) > 54) for text in enhanced_prompts]


def never(images: list[Image.Image], prompts: list[str], enhanced_prompts: list[str]) -> list[float]:
    """All alike."""
    return [0.5] * len(images)


def _own(kit: Experiment, reward=rarely, other: dict | None = None, **training: object) -> Experiment:
    settings = {"prompts_per_iteration": 4, "max_resampling": 3} | training
    return fresh(kit, other, **settings).with_rewards(Rewards({"reward": reward}, {"reward": 1.0}))


def test_groups_without_spread_are_drawn_again_with_other_prompts(kit: Experiment):
    own = _own(kit, max_resampling=8)
    first, found = collect(_own(kit, max_resampling=0), 1, ALONE), collect(own, 1, ALONE)
    before, after = (group_spread(rollout.rewards, rollout.group_ids) for rollout in (first, found))
    again = (before == 0).tolist()
    assert 0 < sum(again) < 4 and first.attempts is None and (after > 0).all()
    for group, was_flat in enumerate(again):
        rows = found.group_ids == group
        assert rows.sum() == 3 and (found.attempts[group] > 0) == was_flat
        assert (found.prompts[group] != first.prompts[group]) == was_flat
        if not was_flat:  # as they were, bit for bit
            assert torch.equal(found.rewards[rows], first.rewards[rows])
            ids = first.completion_ids[rows][first.completion_mask[rows]]
            assert torch.equal(found.completion_ids[rows][found.completion_mask[rows]], ids)
    texts = {prompt.user_prompt for prompt in found.prompts}
    assert len(texts) == 4 and found.completion_mask.any(dim=0).all()
    assert found.metrics()["resampled_groups"] == found.attempts.sum() and len(found.images) == 12
    assert [len(found.enhanced_prompts), *found.image_seeds.shape, *found.old_logprobs.shape[:1]] == [12, 12, 1, 12]


def test_the_limit_holds_and_is_counted(kit: Experiment):
    found = collect(_own(kit, never, max_resampling=2), 1, ALONE)
    assert found.attempts.tolist() == [2] * 4 and found.metrics()["resampled_groups"] == 8
    assert found.metrics()["frac_reward_zero_std"] == 1


def test_where_there_are_no_other_prompts_the_seeds_are_others(kit: Experiment):
    own = dataclasses.replace(_own(kit, never, max_resampling=1), train_prompts=kit.train_prompts[:2])
    first = collect(dataclasses.replace(own, config=_own(kit, max_resampling=0).config), 1, ALONE)
    found = collect(own, 1, ALONE)
    assert {prompt.user_prompt for prompt in found.prompts} <= {prompt.user_prompt for prompt in kit.train_prompts[:2]}
    assert found.enhanced_prompts != first.enhanced_prompts and not torch.equal(found.image_seeds, first.image_seeds)


@pytest.mark.slow
@pytest.mark.parametrize("seen", [False, True])
def test_a_run_with_groups_drawn_again_goes_on_and_is_replayed_bit_for_bit(kit: Experiment, tmp_path: Path, seen: bool):
    changes = {"prompts_per_iteration": 3, "group_size": 2, "max_resampling": 2, "num_iterations": 2}
    floor = {
        "reward_noise_floor": 0.2,
        "validate_every": 1,
    }  # which counts as none
    other = {"model_settings.use_image": seen}

    def own() -> Experiment:
        return fresh(kit, other, **changes, **floor)

    train(own(), tmp_path / "whole", progress=False)
    train(own(), tmp_path / "parts", progress=False, until=1)
    train(own(), tmp_path / "parts", progress=False)
    assert left(tmp_path / "parts") == left(tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    kept = pd.read_parquet(tmp_path / "whole" / "rollouts" / "iter_000002.parquet")
    assert rows[1]["resampled_groups"] == kept.groupby("group_id")["attempt"].first().sum() > 0
    assert replay(tmp_path / "whole", 2, kit=own(), progress=False).equal


def test_running_statistics_take_in_only_what_is_trained_on(kit: Experiment):
    own = _own(kit)
    rewards = Rewards({"reward": rarely}, {"reward": 1.0}, shaping={"reward": Shaping("running")})
    own = own.with_rewards(rewards)
    found = collect(own, 1, ALONE)
    assert found.attempts.sum() > 0 and own.rewards.state_dict()["reward"][0] == len(found.rewards)


# --- truncated completions --------------------------------------------------------------------------------------------


def _truncating(kit: Experiment, **training: object) -> Experiment:
    """Some completions of a group end by the limit, some before."""
    own = fresh(kit, {"generation_settings.max_new_tokens": 12}, group_size=6, **training)
    own.policy.max_new_tokens = 12
    return own


def _rollout(own: Experiment) -> Rollout:
    found = collect(own, 1, ALONE)
    assert 0 < found.truncated.sum() < len(found.truncated)
    return found


def _flat(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def _gradient(own: Experiment, rollout: Rollout) -> torch.Tensor:
    given: list[torch.Tensor] = []
    optimizer = make_optimizer(own, own.config)
    parameters = own.policy.trainable_parameters()
    optimizer.register_step_pre_hook(lambda *_: given.append(_flat(parameters)))
    grpo_step(own.policy, optimizer, rollout, own.config)
    return given[0] if given else torch.zeros(1)


def test_masked_truncated_completions_carry_no_loss_as_in_trl(kit: Experiment):
    masked = {"mask_truncated_completions": True, "max_grad_norm": 1e9}
    rollout = _rollout(_truncating(kit))
    kept = _gradient(_truncating(kit, **masked), rollout)
    assert not torch.equal(kept, _gradient(_truncating(kit, max_grad_norm=1e9), rollout))
    other = rollout.completion_ids.clone()
    other[rollout.truncated] = 5  # whatever they say
    logprobs = rollout.old_logprobs.where(~rollout.truncated[:, None], torch.tensor(-1.0))
    changed = dataclasses.replace(rollout, completion_ids=other, old_logprobs=logprobs)
    assert torch.allclose(_gradient(_truncating(kit, **masked), changed), kept, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_where_all_are_truncated_nothing_is_learned_and_nothing_breaks(kit: Experiment, beta: float):
    own = _truncating(kit, mask_truncated_completions=True, beta=beta)
    rollout = dataclasses.replace(_rollout(own), truncated=torch.ones(12, dtype=torch.bool))
    before = [p.clone() for p in own.policy.trainable_parameters()]
    stats = grpo_step(own.policy, make_optimizer(own, own.config), rollout, own.config)
    assert (stats.updates, stats.skipped, stats.metrics["loss"]) == (0, 0, 0.0)
    assert all(map(torch.equal, before, own.policy.trainable_parameters()))


def test_the_penalty_lowers_what_is_trained_on_and_not_what_is_logged_as_the_reward(kit: Experiment, tmp_path: Path):
    plain, own = _rollout(_truncating(kit)), _truncating(kit, truncation_penalty=0.5)
    found, stats = run_iteration(own, make_optimizer(own, own.config), 1)
    assert torch.equal(found.rewards, plain.rewards - 0.5 * plain.truncated)
    assert stats.metrics["reward"] == plain.metrics()["reward"]
    spoilt = stats.advantages[found.truncated].mean()
    assert spoilt < 0 < stats.advantages[~found.truncated].mean()
