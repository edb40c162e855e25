"""One GRPO step on the embedded policy: with words and with pictures, all weights and an adapter, always with dropout.

CORRECTNESS.md T1, T2, T5, T10, T12 to T14, T16, T17, T20, T21, T23 and T25.
"""

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import pytest
import torch
from support.broken_twins import broken_versions
from support.policy_forms import Form

from grpo_kit.config import Config, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.grpo import LOSS_TYPES, LossOutput, grpo_loss, token_weights
from grpo_kit.grpo import loss as loss_module
from grpo_kit.models import policy as policy_module
from grpo_kit.models.conversation import conversations
from grpo_kit.models.policy import Policy, Scores
from grpo_kit.rollout import Rollout
from grpo_kit.training import step as step_module
from grpo_kit.training.step import grpo_step

NO_LIMIT = 1e9
ROUNDING = 1e-5  # of float32 log-probabilities, which sampling and scoring add up in another order


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


def _far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of `found` from `expected`, in lengths of `expected`."""
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def _logprobs(policy: Policy, rollout: Rollout, **options: bool) -> torch.Tensor:
    """What the policy makes of a whole rollout now."""
    rows = rollout.group_ids, rollout.completion_ids, rollout.completion_mask
    return policy.score(rollout.asked(), *rows, **options).logprobs


@contextmanager
def _losing(loss: Callable[..., LossOutput]) -> Iterator[None]:
    """A step that computes another loss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "grpo_loss", loss)
        yield


@contextmanager
def _dropout_left_on() -> Iterator[None]:
    """A policy that samples and scores in the mode that it finds its model in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "evaluating", lambda model: nullcontext())
        yield


FLAT = [1.0] * 4 + [2.0] * 4 + [3.0] * 4
VARIED = [0.1, 0.5, 0.2, 0.9, 0.3, 0.3, 0.8, 0.1, 0.7, 0.2, 0.4, 0.6]


@pytest.fixture
def varied(form: Form) -> Rollout:
    """What the policy sampled, with rewards that differ."""
    return _with_rewards(form.rollout, VARIED)


# --- before the first update (T1, T12, T13, T21, T25) -----------------------------------------------------------------


def _first_ratio(policy: Policy, rollout: Rollout, kit: Experiment, **training: object) -> tuple[float, float]:
    """Largest distance of new from old log-probabilities in a step's first loss, and the share of clipped tokens."""
    seen = []

    def listening(logprobs: torch.Tensor, *args: object, **options: object) -> LossOutput:
        seen.append(float((logprobs.detach() - options["old_logprobs"]).abs().max()))
        return grpo_loss(logprobs, *args, **options)

    with _losing(listening):
        stats = grpo_step(policy, Watched(policy), rollout, _config(kit, **training))
    return max(seen), stats.metrics["clip_ratio/region_mean"]


@pytest.mark.trap("T1")
@pytest.mark.parametrize("size", [None, 5])
def test_before_the_first_update_the_ratio_is_1(form: Form, varied: Rollout, kit: Experiment, size: int | None):
    assert _first_ratio(form.policy, varied, kit, micro_batch_size=size) == (0.0, 0.0)


@pytest.mark.trap("T1")
@pytest.mark.trap("T8")
@pytest.mark.trap("T13")
def test_what_was_recorded_in_sampling_is_what_scoring_gives(form: Form, varied: Rollout):
    assert form.policy.model.training
    assert float((_logprobs(form.policy, varied) - varied.old_logprobs).abs().max()) <= ROUNDING


@pytest.mark.trap("T1")
def test_disagreement_of_sampling_and_scoring_is_logged_and_not_smoothed_over(
    form: Form, varied: Rollout, kit: Experiment
):
    name = "sampling/sampling_logp_difference/max"
    assert 0 <= grpo_step(form.policy, Watched(form.policy), varied, _config(kit)).metrics[name] <= ROUNDING
    form.policy.temperature = 1.001
    metrics = grpo_step(form.policy, Watched(form.policy), varied, _config(kit, epsilon=1e-4)).metrics
    form.policy.temperature = 1.0
    assert metrics[name] > 20 * ROUNDING and metrics["clip_ratio/region_mean"] > 0


