"""The loss: what known mistakes violate (CORRECTNESS.md T1, T2, T6, T7, T10, T14, T21, T22, T25); TRL as the oracle."""

import itertools
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from grpo_kit.grpo import LOSS_TYPES, LossOutput, completion_mask, grpo_loss, token_weights
from grpo_kit.grpo import loss as loss_module

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


# --- properties, each a function of the implementation ----------------------------------------------------------------


def reference_is_ignored_without_kl(loss: Loss) -> None:
    """T2: with π_old = π ≠ π_ref and beta 0."""
    one, other = _on_policy(), _on_policy() | {"ref_logprobs": _case(9)["ref_logprobs"]}
    for a, b in zip(_gradient(loss, one), _gradient(loss, other), strict=True):
        assert torch.equal(a, b)


def a_loss_of_zero_still_learns(loss: Loss) -> None:
    """T1, T21: before the first update the ratio is 1, nothing is clipped, and the gradient is that of Σ A log π."""
    case = _on_policy()
    value, gradient = _gradient(loss, case)
    assert abs(float(value)) < 1e-7 and float(gradient.norm()) > 0.1
    metrics = loss(**case).metrics
    assert not any(value for name, value in metrics.items() if name.startswith("clip_ratio"))


def tokens_weigh_as_their_loss_type_says(loss: Loss) -> None:
    """T6: a token of a row of 10 against one of a row of 100: 10 to 1 in grpo, 1 to 1 in dr_grpo and dapo."""
    case = _on_policy(lengths=(10, 100)) | {"advantages": torch.ones(2, dtype=torch.float64)}
    for loss_type, share in (("grpo", 10.0), ("dr_grpo", 1.0), ("dapo", 1.0), ("bnpo", 1.0), ("luspo", 1.0)):
        _, gradient = _gradient(loss, case, loss_type=loss_type, max_completion_length=128)
        assert float(gradient[0, 0] / gradient[1, 0]) == pytest.approx(share)


def nothing_after_the_end_counts(loss: Loss) -> None:
    """T10: whatever the model thinks of padding."""
    case = _case(1)
    for level, loss_type in itertools.product(LEVELS, LOSS_TYPES):
        options = {"importance_sampling_level": level, "loss_type": loss_type, "beta": 0.1}
        value, gradient = _gradient(loss, case, **options)
        for garbage in (-1e4, 50.0):
            spoiled = {
                name: tensor.detach().where(case["mask"], garbage * (1 + i)) if tensor.ndim == 2 else tensor
                for i, (name, tensor) in enumerate(case.items())
                if name != "mask"
            }
            spoiled["logprobs"].requires_grad_()
            other, other_gradient = _gradient(loss, spoiled | {"mask": case["mask"]}, **options)
            assert torch.equal(value, other) and torch.equal(gradient, other_gradient)
            assert not other_gradient[~case["mask"]].any()


def clipped_tokens_get_no_gradient_on_their_active_side_alone(loss: Loss) -> None:
    """The pessimistic choice: too far where the advantage leads stops, too far the other way does not."""
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1, 0.9]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0, -1.0]], dtype=torch.float64)
    case = {
        "logprobs": ratio.log().requires_grad_(),
        "advantages": advantages,
        "mask": torch.ones(1, 6, dtype=torch.bool),
        "old_logprobs": torch.zeros(1, 6, dtype=torch.float64),
    }
    _, gradient = _gradient(loss, case)
    assert [bool(value) for value in gradient[0]] == [False, False, True, True, True, True]
    metrics = loss(**case).metrics
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == pytest.approx(1 / 6)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(2 / 6)


def delta_bounds_what_a_negative_advantage_can_do(loss: Loss) -> None:
    """T22: as the ratio grows the loss of a bad sample grows without delta, and stops at delta with it."""

    def at(log_ratio: float, delta: float | None) -> float:
        case = _on_policy(lengths=(3,)) | {"advantages": -torch.ones(1, dtype=torch.float64)}
        case["logprobs"] = (case["old_logprobs"] + log_ratio).requires_grad_()
        return float(loss(**case, delta=delta).loss.detach())

    assert at(1.0, None) < at(5.0, None) < at(9.0, None)
    assert at(1.0, 4.0) < at(5.0, 4.0) == pytest.approx(4.0) == at(9.0, 4.0)


def far_ratios_stay_finite_and_near_ones_exact(loss: Loss) -> None:
    """T25: at log-ratios of ±100 loss and gradient are finite; where exp is harmless, nothing is changed."""
    for name, level, shift in itertools.product(LOSS_TYPES, LEVELS, (100.0, -100.0)):
        case = {key: value.float() if value.is_floating_point() else value for key, value in _case(2).items()}
        case["logprobs"] = (case["old_logprobs"] + shift).detach().requires_grad_()
        options = {"loss_type": name, "importance_sampling_level": level, "beta": 0.1}
        value, gradient = _gradient(loss, case, **options)
        assert value.isfinite() and gradient.isfinite().all()
    near = _case(2) | {"advantages": -torch.ones(4, dtype=torch.float64)}
    near["logprobs"] = (near["old_logprobs"] + 15.0).requires_grad_()
    expected = torch.tensor(15.0, dtype=torch.float64).exp()
    torch.testing.assert_close(loss(**near).loss.detach(), expected, rtol=1e-6, atol=0)


