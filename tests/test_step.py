"""One GRPO step on the embedded policy (CORRECTNESS.md T1, T2, T13, T14, T16, T17, T20, T21, T23)."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch

from grpo_kit.config import Config, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.grpo import LOSS_TYPES, grpo_step
from grpo_kit.grpo import step as step_module
from grpo_kit.models.policy import Policy, load_policy
from grpo_kit.rollout import Rollout, collect_rollout

NO_LIMIT = 1e9


class Watched(torch.optim.SGD):
    """Keeps every gradient that it is given, and changes nothing."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.trainable_parameters(), lr=0.0)
        self.gradients: list[torch.Tensor] = []

    def step(self, closure: None = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        given = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.gradients.append(torch.cat([gradient.flatten() for gradient in given]))


def _config(kit: Experiment, **training: object) -> Config:
    """The tiny profile with one update and no clipping of the gradient, so that a step's gradient can be read."""
    plain = {"updates_per_rollout": 1, "max_grad_norm": NO_LIMIT, "beta": 0.0}
    return load_config(kit.config, {f"training_settings.{name}": value for name, value in (plain | training).items()})


def _gradient(policy: Policy, rollout: Rollout, config: Config) -> torch.Tensor:
    watched = Watched(policy)
    grpo_step(policy, watched, rollout, config)
    return watched.gradients[0]


def _weights(policy: Policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()]).clone()


def _with_rewards(rollout: Rollout, rewards: list[float]) -> Rollout:
    return dataclasses.replace(rollout, rewards=torch.tensor(rewards, dtype=torch.float64))