def _sampled_again(policy: Policy, rollout: Rollout) -> Rollout:
    """Other rewrites of the same prompts, as this policy samples and records them."""
    found = policy.sample(rollout.asked(), 4, seed=1)
    return dataclasses.replace(
        rollout, completion_ids=found.ids, completion_mask=found.mask, old_logprobs=found.logprobs,
        enhanced_prompts=found.texts,
    )  # fmt: skip


def another_temperature(policy: Policy, rollout: Rollout) -> Rollout:
    policy.temperature = 1.3
    sampled = _sampled_again(policy, rollout)
    policy.temperature = 1.0
    return sampled


def another_policy(policy: Policy, rollout: Rollout) -> Rollout:
    other = copy.deepcopy(policy)
    for parameter in other.trainable_parameters():
        parameter.data.mul_(1.1)
    return _sampled_again(other, rollout)


def dropout_in_sampling(policy: Policy, rollout: Rollout) -> Rollout:
    torch.manual_seed(0)
    with _dropout_left_on():
        return _sampled_again(policy, rollout)


def without_the_picture(policy: Policy, rollout: Rollout) -> Rollout:
    """Words in place of pictures, and pictures in place of words."""
    words, pictures = [prompt.user_prompt for prompt in rollout.prompts], [row[0] for row in rollout.images[::4]]
    others = conversations(words, pictures) if rollout.contexts is None else conversations(words)
    sampled = _sampled_again(policy, dataclasses.replace(rollout, contexts=others))
    return dataclasses.replace(sampled, contexts=rollout.contexts)


def text_tokenised_again(policy: Policy, rollout: Rollout) -> Rollout:
    """What was sampled hot, so that it is not what the tokenizer would write, given to the step as text."""
    policy.temperature = 3.0
    hot = _sampled_again(policy, rollout)
    rows = policy.tokenizer(hot.enhanced_prompts, add_special_tokens=False).input_ids
    width = hot.completion_ids.shape[1]
    ids = [(row + [policy.eos_token_ids[0]] * width)[:width] for row in rows]
    return dataclasses.replace(hot, completion_ids=torch.tensor(ids))


DISAGREEING = {
    another_temperature: "T1 T8",
    another_policy: "T1",
    dropout_in_sampling: "T1 T13",
    without_the_picture: "T1",
    text_tokenised_again: "T12",
}


@pytest.mark.parametrize("spoil", broken_versions(DISAGREEING))
def test_sampling_that_scoring_does_not_agree_with_is_seen(
    form: Form, varied: Rollout, kit: Experiment, spoil: Callable[[Policy, Rollout], Rollout]
):
    assert _first_ratio(form.policy, _sampled_again(form.policy, varied), kit)[0] == 0
    assert _first_ratio(form.policy, spoil(form.policy, varied), kit)[0] > 1e-2


@pytest.mark.trap("T12")
def test_ids_are_trained_on_as_they_were_sampled_whatever_the_text_says(form: Form, varied: Rollout, kit: Experiment):
    form.policy.temperature = 3.0
    hot = _sampled_again(form.policy, varied)
    again = form.policy.tokenizer(hot.enhanced_prompts, add_special_tokens=False).input_ids
    assert again != [row[kept].tolist()[:-1] for row, kept in zip(hot.completion_ids, hot.completion_mask, strict=True)]
    assert _first_ratio(form.policy, hot, kit) == (0.0, 0.0)
    other_text = dataclasses.replace(hot, enhanced_prompts=["a cat"] * 12)
    assert torch.equal(*(_gradient(form.policy, r, _config(kit)) for r in (hot, other_text)))


@pytest.mark.trap("T13")
@pytest.mark.trap("T13", broken="dropout_left_on")
def test_two_scorings_in_training_mode_agree(form: Form, varied: Rollout):
    assert form.policy.model.training
    assert torch.equal(*(_logprobs(form.policy, varied) for _ in range(2)))
    assert form.policy.model.training
    with _dropout_left_on():
        assert float((_logprobs(form.policy, varied) - _logprobs(form.policy, varied)).abs().max()) > 1e-3


