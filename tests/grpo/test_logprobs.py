"""Masks, log-probabilities and KL estimates: CORRECTNESS.md T7, T8, T10, T17, T25 as properties of pure functions."""

import math
from collections.abc import Callable

import pytest
import torch
from support.broken_twins import Known, holding, twins

from grpo_kit.grpo import completion_mask, kl_divergence, token_logprobs
from grpo_kit.grpo.logprobs import logprobs_and_entropy


def _rows(*rows: str) -> torch.Tensor:
    return torch.tensor([[bool(int(mark)) for mark in row] for row in rows])


def _logits(scale: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return scale * torch.randn(3, 4, 7, generator=source), torch.randint(7, (3, 4), generator=source)


Property = Callable[[Callable], None]


# --- the mask (T10) ---------------------------------------------------------------------------------------------------


def first_end_counts_and_nothing_after_it(mask: Callable) -> None:
    ids = torch.tensor([[5, 6, 9, 5, 9], [9, 5, 5, 5, 5], [5, 5, 5, 5, 5], [5, 5, 5, 5, 9]])
    assert torch.equal(mask(ids, 9), _rows("11100", "10000", "11111", "11111"))


def padding_with_the_end_token_is_no_second_end(mask: Callable) -> None:
    assert torch.equal(mask(torch.tensor([[5, 9, 9, 9]]), 9), _rows("1100"))


def without_its_end(ids: torch.Tensor, end: int) -> torch.Tensor:
    return (ids == end).cumsum(dim=1) == 0


def everything_but_padding(ids: torch.Tensor, end: int) -> torch.Tensor:
    return ids != end


MASK: Known = [
    ("T10", first_end_counts_and_nothing_after_it, [without_its_end, everything_but_padding]),
    ("T10", padding_with_the_end_token_is_no_second_end, [without_its_end, everything_but_padding]),
]


@pytest.mark.parametrize("holds", holding(MASK))
def test_mask_property_holds(holds: Property):
    holds(completion_mask)


@pytest.mark.parametrize(("holds", "mutant"), twins(MASK))
def test_broken_mask_is_caught(holds: Property, mutant: Callable):
    with pytest.raises(AssertionError):
        holds(mutant)


def test_any_of_several_end_tokens_ends_a_row():
    ids = torch.tensor([[5, 8, 9, 5], [5, 9, 5, 8], [5, 5, 5, 5]])
    assert torch.equal(completion_mask(ids, (8, 9)), _rows("1100", "1100", "1111"))
    assert torch.equal(completion_mask(ids, torch.tensor([8, 9])), completion_mask(ids, [9, 8]))


# --- log-probabilities (T8, T17) --------------------------------------------------------------------------------------


def probabilities_sum_to_one(logprobs: Callable) -> None:
    logits, _ = _logits(scale=9.0)
    everything = torch.stack([logprobs(logits, torch.full((3, 4), token)) for token in range(7)])
    torch.testing.assert_close(everything.exp().sum(dim=0), torch.ones(3, 4))


def a_common_shift_of_logits_changes_nothing(logprobs: Callable) -> None:
    logits, ids = _logits(scale=9.0)
    torch.testing.assert_close(logprobs(logits + 30.0, ids), logprobs(logits, ids), rtol=1e-4, atol=1e-4)


def temperature_is_the_sampling_one(logprobs: Callable) -> None:
    logits, ids = _logits(scale=3.0)
    for temperature in (0.5, 1.0, 1.5):
        expected = torch.distributions.Categorical(logits=logits / temperature).log_prob(ids)
        torch.testing.assert_close(logprobs(logits, ids, temperature), expected)


def a_likely_token_stays_likely(logprobs: Callable) -> None:
    """What a clamp of logits at ±20 does: all large ones become equal."""
    logits = torch.tensor([25.0, 21.5, 21.0, 20.5]).reshape(1, 1, 4)
    probability = float(logits.softmax(-1)[0, 0, 0])
    assert probability > 0.94
    assert float(logprobs(logits, torch.tensor([[0]])).exp()) == pytest.approx(probability)


def unnormalised(logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return (logits / temperature).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def clamped_at_20(logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return token_logprobs(logits.clamp(-20, 20), ids, temperature)


def without_temperature(logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return token_logprobs(logits, ids)


def temperature_applied_twice(logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return token_logprobs(logits / temperature, ids, temperature)


LOGPROBS: Known = [
    ("T8", probabilities_sum_to_one, [unnormalised]),
    ("T8", temperature_is_the_sampling_one, [unnormalised, without_temperature, temperature_applied_twice]),
    ("T17", a_common_shift_of_logits_changes_nothing, [unnormalised, clamped_at_20]),
    ("T17", a_likely_token_stays_likely, [clamped_at_20]),
]


@pytest.mark.parametrize("holds", holding(LOGPROBS))
def test_logprobs_property_holds(holds: Property):
    holds(token_logprobs)


@pytest.mark.parametrize(("holds", "mutant"), twins(LOGPROBS))
def test_broken_logprobs_is_caught(holds: Property, mutant: Callable):
    with pytest.raises(AssertionError):
        holds(mutant)


def test_half_precision_logits_are_scored_in_full_precision():
    logits, ids = _logits(scale=4.0)
    found = token_logprobs(logits.bfloat16(), ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, token_logprobs(logits.bfloat16().double(), ids).float())


def test_entropy_is_that_of_the_sampling_distribution():
    logits, ids = _logits(scale=3.0)
    expected = torch.distributions.Categorical(logits=logits / 0.7).entropy()
    torch.testing.assert_close(logprobs_and_entropy(logits, ids, 0.7)[1], expected)
    assert float(logprobs_and_entropy(torch.zeros(1, 1, 7), ids[:1, :1])[1]) == pytest.approx(math.log(7))


# --- KL estimates on a policy whose expectations can be enumerated (T7) ----------------------------------------------


def _policies() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a policy over nine actions, with gradient, and of a reference."""
    source = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 9, generator=source, dtype=torch.float64)
    return policy.requires_grad_(), reference


def _expected(estimator: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact on-policy expectation of an estimate, and of its gradient: Σₐ π(a) ∇ estimate(a)."""
    policy, reference = _policies()
    logprobs, ref_logprobs = policy.log_softmax(0), reference.log_softmax(0)
    mean = (logprobs.detach().exp() * estimator(logprobs, ref_logprobs)).sum()
    return mean.detach(), torch.autograd.grad(mean, policy)[0]


def _true(forward: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(reference || policy) where `forward`, else KL(policy || reference), and its gradient."""
    policy, reference = _policies()
    p, q = policy.log_softmax(0), reference.log_softmax(0)
    value = (q.exp() * (q - p)).sum() if forward else (p.exp() * (p - q)).sum()
    return value.detach(), torch.autograd.grad(value, policy)[0]


def k1_has_the_value_and_no_gradient(kl: Callable) -> None:
    value, gradient = _expected(lambda p, q: kl(p, q, "k1"))
    torch.testing.assert_close(value, _true(forward=False)[0])
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def k2_has_the_gradient_of_the_reverse_kl(kl: Callable) -> None:
    _, gradient = _expected(lambda p, q: kl(p, q, "k2"))
    torch.testing.assert_close(gradient, _true(forward=False)[1])


def k3_has_the_value_of_one_and_the_gradient_of_the_other(kl: Callable) -> None:
    value, gradient = _expected(lambda p, q: kl(p, q, "k3"))
    torch.testing.assert_close(value, _true(forward=False)[0])
    torch.testing.assert_close(gradient, _true(forward=True)[1])


def never_negative_and_zero_at_equality(kl: Callable) -> None:
    p = torch.randn(500, generator=torch.Generator().manual_seed(0))
    q = torch.randn(500, generator=torch.Generator().manual_seed(1))
    assert (kl(p, q, "k3") > 0).all() and (kl(p, q, "k2") > 0).all()
    assert not any(kl(p, p, name).any() for name in ("k1", "k2", "k3"))


def finite_at_log_ratios_of_100(kl: Callable) -> None:
    p = torch.tensor([-100.0, 0.0], requires_grad=True)
    values = kl(p, torch.tensor([0.0, -100.0]), "k3")
    values.sum().backward()
    assert values.isfinite().all() and p.grad.isfinite().all()


def exact_at_log_ratios_within_20(kl: Callable) -> None:
    p, q = torch.zeros(81), torch.linspace(-20, 20, 81)
    torch.testing.assert_close(kl(p, q, "k3"), with_a_plain_exp(p, q, "k3"))


def with_a_plain_exp(p: torch.Tensor, q: torch.Tensor, estimator: str) -> torch.Tensor:
    return (q - p).exp() - 1 - (q - p)


def clamped_at_log_ratios_of_2(p: torch.Tensor, q: torch.Tensor, estimator: str) -> torch.Tensor:
    return kl_divergence(p, p + (q - p).clamp(-2, 2), estimator)


def sides_swapped(p: torch.Tensor, q: torch.Tensor, estimator: str) -> torch.Tensor:
    return kl_divergence(q, p, estimator)


def detached(p: torch.Tensor, q: torch.Tensor, estimator: str) -> torch.Tensor:
    return kl_divergence(p.detach(), q, estimator) + 0.0 * p


def without_its_minus_one(p: torch.Tensor, q: torch.Tensor, estimator: str) -> torch.Tensor:
    return kl_divergence(p, q, estimator) + 1


def k1_for_all(p: torch.Tensor, q: torch.Tensor, estimator: str) -> torch.Tensor:
    return p - q


KL: Known = [
    ("T7", k1_has_the_value_and_no_gradient, [sides_swapped, without_its_minus_one]),
    ("T7", k2_has_the_gradient_of_the_reverse_kl, [detached, k1_for_all]),
    ("T7", k3_has_the_value_of_one_and_the_gradient_of_the_other, [sides_swapped, detached, k1_for_all]),
    ("T7", never_negative_and_zero_at_equality, [without_its_minus_one, k1_for_all]),
    ("T25", finite_at_log_ratios_of_100, [with_a_plain_exp]),
    ("T25", exact_at_log_ratios_within_20, [clamped_at_log_ratios_of_2]),
]


@pytest.mark.parametrize("holds", holding(KL))
def test_kl_property_holds(holds: Property):
    holds(kl_divergence)


@pytest.mark.parametrize(("holds", "mutant"), twins(KL))
def test_broken_kl_is_caught(holds: Property, mutant: Callable):
    with pytest.raises(AssertionError):
        holds(mutant)


def test_unknown_estimator_is_one_line():
    with pytest.raises(ValueError, match="kl_estimator: found 'k4', allowed: 'k1'") as error:
        kl_divergence(torch.zeros(1), torch.zeros(1), "k4")
    assert "\n" not in str(error.value)