def kl_carries_gradient(loss: Loss) -> None:
    """T7: with advantages 0 the KL term alone pulls towards the reference."""
    case = _case(3) | {"advantages": torch.zeros(4, dtype=torch.float64)}
    for estimator in ("k2", "k3"):
        _, gradient = _gradient(loss, case, beta=0.5, kl_estimator=estimator)
        towards = (case["ref_logprobs"] - case["logprobs"]).sign()
        assert torch.equal(-gradient.sign()[case["mask"]], towards.detach()[case["mask"]])


def parts_add_up_to_the_whole(loss: Loss) -> None:
    """T14: rows in micro-batches, weighed as the whole batch, give the whole batch's loss and gradient."""
    case = _case(4)
    for name, level in itertools.product(LOSS_TYPES, LEVELS):
        options = {"loss_type": name, "importance_sampling_level": level, "beta": 0.1, "max_completion_length": 9}
        value, gradient = _gradient(loss, case, **options)
        weights = token_weights(case["mask"], name, 9)
        for size in (1, 2, 3):
            parts = [
                loss(**{key: tensor[rows] for key, tensor in case.items()}, **options, weights=weights[rows]).loss
                for rows in torch.arange(4).split(size)
            ]
            torch.testing.assert_close(sum(parts).detach(), value)
            torch.testing.assert_close(torch.autograd.grad(sum(parts), case["logprobs"])[0], gradient)


# --- broken on purpose ------------------------------------------------------------------------------------------------


def ratio_against_the_reference(*args: object, **options: object) -> LossOutput:
    return grpo_loss(*args, **options | {"old_logprobs": options["ref_logprobs"]})


def surrogate_without_gradient(logprobs: torch.Tensor, *args: object, **options: object) -> LossOutput:
    return LossOutput(grpo_loss(logprobs.detach(), *args, **options).loss + 0 * logprobs.sum(), {})


def advantage_with_the_ratio_taken_away(
    logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, **options: object
) -> LossOutput:
    """-A log π: the right gradient on-policy, but not loss 0."""
    weights = token_weights(mask)
    return LossOutput(-(weights * advantages.unsqueeze(1) * logprobs).sum(), {})


def every_type_a_mean_of_row_means(*args: object, **options: object) -> LossOutput:
    general = {name: value for name, value in options.items() if not name.startswith(("sapo_", "vespo_"))}
    return grpo_loss(*args, **general | {"loss_type": "grpo"})


def padding_included(logprobs, advantages, mask, **options: object) -> LossOutput:
    return grpo_loss(logprobs, advantages, torch.ones_like(mask), **options)


def clip_without_the_minimum(logprobs, advantages, mask, old_logprobs, **options: object) -> LossOutput:
    ratio = (logprobs - old_logprobs).exp()
    advantages = advantages if advantages.ndim == 2 else advantages.unsqueeze(1)
    outside = ((ratio < 0.8) | (ratio > 1.2)).double().mean()
    loss = -(token_weights(mask) * ratio.clamp(0.8, 1.2) * advantages).sum()
    return LossOutput(loss, dict.fromkeys(("clip_ratio/low_mean", "clip_ratio/high_mean"), float(outside)))


def clip_shares_of_both_sides(*args: object, **options: object) -> LossOutput:
    output = grpo_loss(*args, **options)
    ratio = (options["logprobs"] - options["old_logprobs"]).exp()
    counted = {"clip_ratio/low_mean": float((ratio < 0.8).double().mean())}
    return LossOutput(output.loss, output.metrics | counted)


def delta_ignored(*args: object, **options: object) -> LossOutput:
    return grpo_loss(*args, **options | {"delta": None})


def negative_side_always_bounded(*args: object, **options: object) -> LossOutput:
    return grpo_loss(*args, **options | {"delta": 4.0})


def plain_exp(*args: object, **options: object) -> LossOutput:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "bounded_exp", torch.exp)
        return grpo_loss(*args, **options)


def exp_bounded_at_2(*args: object, **options: object) -> LossOutput:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "bounded_exp", lambda log_ratio: log_ratio.clamp(-2, 2).exp())
        return grpo_loss(*args, **options)


def kl_detached(logprobs: torch.Tensor, *args: object, **options: object) -> LossOutput:
    kl = grpo_loss(logprobs.detach(), *args, **options | {"old_logprobs": logprobs.detach()})
    return LossOutput(grpo_loss(logprobs, *args, **options | {"beta": 0.0}).loss + kl.loss, {})


def kl_with_the_sign_turned(*args: object, **options: object) -> LossOutput:
    return grpo_loss(*args, **options | {"beta": -options["beta"]})


def parts_weighed_by_themselves(*args: object, **options: object) -> LossOutput:
    return grpo_loss(*args, **options | {"weights": None})