def _drifted(rollout: Rollout) -> Rollout:
    """As if the policy had moved since it sampled: ratios on both sides of the clip."""
    noise = torch.randn(rollout.old_logprobs.shape, generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(rollout, old_logprobs=rollout.old_logprobs + 0.2 * noise * rollout.completion_mask)


FLAT = [1.0] * 4 + [2.0] * 4 + [3.0] * 4
VARIED = [0.1, 0.5, 0.2, 0.9, 0.3, 0.3, 0.8, 0.1, 0.7, 0.2, 0.4, 0.6]


# --- the gradient -----------------------------------------------------------------------------------------------------


def _worst_split(
    policy: Policy, rollout: Rollout, kit: Experiment, sizes: tuple[int, ...], **training: object
) -> float:
    """By how much of its length the gradient differs between one batch and micro-batches."""
    whole = _gradient(policy, rollout, _config(kit, **training))
    parts = [_gradient(policy, rollout, _config(kit, micro_batch_size=size, **training)) for size in sizes]
    return max(float((part - whole).norm() / whole.norm()) for part in parts)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_do_not_change_the_gradient(
    own_policy: Policy, rollout: Rollout, kit: Experiment, loss_type: str
):
    settings = {"loss_type": loss_type, "beta": 0.1, "epsilon_high": 5.0 if loss_type == "cispo" else None}
    drifted = _drifted(_with_rewards(rollout, VARIED))
    assert _worst_split(own_policy, drifted, kit, (1, 5, 8), **settings) < 1e-4
    settings["importance_sampling_level"] = "sequence"
    assert _worst_split(own_policy, drifted, kit, (5,), **settings) < 1e-4


@pytest.mark.parametrize(
    "level",
    [
        "token",
        "sequence",
    ],
)
def test_micro_batches_do_not_change_what_is_logged(own_policy: Policy, rollout: Rollout, kit: Experiment, level: str):
    drifted = _drifted(_with_rewards(rollout, VARIED))
    settings = {"beta": 0.1, "epsilon": 0.02, "importance_sampling_level": level}
    whole, parts = (
        grpo_step(own_policy, Watched(own_policy), drifted, _config(kit, micro_batch_size=size, **settings)).metrics
        for size in (None, 5)
    )
    assert whole["clip_ratio/region_mean"] > 0
    for name in whole:
        assert "time" in name or whole[name] == pytest.approx(parts[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_micro_batches_that_weigh_by_themselves_are_noticed(
    own_policy: Policy, rollout: Rollout, kit: Experiment, loss_type: str, monkeypatch: pytest.MonkeyPatch
):
    whole = step_module._loss
    monkeypatch.setattr(
        step_module, "_loss", lambda scores, batch, settings: whole(scores, _reweighed(batch, settings), settings)
    )
    rewards = _with_rewards(rollout, VARIED)
    assert _worst_split(own_policy, rewards, kit, (5,), loss_type=loss_type) > 1e-2


def _reweighed(batch: object, settings: object) -> object:
    weights = step_module.token_weights(batch.mask, settings.loss_type, 40)
    return dataclasses.replace(batch, weights=weights)


def test_micro_batches_agree_where_the_policy_sees_pictures(own_policy: Policy, kit: Experiment):
    seen = collect_rollout(own_policy, kit.generator, kit.rewards, kit.train_prompts[:2], 3, seed=1, use_image=True)
    seen = _with_rewards(seen, VARIED[:6])
    assert _worst_split(own_policy, seen, kit, (1, 4), beta=0.1) < 1e-4
    blind = dataclasses.replace(seen, prompt_images=None)
    whole, other = (_gradient(own_policy, r, _config(kit)) for r in (seen, blind))
    assert float((whole - other).norm() / whole.norm()) > 1e-2


def test_gradient_without_pull_ignores_the_reference(own_policy: Policy, rollout: Rollout, kit: Experiment):
    rewards = _with_rewards(rollout, VARIED)
    other = dataclasses.replace(rewards, ref_logprobs=torch.full_like(rollout.old_logprobs, -3.0))
    assert torch.equal(_gradient(own_policy, rewards, _config(kit)), _gradient(own_policy, other, _config(kit)))
    pulled = [_gradient(own_policy, r, _config(kit, beta=0.1)) for r in (rewards, other)]
    assert not torch.equal(*pulled)


def test_first_loss_is_zero_and_yet_it_learns(own_policy: Policy, rollout: Rollout, kit: Experiment):
    stats = grpo_step(own_policy, Watched(own_policy), _with_rewards(rollout, VARIED), _config(kit))
    assert abs(stats.metrics["loss"]) < 1e-4 < 0.01 < stats.metrics["grad_norm"]
    assert stats.metrics["clip_ratio/region_mean"] == 0 and stats.updates == 1


def test_step_makes_good_rewrites_likelier_and_bad_ones_less_likely(
    own_policy: Policy, rollout: Rollout, kit: Experiment
):
    def total(row: int) -> float:
        part = [row]
        prompts = [rollout.prompts[rollout.group_ids[row]].user_prompt]
        ids, mask = rollout.completion_ids[part], rollout.completion_mask[part]
        with torch.no_grad():
            return float(own_policy.score(prompts, torch.tensor([0]), ids, mask).logprobs.sum())

    assert len(set(rollout.enhanced_prompts[:4])) == 4
    rewards = _with_rewards(rollout, [1.0, 0.0, 0.0, 0.0] + [0.0] * 8)
    before = [total(row) for row in (0, 1, 2)]
    optimizer = torch.optim.SGD(own_policy.trainable_parameters(), lr=0.05)
    grpo_step(own_policy, optimizer, rewards, _config(kit, max_grad_norm=1.0))
    after = [total(row) for row in (0, 1, 2)]
    assert after[0] > before[0] and sum(after[1:]) < sum(before[1:])


# --- when there is nothing to learn -----------------------------------------------------------------------------------


def _moved_by_a_flat_rollout(policy: Policy, rollout: Rollout, config: Config, step: Callable = grpo_step) -> bool:
    """Whether equal rewards move weights, once the optimizer has momentum and decay to move them with."""
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-3, weight_decay=0.1)
    step(policy, optimizer, _with_rewards(rollout, VARIED), config)
    before = _weights(policy)
    step(policy, optimizer, _with_rewards(rollout, FLAT), config)
    return not torch.equal(_weights(policy), before)


def _always_stepping(policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout, config: Config) -> None:
    stats = grpo_step(policy, optimizer, rollout, config)
    if stats.updates == 0:
        for parameter in policy.trainable_parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def test_flat_groups_leave_every_weight_as_it_is(own_policy: Policy, rollout: Rollout, kit: Experiment):
    assert not _moved_by_a_flat_rollout(own_policy, rollout, _config(kit))
    assert _moved_by_a_flat_rollout(own_policy, rollout, _config(kit), _always_stepping)
    stats = grpo_step(own_policy, Watched(own_policy), _with_rewards(rollout, FLAT), _config(kit))
    assert (stats.updates, stats.metrics["frac_reward_zero_std"], stats.metrics["reward_std"]) == (0, 1.0, 0.0)


def test_flat_groups_are_still_pulled_to_the_reference(own_policy: Policy, rollout: Rollout, kit: Experiment):
    assert _moved_by_a_flat_rollout(own_policy, rollout, _config(kit, beta=0.1))


def test_rollout_in_which_nothing_was_scored_changes_nothing(own_policy: Policy, rollout: Rollout, kit: Experiment):
    watched = Watched(own_policy)
    stats = grpo_step(own_policy, watched, _with_rewards(rollout, [torch.nan] * 12), _config(kit, beta=0.1))
    assert not watched.gradients and stats.updates == 0
    assert stats.metrics["unscored"] == 12 and stats.metrics["reward"] != stats.metrics["reward"]


# --- failed samples (T16) ---------------------------------------------------------------------------------------------


def _without(rollout: Rollout, rows: list[int]) -> Rollout:
    """The rollout as if some rows had never been sampled."""
    keep = [row for row in range(12) if row not in rows]
    per_row = ("group_ids", "completion_ids", "completion_mask", "image_seeds", "rewards", "old_logprobs", "truncated")
    parts = {name: getattr(rollout, name)[keep] for name in per_row}
    parts["reward_parts"] = {name: values[keep] for name, values in rollout.reward_parts.items()}
    parts["enhanced_prompts"] = [rollout.enhanced_prompts[row] for row in keep]
    return dataclasses.replace(rollout, images=[rollout.images[row] for row in keep], **parts)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("failed", [[1, 6], [4, 5, 6, 7]], ids=["some", "a whole group"])
def test_failed_samples_are_as_if_they_had_not_been_sampled(
    own_policy: Policy, rollout: Rollout, kit: Experiment, loss_type: str, failed: list[int]
):
    config = _config(kit, loss_type=loss_type, beta=0.1)
    spoiled = _with_rewards(rollout, [torch.nan if row in failed else r for row, r in enumerate(VARIED)])
    found = _gradient(own_policy, spoiled, config)
    expected = _gradient(own_policy, _without(_with_rewards(rollout, VARIED), failed), config)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    as_zero = dataclasses.replace(spoiled, rewards=spoiled.rewards.nan_to_num(0.0))
    assert float((_gradient(own_policy, as_zero, config) - expected).norm() / expected.norm()) > 1e-2


def test_failed_samples_are_counted(own_policy: Policy, rollout: Rollout, kit: Experiment):
    spoiled = _with_rewards(rollout, [torch.nan, torch.nan, *VARIED[2:]])
    stats = grpo_step(own_policy, Watched(own_policy), spoiled, _config(kit))
    assert stats.metrics["unscored"] == 2
    assert stats.metrics["reward"] == pytest.approx(sum(VARIED[2:]) / 10)
    assert not stats.advantages[:2].any()


# --- nothing is hidden ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradient_that_is_not_finite_is_not_applied_and_counted(
    own_policy: Policy, rollout: Rollout, kit: Experiment, value: float
):
    before = _weights(own_policy)
    hook = own_policy.model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * value)
    optimizer = torch.optim.AdamW(own_policy.trainable_parameters(), lr=1e-3)
    stats = grpo_step(own_policy, optimizer, _with_rewards(rollout, VARIED), _config(kit, updates_per_rollout=2))
    assert (stats.updates, stats.skipped, stats.metrics["skipped_updates"]) == (0, 2, 2.0)
    assert torch.equal(_weights(own_policy), before)
    assert all(parameter.grad is None for parameter in own_policy.trainable_parameters())
    hook.remove()
    assert grpo_step(own_policy, optimizer, _with_rewards(rollout, VARIED), _config(kit)).updates == 1
    assert not torch.equal(_weights(own_policy), before) and _weights(own_policy).isfinite().all()