def _learns(policy: Policy, rollout: Rollout, kit: Experiment) -> bool:
    """Whether one inner update with beta 0 has a loss of nearly 0 and a gradient all the same."""
    metrics = grpo_step(policy, Watched(policy), rollout, _config(kit)).metrics
    return abs(metrics["loss"]) < 1e-6 and metrics["grad_norm"] > 0.01


def surrogate_without_gradient(logprobs: torch.Tensor, *args: object, **options: object) -> LossOutput:
    output = grpo_loss(logprobs.detach(), *args, **options)
    return LossOutput(output.loss + 0.0 * logprobs.sum(), output.metrics)


def nothing_learned_from_a_loss_of_0(*args: object, **options: object) -> LossOutput:
    output = grpo_loss(*args, **options)
    return LossOutput(output.loss * (abs(float(output.loss.detach())) > 1e-6), output.metrics)


@pytest.mark.trap("T21")
@pytest.mark.trap("T17")
def test_first_loss_is_zero_and_yet_it_learns(form: Form, varied: Rollout, kit: Experiment):
    assert _learns(form.policy, varied, kit)


@pytest.mark.parametrize(
    "mutant", broken_versions({surrogate_without_gradient: "T21", nothing_learned_from_a_loss_of_0: "T21"})
)
def test_loss_that_does_not_learn_is_noticed(
    form: Form, varied: Rollout, kit: Experiment, mutant: Callable[..., LossOutput]
):
    with _losing(mutant):
        assert not _learns(form.policy, varied, kit)


def _stays_finite(policy: Policy, rollout: Rollout, kit: Experiment) -> bool:
    """Whether log-ratios of ±100 leave loss and gradient finite, whatever the advantage's sign."""
    norms = []
    for shift in (100.0, -100.0):
        far = dataclasses.replace(rollout, old_logprobs=rollout.old_logprobs + shift * rollout.completion_mask)
        stats = grpo_step(policy, Watched(policy), far, _config(kit, beta=0.1))
        norms += [stats.metrics["loss"], stats.metrics["grad_norm"]]
    return bool(torch.tensor(norms).isfinite().all())


@pytest.mark.trap("T25")
@pytest.mark.trap("T25", broken="plain_exp")
def test_ratios_that_are_far_off_leave_the_step_finite(
    form: Form, varied: Rollout, kit: Experiment, monkeypatch: pytest.MonkeyPatch
):
    assert _stays_finite(form.policy, varied, kit)
    monkeypatch.setattr(loss_module, "bounded_exp", torch.exp)
    assert not _stays_finite(form.policy, varied, kit)


# --- the gradient -----------------------------------------------------------------------------------------------------


def _worst_split(
    policy: Policy, rollout: Rollout, kit: Experiment, sizes: tuple[int, ...], **training: object
) -> float:
    """By how much of its length the gradient differs between one batch and micro-batches."""
    whole = _gradient(policy, rollout, _config(kit, **training))
    parts = [_gradient(policy, rollout, _config(kit, micro_batch_size=size, **training)) for size in sizes]
    return max(float((part - whole).norm() / whole.norm()) for part in parts)


@pytest.mark.trap("T14")
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_do_not_change_the_gradient(
    own_policy: Policy, rollout: Rollout, kit: Experiment, loss_type: str
):
    settings = {"loss_type": loss_type, "beta": 0.1, "epsilon_high": 5.0 if loss_type == "cispo" else None}
    drifted = _drifted(_with_rewards(rollout, VARIED))
    assert _worst_split(own_policy, drifted, kit, (1, 5, 8), **settings) < 1e-4
    settings["importance_sampling_level"] = "sequence"
    assert _worst_split(own_policy, drifted, kit, (5,), **settings) < 1e-4


@pytest.mark.trap("T14")
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_micro_batches_agree_on_every_form_of_policy(form: Form, varied: Rollout, kit: Experiment, loss_type: str):
    assert _worst_split(form.policy, _drifted(varied), kit, (1, 5), loss_type=loss_type, beta=0.1) < 1e-4


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


@pytest.mark.trap("T14", broken="parts_weighed_by_themselves")
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_micro_batches_that_weigh_by_themselves_are_noticed(
    form: Form, varied: Rollout, kit: Experiment, loss_type: str
):
    def reweighed(
        logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, **options: object
    ) -> LossOutput:
        weights = token_weights(mask, loss_type, 40)
        return grpo_loss(logprobs, advantages, mask, **options | {"weights": weights})

    with _losing(reweighed):
        assert _worst_split(form.policy, varied, kit, (5,), loss_type=loss_type) > 1e-2