PROPERTIES: dict[Callable[[Loss], None], list[Loss]] = {
    reference_is_ignored_without_kl: [ratio_against_the_reference],
    a_loss_of_zero_still_learns: [surrogate_without_gradient, advantage_with_the_ratio_taken_away],
    tokens_weigh_as_their_loss_type_says: [every_type_a_mean_of_row_means],
    nothing_after_the_end_counts: [padding_included],
    clipped_tokens_get_no_gradient_on_their_active_side_alone: [clip_without_the_minimum, clip_shares_of_both_sides],
    delta_bounds_what_a_negative_advantage_can_do: [delta_ignored, negative_side_always_bounded],
    far_ratios_stay_finite_and_near_ones_exact: [plain_exp, exp_bounded_at_2],
    kl_carries_gradient: [kl_detached, kl_with_the_sign_turned],
    parts_add_up_to_the_whole: [parts_weighed_by_themselves],
}
TWINS = [(holds, mutant) for holds, mutants in PROPERTIES.items() for mutant in mutants]


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__)
def test_property_holds(holds: Callable[[Loss], None]):
    holds(grpo_loss)


@pytest.mark.parametrize(("holds", "mutant"), TWINS, ids=lambda function: function.__name__)
def test_broken_version_is_caught(holds: Callable[[Loss], None], mutant: Loss):
    with pytest.raises(AssertionError):
        holds(mutant)


# --- for every loss type ----------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def trl_loss() -> Loss:
    """TRL's own loss on a trainer that was never initialised: the model's log-probabilities are handed to it."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    def loss(
        logprobs: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        *,
        num_items_in_batch: float,
        old_logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor,
        loss_type: str,
        importance_sampling_level: str,
        epsilon: float,
        epsilon_high: float | None,
        delta: float | None,
        beta: float,
        max_completion_length: int,
        **constants: float,
    ) -> LossOutput:
        names = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0}
        names |= {"vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0} | constants
        trainer = object.__new__(GRPOTrainer)
        trainer.args = SimpleNamespace(delta=delta, use_bias_correction_kl=False, **names)
        trainer.model = SimpleNamespace(training=False)
        trainer.accelerator = SimpleNamespace(
            num_processes=1, gather=lambda values: values, reduce=lambda values, reduction: values
        )
        trainer.loss_type, trainer.importance_sampling_level = loss_type, importance_sampling_level
        trainer.epsilon_low, trainer.epsilon_high = epsilon, epsilon if epsilon_high is None else epsilon_high
        trainer.beta, trainer.max_completion_length = beta, max_completion_length
        trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
        trainer.use_vllm = trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = False
        trainer._metrics = {"eval": defaultdict(list)}
        scored = (logprobs, torch.zeros_like(logprobs), None)
        trainer._get_per_token_logps_and_entropies = lambda *args, **options: scored
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        inputs = {
            "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask.long(),
            "advantages": advantages, "old_per_token_logps": old_logprobs, "ref_per_token_logps": ref_logprobs,
            "num_items_in_batch": torch.tensor(num_items_in_batch),
        }  # fmt: skip
        value = trainer._compute_loss(None, inputs)
        return LossOutput(value, {name: values[-1] for name, values in trainer._metrics["eval"].items()})

    return loss


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
        "max_completion_length": 16,
        "num_items_in_batch": 50 if seed // 5 % 2 and loss_type != "bnpo" else sum(LENGTHS),  # TRL's bnpo takes none
        **(by_type.get(loss_type, {}) if seed % 3 else {}),
    }


def _differs_from(trl_loss: Loss, loss: Loss, seed: int) -> float:
    """The largest difference in loss and gradient on one random case."""
    case, settings = _case(seed, drift=(0.02, 0.3, 1.5)[seed // 3 % 3]), _random_settings(seed)
    mine, theirs = _gradient(loss, case, **settings), _gradient(trl_loss, case, **settings)
    return max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("block", range(6))
def test_loss_and_gradient_are_trls_in_600_random_cases(trl_loss: Loss, block: int):
    differences = {seed: _differs_from(trl_loss, grpo_loss, seed) for seed in range(100 * block, 100 * block + 100)}
    assert max(differences.values()) <= 1e-6, max(differences, key=differences.get)


@pytest.mark.parametrize(
    "mutant",
    [ratio_against_the_reference, every_type_a_mean_of_row_means, padding_included, delta_ignored, kl_detached],
)
def test_difference_from_trl_is_found(trl_loss: Loss, mutant: Loss):
    assert max(_differs_from(trl_loss, mutant, seed) for seed in range(0, 600, 5)) > 1e-3


def test_clip_shares_and_kl_are_trls(trl_loss: Loss):
    for seed in range(96):
        case, settings = _case(seed, drift=0.3), _random_settings(seed)
        mine, theirs = grpo_loss(**case, **settings).metrics, trl_loss(**case, **settings).metrics
        assert (mine and mine.items() <= theirs.items()) or all(
            mine[name] == pytest.approx(theirs[name], rel=1e-5) for name in mine
        )
