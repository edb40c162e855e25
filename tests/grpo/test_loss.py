"""The loss: what known mistakes violate (CORRECTNESS.md T1, T2, T6, T7, T10, T14, T17, T21 to T23, T25); TRL as oracle.

The properties are those of `grpo-kit doctor` (preflight/loss_checks): `grpo_loss` has them, broken versions do not.
"""

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from support.broken_twins import Known, holding, twins
from support.trl_loss import trl_loss

from grpo_kit.grpo import LOSS_TYPES, LossOutput, completion_mask, grpo_loss, kl_divergence, token_weights
from grpo_kit.grpo import loss as loss_module
from grpo_kit.preflight.loss_checks import Subject, loss_properties, subject_of

Loss = Callable[..., LossOutput]
LEVELS = ("token", "sequence")
LENGTHS = (7, 1, 4, 6)
EVERY = [pytest.param(name, level, id=f"{name}-{level}") for name, level in itertools.product(LOSS_TYPES, LEVELS)]


def _case(seed: int, drift: float = 0.3, lengths: tuple[int, ...] = LENGTHS) -> dict[str, torch.Tensor]:
    """Log-probabilities of a policy that has drifted from the one that sampled, and of a reference."""
    source = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    old = -torch.rand(shape, generator=source, dtype=torch.float64) * 4
    new = old + drift * torch.randn(shape, generator=source, dtype=torch.float64)
    reference = old + 0.5 * torch.randn(shape, generator=source, dtype=torch.float64)
    advantages = torch.randn(len(lengths), generator=source, dtype=torch.float64)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return {
        "logprobs": new.requires_grad_(),
        "advantages": advantages,
        "mask": mask,
        "old_logprobs": old,
        "ref_logprobs": reference,
    }