@pytest.mark.trap("T11")
@pytest.mark.trap("T11", broken="pictures_of_other_rows")
def test_pictures_stay_with_their_rows_in_micro_batches(form: Form, varied: Rollout, kit: Experiment):
    whole = _gradient(form.policy, varied, _config(kit))
    order = torch.tensor([7, 1, 10, 4, 0, 8, 5, 11, 2, 6, 9, 3])
    assert _far(_gradient(form.policy, _rows(varied, order.tolist()), _config(kit, micro_batch_size=5)), whole) < 1e-4
    if varied.contexts is not None:
        pictures = [one.images for one in varied.contexts[::-1]]
        contexts = [dataclasses.replace(one, images=own) for one, own in zip(varied.contexts, pictures, strict=True)]
        others = dataclasses.replace(varied, contexts=contexts)
        assert float((_logprobs(form.policy, others) - varied.old_logprobs).abs().max()) > 10 * ROUNDING


@pytest.mark.trap("T2")
@pytest.mark.trap("T2", broken="ratio_against_the_reference")
def test_gradient_without_pull_ignores_the_reference(form: Form, varied: Rollout, kit: Experiment):
    other = dataclasses.replace(varied, ref_logprobs=varied.old_logprobs - 0.1 * varied.completion_mask)
    plain = _gradient(form.policy, varied, _config(kit))
    assert torch.equal(_gradient(form.policy, other, _config(kit)), plain)
    assert not torch.equal(_gradient(form.policy, other, _config(kit, beta=0.1)), plain)
    with _losing(lambda *args, **options: grpo_loss(*args, **options | {"old_logprobs": other.ref_logprobs})):
        assert _far(_gradient(form.policy, other, _config(kit)), plain) > 1e-2


@pytest.mark.trap("T10")
@pytest.mark.trap("T10", broken="padding_counted")
def test_nothing_after_the_end_changes_the_gradient(form: Form, varied: Rollout, kit: Experiment):
    mask = varied.completion_mask
    garbage = varied.completion_ids.where(mask, 7)
    spoiled = dataclasses.replace(varied, completion_ids=garbage, old_logprobs=varied.old_logprobs.where(mask, -9.0))
    whole = _gradient(form.policy, varied, _config(kit))
    assert not mask.all() and _far(_gradient(form.policy, spoiled, _config(kit)), whole) < 1e-5
    counted = dataclasses.replace(spoiled, completion_mask=torch.ones_like(mask))
    assert _far(_gradient(form.policy, counted, _config(kit)), whole) > 1e-2


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


@pytest.mark.trap("T23")
@pytest.mark.trap("T23", broken="always_stepping")
def test_flat_groups_leave_every_weight_as_it_is(form: Form, kit: Experiment):
    assert not _moved_by_a_flat_rollout(form.policy, form.rollout, _config(kit))
    assert _moved_by_a_flat_rollout(form.policy, form.rollout, _config(kit), _always_stepping)
    stats = grpo_step(form.policy, Watched(form.policy), _with_rewards(form.rollout, FLAT), _config(kit))
    assert (stats.updates, stats.metrics["frac_reward_zero_std"], stats.metrics["reward_std"]) == (0, 1.0, 0.0)


def test_flat_groups_are_still_pulled_to_the_reference(own_policy: Policy, rollout: Rollout, kit: Experiment):
    assert _moved_by_a_flat_rollout(own_policy, rollout, _config(kit, beta=0.1))


def test_rollout_in_which_nothing_was_scored_changes_nothing(own_policy: Policy, rollout: Rollout, kit: Experiment):
    watched = Watched(own_policy)
    stats = grpo_step(own_policy, watched, _with_rewards(rollout, [torch.nan] * 12), _config(kit, beta=0.1))
    assert not watched.gradients and stats.updates == 0
    assert stats.metrics["unscored"] == 12 and stats.metrics["reward"] != stats.metrics["reward"]


# --- failed samples (T16) ---------------------------------------------------------------------------------------------