def test_error_in_scoring_surfaces(own_policy: Policy, rollout: Rollout, kit: Experiment):
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    own_policy.score = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        grpo_step(own_policy, Watched(own_policy), _with_rewards(rollout, VARIED), _config(kit))


def test_gradient_is_clipped_to_its_limit_and_reported_unclipped(own_policy: Policy, rollout: Rollout, kit: Experiment):
    watched = Watched(own_policy)
    stats = grpo_step(own_policy, watched, _with_rewards(rollout, VARIED), _config(kit, max_grad_norm=0.01))
    assert float(watched.gradients[0].norm()) == pytest.approx(0.01, rel=1e-3)
    assert stats.metrics["grad_norm"] > 0.02


# --- several updates, and the reference -------------------------------------------------------------------------------


def test_kl_is_zero_before_the_first_update_and_grows_while_the_reference_stays(
    own_policy: Policy, rollout: Rollout, kit: Experiment
):
    reference = copy.deepcopy(own_policy.reference.state_dict())
    optimizer = torch.optim.AdamW(own_policy.trainable_parameters(), lr=1e-3)
    rewards, config = _with_rewards(rollout, VARIED), _config(kit, beta=0.04, max_grad_norm=1.0)
    kl = [grpo_step(own_policy, optimizer, rewards, config).metrics["kl"] for _ in range(4)]
    assert kl[0] == pytest.approx(0, abs=1e-9) and 1e-6 < kl[1] < kl[3]
    for name, value in own_policy.reference.state_dict().items():
        assert torch.equal(value, reference[name])