def _gradient(loss: Loss, case: dict[str, torch.Tensor], **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and its gradient with respect to the log-probabilities."""
    output = loss(**case, **options)
    return output.loss.detach(), torch.autograd.grad(output.loss, case["logprobs"])[0]


def _on_policy(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> dict[str, torch.Tensor]:
    case = _case(seed, drift=0.0, lengths=lengths)
    return case | {"advantages": case["advantages"] - case["advantages"].mean()}


# --- properties that only this loss need have -------------------------------------------------------------------------


def its_value_starts_at_zero(subject: Subject) -> None:
    """T21: what makes people think that nothing is learned."""
    case = _on_policy()
    value, gradient = _gradient(subject.loss, case)
    assert abs(float(value)) < 1e-7 and float(gradient.norm()) > 0.1


def wild_padding_changes_nothing(subject: Subject) -> None:
    """T10: not even padding whose ratio overflows, nor in the last bit."""
    assert loss_properties.nothing_after_the_end_counts(subject, garbage=(-1e4, 50.0)).endswith("bit for bit")


def near_ratios_stay_exact(subject: Subject) -> None:
    """T25: where exp is harmless, nothing is changed."""
    near = _case(2) | {"advantages": -torch.ones(4, dtype=torch.float64)}
    near["logprobs"] = (near["old_logprobs"] + 15.0).requires_grad_()
    expected = torch.tensor(15.0, dtype=torch.float64).exp()
    torch.testing.assert_close(subject.loss(**near).loss.detach(), expected, rtol=1e-6, atol=0)


def kl_pulls_every_token_towards_the_reference(subject: Subject) -> None:
    """T7: with advantages 0 the KL term alone is at work, at each token."""
    case = _case(3) | {"advantages": torch.zeros(4, dtype=torch.float64)}
    for estimator in ("k2", "k3"):
        _, gradient = _gradient(subject.loss, case, beta=0.5, kl_estimator=estimator)
        towards = (case["ref_logprobs"] - case["logprobs"]).sign()
        assert torch.equal(-gradient.sign()[case["mask"]], towards.detach()[case["mask"]])


def weights_are_those_of_the_whole_batch(subject: Subject) -> None:
    """T14: `token_weights` of the whole batch are what the loss uses by itself, and its parts' values add up too."""
    case = _case(4)
    for name, level in itertools.product(LOSS_TYPES, LEVELS):
        options = {"loss_type": name, "importance_sampling_level": level, "beta": 0.1, "max_completion_length": 9}
        value, gradient = _gradient(subject.loss, case, **options)
        weights = token_weights(case["mask"], name, 9)
        for size in (1, 2, 3):
            parts = [
                subject.loss(**{key: tensor[rows] for key, tensor in case.items()}, **options, weights=weights[rows])
                for rows in torch.arange(4).split(size)
            ]
            total = sum(part.loss for part in parts)
            torch.testing.assert_close(total.detach(), value)
            torch.testing.assert_close(torch.autograd.grad(total, case["logprobs"])[0], gradient)


# --- broken on purpose ------------------------------------------------------------------------------------------------

takes_what_grpo_loss_takes = functools.wraps(grpo_loss, assigned=(), updated=())


@takes_what_grpo_loss_takes
def ratio_against_the_reference(*args: object, **options: object) -> LossOutput:
    return grpo_loss(*args, **options | {"old_logprobs": options["ref_logprobs"]})


@takes_what_grpo_loss_takes
def surrogate_without_gradient(logprobs: torch.Tensor, *args: object, **options: object) -> LossOutput:
    return LossOutput(grpo_loss(logprobs.detach(), *args, **options).loss + 0 * logprobs.sum(), {})


@takes_what_grpo_loss_takes
def advantage_with_the_ratio_taken_away(
    logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, **options: object
) -> LossOutput:
    """-A log π: the right gradient on-policy, but not loss 0."""
    weights = token_weights(mask)
    return LossOutput(-(weights * advantages.unsqueeze(1) * logprobs).sum(), {})


@takes_what_grpo_loss_takes
def every_type_a_mean_of_row_means(*args: object, **options: object) -> LossOutput:
    general = {name: value for name, value in options.items() if not name.startswith(("sapo_", "vespo_"))}
    return grpo_loss(*args, **general | {"loss_type": "grpo"})


@takes_what_grpo_loss_takes
def padding_included(logprobs, advantages, mask, **options: object) -> LossOutput:
    return grpo_loss(logprobs, advantages, torch.ones_like(mask), **options)


@takes_what_grpo_loss_takes
def clip_without_the_minimum(logprobs, advantages, mask, old_logprobs, **options: object) -> LossOutput:
    ratio = (logprobs - old_logprobs).exp()
    advantages = advantages if advantages.ndim == 2 else advantages.unsqueeze(1)
    outside = ((ratio < 0.8) | (ratio > 1.2)).double().mean()
    loss = -(token_weights(mask) * ratio.clamp(0.8, 1.2) * advantages).sum()
    return LossOutput(loss, dict.fromkeys(("clip_ratio/low_mean", "clip_ratio/high_mean"), float(outside)))


@takes_what_grpo_loss_takes
def clip_shares_of_both_sides(*args: object, **options: object) -> LossOutput:
    output = grpo_loss(*args, **options)
    ratio = (options["logprobs"] - options["old_logprobs"]).exp()
    counted = {"clip_ratio/low_mean": float((ratio < 0.8).double().mean())}
    return LossOutput(output.loss, output.metrics | counted)


@takes_what_grpo_loss_takes
def delta_ignored(*args: object, **options: object) -> LossOutput:
    return grpo_loss(*args, **options | {"delta": None})


@takes_what_grpo_loss_takes
def negative_side_always_bounded(*args: object, **options: object) -> LossOutput:
    return grpo_loss(*args, **options | {"delta": 4.0})


@takes_what_grpo_loss_takes
def plain_exp(*args: object, **options: object) -> LossOutput:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "bounded_exp", torch.exp)
        return grpo_loss(*args, **options)


@takes_what_grpo_loss_takes
def exp_bounded_at_2(*args: object, **options: object) -> LossOutput:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "bounded_exp", lambda log_ratio: log_ratio.clamp(-2, 2).exp())
        return grpo_loss(*args, **options)