def _rows(rollout: Rollout, keep: list[int]) -> Rollout:
    """Some of a rollout's rows, in this order."""
    per_row = ("group_ids", "completion_ids", "completion_mask", "image_seeds", "rewards", "old_logprobs", "truncated")
    parts = {name: getattr(rollout, name)[keep] for name in per_row}
    parts["reward_parts"] = {name: values[keep] for name, values in rollout.reward_parts.items()}
    parts["enhanced_prompts"] = [rollout.enhanced_prompts[row] for row in keep]
    return dataclasses.replace(rollout, images=[rollout.images[row] for row in keep], **parts)


@pytest.mark.trap("T16")
@pytest.mark.trap("T16", broken="failure_as_zero_reward")
@pytest.mark.parametrize(
    ("loss_type", "failed"),
    [("grpo", [1, 6]), ("dr_grpo", [1, 6]), ("dapo", [4, 5, 6, 7])],
    ids=["grpo, some", "dr_grpo, some", "dapo, a whole group"],
)
def test_failed_samples_are_as_if_they_had_not_been_sampled(
    form: Form, varied: Rollout, kit: Experiment, loss_type: str, failed: list[int]
):
    config = _config(kit, loss_type=loss_type, beta=0.1)
    spoiled = _with_rewards(varied, [torch.nan if row in failed else r for row, r in enumerate(VARIED)])
    found = _gradient(form.policy, spoiled, config)
    expected = _gradient(form.policy, _rows(varied, [row for row in range(12) if row not in failed]), config)
    assert _far(found, expected) < 1e-5
    as_zero = dataclasses.replace(spoiled, rewards=spoiled.rewards.nan_to_num(0.0))
    assert _far(_gradient(form.policy, as_zero, config), expected) > 1e-2


@pytest.mark.trap("T16")
def test_group_in_which_nothing_was_scored_gives_no_gradient(form: Form, kit: Experiment):
    only_the_first = _with_rewards(form.rollout, VARIED[:4] + [torch.nan] * 8)
    found = _gradient(form.policy, only_the_first, _config(kit, beta=0.1))
    assert _far(found, _gradient(form.policy, _rows(only_the_first, [0, 1, 2, 3]), _config(kit, beta=0.1))) < 1e-5


def test_failed_samples_are_counted(own_policy: Policy, rollout: Rollout, kit: Experiment):
    spoiled = _with_rewards(rollout, [torch.nan, torch.nan, *VARIED[2:]])
    stats = grpo_step(own_policy, Watched(own_policy), spoiled, _config(kit))
    assert stats.metrics["unscored"] == 2
    assert stats.metrics["reward"] == pytest.approx(sum(VARIED[2:]) / 10)
    assert not stats.advantages[:2].any()


# --- nothing is hidden ------------------------------------------------------------------------------------------------


@pytest.mark.trap("T25")
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


class OutOfMemory(RuntimeError):
    """As a model raises it in the middle of a forward pass."""


def _errors_surface(policy: Policy, rollout: Rollout, kit: Experiment) -> bool:
    """Whether a model that fails stops sampling, and the step too, which then leaves the weights alone."""
    before = _weights(policy)

    def failing(*args: object) -> None:
        raise OutOfMemory

    policy.model.get_input_embeddings().register_forward_pre_hook(failing)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-3)
    stopped = 0
    for failing_call in (
        lambda: _sampled_again(policy, rollout),
        lambda: grpo_step(policy, optimizer, rollout, _config(kit)),
    ):
        try:
            failing_call()
        except OutOfMemory:
            stopped += 1
    return stopped == 2 and torch.equal(_weights(policy), before)


def _hiding(score: Callable[..., Scores]) -> Callable[..., Scores]:
    """Scoring that makes up log-probabilities where the model fails."""

    def hidden(prompts: list, group_ids: torch.Tensor, ids: torch.Tensor, *args: object, **options: object) -> Scores:
        try:
            return score(prompts, group_ids, ids, *args, **options)
        except Exception:
            return Scores(torch.zeros(ids.shape, requires_grad=True), torch.zeros(ids.shape))

    return hidden