def test_several_updates_go_on_from_the_rollouts_own_log_probabilities(
    own_policy: Policy, rollout: Rollout, kit: Experiment
):
    optimizer = torch.optim.SGD(own_policy.trainable_parameters(), lr=2.0)
    config = _config(kit, updates_per_rollout=4, max_grad_norm=1.0)
    stats = grpo_step(own_policy, optimizer, _with_rewards(rollout, VARIED), config)
    assert stats.updates == 4
    assert stats.metrics["clip_ratio/region_mean"] > 0  # later updates see ratios that have moved


def test_kl_starts_at_zero_with_an_adapter_that_has_dropout(kit: Experiment, rollout: Rollout):
    lora = {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    config = load_config(_config(kit, beta=0.1), {"model_settings.lora": lora})
    adapted = load_policy(config)
    adapted.model.train()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    rewards = _with_rewards(rollout, VARIED)
    kl = [grpo_step(adapted, optimizer, rewards, config).metrics["kl"] for _ in range(2)]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[1] > 1e-6


def test_metrics_carry_trls_names(own_policy: Policy, rollout: Rollout, kit: Experiment):
    stats = grpo_step(own_policy, Watched(own_policy), rollout, _config(kit, beta=0.1))
    assert set(stats.metrics) >= {
        "loss", "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "grad_norm",
        "completions/mean_length", "completions/clipped_ratio", "clip_ratio/low_mean", "clip_ratio/high_mean",
        "clip_ratio/region_mean", "rewards/clip_similarity/mean", "rewards/clip_similarity/std", "rewards/gold/mean",
    }  # fmt: skip
    lengths = rollout.completion_mask.sum(dim=1).float()
    assert stats.metrics["completions/mean_length"] == pytest.approx(float(lengths.mean()))
    assert stats.metrics["reward"] == pytest.approx(float(rollout.rewards.mean()))
    groups = rollout.rewards.reshape(3, 4)
    assert stats.metrics["reward_std"] == pytest.approx(float(groups.std(dim=1).mean()))
    assert stats.metrics["entropy"] > 0