@takes_what_grpo_loss_takes
def kl_detached(logprobs: torch.Tensor, *args: object, **options: object) -> LossOutput:
    kl = grpo_loss(logprobs.detach(), *args, **options | {"old_logprobs": logprobs.detach()})
    return LossOutput(grpo_loss(logprobs, *args, **options | {"beta": 0.0}).loss + kl.loss, {})


@takes_what_grpo_loss_takes
def kl_a_mean_log_ratio(*args: object, **options: object) -> LossOutput:
    return grpo_loss(*args, **options | {"kl_estimator": "k1"})


@takes_what_grpo_loss_takes
def kl_with_the_sign_turned(*args: object, **options: object) -> LossOutput:
    return grpo_loss(*args, **options | {"beta": -options["beta"]})


@takes_what_grpo_loss_takes
def parts_weighed_by_themselves(*args: object, **options: object) -> LossOutput:
    return grpo_loss(*args, **options | {"weights": None})


@takes_what_grpo_loss_takes
def logprobs_clamped_at_20(logprobs: torch.Tensor, *args: object, **options: object) -> LossOutput:
    return grpo_loss(logprobs.clamp(min=-20), *args, **options)


@takes_what_grpo_loss_takes
def probabilities_clamped_at_95_percent(logprobs: torch.Tensor, *args: object, **options: object) -> LossOutput:
    return grpo_loss(logprobs.clamp(max=-0.0513), *args, **options)


@takes_what_grpo_loss_takes
def entropy_bonus_left_on(logprobs: torch.Tensor, *args: object, **options: object) -> LossOutput:
    return LossOutput(grpo_loss(logprobs, *args, **options).loss + 0.01 * logprobs.mean(), {})


Property = Callable[[Subject], object]
PROPERTIES: Known = [
    ("T1", loss_properties.ratio_starts_at_one, [ratio_against_the_reference, surrogate_without_gradient]),
    ("T2", loss_properties.reference_is_ignored_without_kl, [ratio_against_the_reference]),
    ("T6", loss_properties.length_bias_is_the_stated_one, [every_type_a_mean_of_row_means]),
    (
        "T7",
        loss_properties.kl_term_has_the_gradient_of_a_kl,
        [kl_detached, kl_with_the_sign_turned, kl_a_mean_log_ratio],
    ),
    ("T7", kl_pulls_every_token_towards_the_reference, [kl_detached, kl_with_the_sign_turned]),
    ("T10", loss_properties.nothing_after_the_end_counts, [padding_included]),
    ("T10", wild_padding_changes_nothing, [padding_included]),
    ("T14", loss_properties.parts_add_up_to_the_whole, [parts_weighed_by_themselves]),
    ("T14", weights_are_those_of_the_whole_batch, [parts_weighed_by_themselves]),
    (
        "T17",
        loss_properties.logprobs_are_not_clamped,
        [logprobs_clamped_at_20, probabilities_clamped_at_95_percent, surrogate_without_gradient],
    ),
    ("T21", loss_properties.a_loss_of_zero_still_learns, [surrogate_without_gradient]),
    ("T21", its_value_starts_at_zero, [surrogate_without_gradient, advantage_with_the_ratio_taken_away]),
    ("T22", loss_properties.clip_acts_on_its_active_side_alone, [clip_without_the_minimum, clip_shares_of_both_sides]),
    ("T22", loss_properties.delta_bounds_the_negative_side, [delta_ignored, negative_side_always_bounded]),
    ("T23", loss_properties.flat_groups_give_no_gradient, [entropy_bonus_left_on]),
    ("T25", loss_properties.far_ratios_stay_finite, [plain_exp]),
    ("T25", near_ratios_stay_exact, [exp_bounded_at_2]),
]


@pytest.mark.parametrize("holds", holding(PROPERTIES))
def test_property_holds(holds: Property):
    holds(subject_of(grpo_loss))


@pytest.mark.parametrize(("holds", "mutant"), twins(PROPERTIES))
def test_broken_version_is_caught(holds: Property, mutant: Loss):
    with pytest.raises(AssertionError):
        holds(subject_of(mutant))


def test_every_loss_type_and_level_is_examined():
    assert [tuple(variant.values())[:: len(variant) - 1] for variant in subject_of(grpo_loss).variants()] == [
        (name, level) for name in LOSS_TYPES for level in LEVELS
    ]