@pytest.mark.trap("T17")
@pytest.mark.trap("T17", broken="broad_except_around_scoring")
def test_error_in_scoring_surfaces(form: Form, varied: Rollout, kit: Experiment):
    assert _errors_surface(form.own().policy, varied, kit)
    hiding = form.own().policy
    hiding.forward = _hiding(hiding.forward)
    assert not _errors_surface(hiding, varied, kit)


def test_gradient_is_clipped_to_its_limit_and_reported_unclipped(own_policy: Policy, rollout: Rollout, kit: Experiment):
    watched = Watched(own_policy)
    stats = grpo_step(own_policy, watched, _with_rewards(rollout, VARIED), _config(kit, max_grad_norm=0.01))
    assert float(watched.gradients[0].norm()) == pytest.approx(0.01, rel=1e-3)
    assert stats.metrics["grad_norm"] > 0.02


# --- several updates, and the reference -------------------------------------------------------------------------------


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(name.encode() + tensor.detach().numpy().tobytes())
    return content.hexdigest()


def _reference(policy: Policy) -> dict[str, torch.Tensor]:
    """The tensors that the reference answers with: its own, or those below the adapter."""
    model = policy.model if policy.reference is None else policy.reference
    return {name: tensor for name, tensor in model.state_dict().items() if "lora" not in name}


def _reference_stays(policy: Policy, rollout: Rollout, kit: Experiment) -> bool:
    """Whether over four real updates the reference's hash stays, and the KL to it begins at 0 and grows."""
    before = _digest(_reference(policy))
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=3e-3)
    config = _config(kit, beta=0.04, max_grad_norm=1.0)
    kl = [grpo_step(policy, optimizer, rollout, config).metrics["kl"] for _ in range(4)]
    return _digest(_reference(policy)) == before and abs(kl[0]) < 1e-9 and 1e-6 < kl[1] < kl[3]


@pytest.fixture
def untrained(form: Form) -> Policy:
    """The policy before any training: it is its own reference."""
    for name, parameter in form.policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return form.policy


@pytest.mark.trap("T20")
@pytest.mark.trap("T13")
def test_kl_starts_at_zero_and_grows_while_the_reference_stays(untrained: Policy, varied: Rollout, kit: Experiment):
    assert untrained.model.training
    assert _reference_stays(untrained, varied, kit)


def reference_shares_the_policys_tensors(policy: Policy) -> None:
    """The adapter stays switched on, or the reference is the model itself."""
    policy._answering = lambda reference: nullcontext(policy.model)
    policy.reference = None if policy.reference is None else policy.model


def reference_follows_the_policy(policy: Policy) -> None:
    """What lies below the adapter, or the copy, is moved a little towards the policy whenever it answers."""
    answering, trained = policy._answering, policy.model.state_dict()

    def moving(reference: bool) -> object:
        if reference:
            for name, tensor in _reference(policy).items():
                tensor.data.mul_(1 + 1e-3) if policy.reference is None else tensor.data.lerp_(trained[name].data, 0.1)
        return answering(reference)

    policy._answering = moving


@pytest.mark.parametrize(
    "spoil", broken_versions({reference_shares_the_policys_tensors: "T20", reference_follows_the_policy: "T20"})
)
def test_reference_that_moves_is_noticed(
    untrained: Policy, varied: Rollout, kit: Experiment, spoil: Callable[[Policy], None]
):
    spoil(untrained)
    assert not _reference_stays(untrained, varied, kit)


@pytest.mark.trap("T13", broken="dropout_left_on")
def test_kl_of_a_policy_that_scores_with_dropout_does_not_start_at_zero(
    untrained: Policy, varied: Rollout, kit: Experiment
):
    with _dropout_left_on():
        assert not _reference_stays(untrained, varied, kit)


def test_several_updates_go_on_from_the_rollouts_own_log_probabilities(
    own_policy: Policy, rollout: Rollout, kit: Experiment
):
    optimizer = torch.optim.SGD(own_policy.trainable_parameters(), lr=2.0)
    config = _config(kit, updates_per_rollout=4, max_grad_norm=1.0)
    stats = grpo_step(own_policy, optimizer, _with_rewards(rollout, VARIED), config)
    assert stats.updates == 4
    assert stats.metrics["clip_ratio/region_mean"] > 0  # later updates see ratios that have moved


@pytest.mark.trap("T5")
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