def test_this_loss_is_stricter_than_any_correct_one_has_to_be():
    subject = subject_of(grpo_loss)
    assert loss_properties.reference_is_ignored_without_kl(subject).endswith("bit for bit")
    assert loss_properties.clip_acts_on_its_active_side_alone(subject).endswith("only there")
    assert loss_properties.kl_term_has_the_gradient_of_a_kl(subject) == "k1 0, k2 ∇KL(π‖ref), k3 ∇KL(ref‖π)"


@pytest.mark.trap("T7", broken="kl_without_importance_weight")
def test_kl_of_older_samples_needs_the_importance_weight():
    def kl_without_importance_weight(logprobs, advantages, mask, old_logprobs, ref_logprobs, beta):
        return grpo_loss(logprobs, advantages, mask, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, beta=beta)

    def kl_with_importance_weight(logprobs, advantages, mask, old_logprobs, ref_logprobs, beta):
        policy = grpo_loss(logprobs, advantages, mask, old_logprobs=old_logprobs).loss
        weight = (logprobs - old_logprobs).exp()
        return policy + beta * (token_weights(mask) * weight * kl_divergence(logprobs, ref_logprobs, "k3")).sum()

    weighted, unweighted = (subject_of(loss) for loss in (kl_with_importance_weight, kl_without_importance_weight))
    assert "∇KL(π‖ref)" in loss_properties.kl_term_is_weighted_off_policy(weighted)
    assert "∇KL(ref‖π)" in loss_properties.kl_term_has_the_gradient_of_a_kl(unweighted)  # on-policy it is one
    with pytest.raises(AssertionError, match="no importance weight"):
        loss_properties.kl_term_is_weighted_off_policy(unweighted)


# --- for every loss type ----------------------------------------------------------------------------------------------


@pytest.mark.trap("T1")
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_every_loss_type_follows_the_policy_gradient(loss_type: str):
    case = _on_policy(5)
    _, gradient = _gradient(grpo_loss, case, loss_type=loss_type, epsilon_high=5.0)  # cispo's bound is the ratio's own
    expected = -token_weights(case["mask"], loss_type) * case["advantages"].unsqueeze(1)
    torch.testing.assert_close(gradient, expected.double())


@pytest.mark.parametrize(("loss_type", "level"), EVERY)
def test_without_old_logprobs_the_policy_itself_is_the_old_one(loss_type: str, level: str):
    case, options = _case(6), {"loss_type": loss_type, "importance_sampling_level": level}
    same = case | {"old_logprobs": case["logprobs"].detach()}
    for a, b in zip(
        _gradient(grpo_loss, case | {"old_logprobs": None}, **options),
        _gradient(grpo_loss, same, **options),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_row_without_tokens_is_no_division_by_zero():
    case = _case(7)
    case["mask"][2] = False
    for loss_type, level in itertools.product(LOSS_TYPES, LEVELS):
        value, gradient = _gradient(grpo_loss, case, loss_type=loss_type, importance_sampling_level=level, beta=0.1)
        assert value.isfinite() and gradient.isfinite().all() and not gradient[2].any()


def test_sequence_level_gives_a_row_one_ratio():
    case = _case(8, drift=0.05)
    _, gradient = _gradient(grpo_loss, case, importance_sampling_level="sequence", loss_type="luspo")
    for row, kept in zip(gradient, case["mask"], strict=True):
        torch.testing.assert_close(row[kept], row[kept][0].expand(int(kept.sum())))


def test_advantages_may_be_given_a_token():
    case = _case(9)
    spread = case | {"advantages": case["advantages"].unsqueeze(1).expand(4, 7)}
    assert torch.equal(grpo_loss(**case).loss, grpo_loss(**spread).loss)


def test_token_count_of_a_larger_batch_replaces_this_ones():
    case = _case(10)
    half = grpo_loss(**case, loss_type="dapo", num_items_in_batch=2.0 * sum(LENGTHS)).loss
    torch.testing.assert_close(2 * half, grpo_loss(**case, loss_type="dapo").loss)


def test_token_weights_add_up_to_one_where_the_loss_is_a_mean():
    mask = completion_mask(torch.tensor([[1, 1, 9, 9], [9, 1, 1, 1], [1, 1, 1, 1]]), 9)
    for loss_type in ("grpo", "sapo", "bnpo", "dapo", "cispo", "vespo"):
        weights = token_weights(mask, loss_type)
        assert float(weights.sum()) == pytest.approx(1) and not weights[~mask].any()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss_type": "ppo"}, "loss_type: found 'ppo', allowed: grpo, "),
        ({"importance_sampling_level": "word"}, "importance_sampling_level: found 'word', allowed: 'token'"),
        ({"beta": 0.1, "ref_logprobs": None}, "ref_logprobs: found None"),
    ],
)
def test_mistake_is_one_line_that_names_it(options: dict[str, object], named: str):
    with pytest.raises(ValueError, match=named) as error:
        grpo_loss(**_case(0) | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo"])
def test_misspelt_setting_is_refused(loss_type: str):
    with pytest.raises((TypeError, ValueError), match="epsilom"):
        grpo_loss(**_case(0), loss_type=loss_type, epsilom=0.3)


# --- TRL as the oracle ------------------------------------------------------------------------------------------------


def _random_settings(seed: int) -> dict[str, object]:
    """Settings and constants for one comparison, every kind of them in turn."""
    source = torch.Generator().manual_seed(1000 + seed)
    constants = torch.rand(4, generator=source).tolist()
    by_type = {
        "sapo": {"sapo_temperature_pos": 0.5 + constants[0], "sapo_temperature_neg": 0.5 + constants[1]},
        "vespo": {
            "vespo_k_pos": 1 + constants[0], "vespo_lambda_pos": 1 + constants[1],
            "vespo_k_neg": 1 + constants[2], "vespo_lambda_neg": 1 + constants[3],
        },
    }  # fmt: skip
    loss_type = LOSS_TYPES[seed % 8]
    return {
        "loss_type": loss_type,
        "importance_sampling_level": LEVELS[seed // 8 % 2],
        "beta": (0.0, 0.04, 1.0)[seed // 16 % 3],
        "epsilon": (0.1, 0.2)[seed // 48 % 2],
        "epsilon_high": (None, 0.28, 5.0)[seed // 96 % 3],
        "delta": (None, 7.0)[seed // 7 % 2],
        "use_bias_correction_kl": bool(seed // 11 % 2),
        "max_completion_length": 16,
        "num_items_in_batch": 50 if seed // 5 % 2 and loss_type != "bnpo" else sum(LENGTHS),  # TRL's bnpo takes none
        **(by_type.get(loss_type, {}) if seed % 3 else {}),
    }


def _differs_from_trl(loss: Loss, seed: int) -> float:
    """The largest difference in loss and gradient on one random case."""
    case, settings = _case(seed, drift=(0.02, 0.3, 1.5)[seed // 3 % 3]), _random_settings(seed)
    mine, theirs = _gradient(loss, case, **settings), _gradient(trl_loss, case, **settings)
    return max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("block", range(6))
def test_loss_and_gradient_are_trls_in_600_random_cases(block: int):
    differences = {seed: _differs_from_trl(grpo_loss, seed) for seed in range(100 * block, 100 * block + 100)}
    assert max(differences.values()) <= 1e-6, max(differences, key=differences.get)


@pytest.mark.parametrize(
    "mutant",
    [ratio_against_the_reference, every_type_a_mean_of_row_means, padding_included, delta_ignored, kl_detached],
)
def test_difference_from_trl_is_found(mutant: Loss):
    assert max(_differs_from_trl(mutant, seed) for seed in range(0, 600, 5)) > 1e-3


def test_clip_shares_and_kl_are_trls():
    for seed in range(96):
        case, settings = _case(seed, drift=0.3), _random_settings(seed)
        mine, theirs = grpo_loss(**case, **settings).metrics, trl_loss(**case, **settings).metrics
        assert (mine and mine.items() <= theirs.items()) or all(
            mine[name] == pytest.approx(theirs[name], rel=1e-5) for name in mine
        )
