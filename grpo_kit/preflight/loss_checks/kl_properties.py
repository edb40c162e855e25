"""What the KL term of a correct GRPO loss does (T7), on a policy whose expectations can be enumerated.

A term with the value of a KL need not pull like one: what trains is the mean of its gradient (arXiv 2510.01555).
"""

import math
from dataclasses import replace

import torch

from grpo_kit.preflight.loss_checks.cases import Enumerable, enumerable, on_policy
from grpo_kit.preflight.loss_checks.measures import ROUNDING, percent
from grpo_kit.preflight.loss_checks.subject import NotAsked, Subject


def kl_term_pulls_by_the_gradient_of_a_kl(subject: Subject) -> str:
    """T7, on-policy, in exact expectation: k1 as a loss gives 0, k2 ∇KL(π‖ref), k3 ∇KL(ref‖π); k3 is never negative.

    With an importance weight that carries gradient each gives ∇KL(π‖ref), which is as well. An unnamed estimator has to
    give one of the two.
    """
    case = enumerable()
    subject.need("ref_logprobs", "it has no KL term")
    if "kl_estimator" not in subject.takes:
        return f"{_which_kl(subject, case, {})} in expectation"
    plain = {"use_bias_correction_kl": False} if "use_bias_correction_kl" in subject.takes else {}
    names = [name for name in ("k1", "k2", "k3") if subject.has("kl_estimator", name)]
    found = {name: _which_kl(subject, case, plain | {"kl_estimator": name}, stated=name) for name in names}
    if "k3" in found:
        lowest = _lowest_kl(subject, plain | {"kl_estimator": "k3"})
        assert lowest >= -1e-5, f"k3 is {lowest:.2g} for one sample: it can never be negative"
    return ", ".join(f"{name} {gradient}" for name, gradient in found.items())


def kl_term_is_weighted_off_policy(subject: Subject) -> str:
    """T7, off-policy: samples of an older policy give the KL's gradient only with the importance weight.

    Without it the term still pulls to the reference, but at samples that the policy no longer draws: a stated bias of
    GRPO (arXiv 2510.01555, 2512.02556). Where a function offers the weight as a setting, it is asked with it.
    """
    subject.need("ref_logprobs", "it has no KL term")
    subject.need("old_logprobs", "on-policy only")
    case = enumerable(off_policy=True)
    if "use_bias_correction_kl" not in subject.takes:
        return f"{_which_kl(subject, case, {}, weighted=True)} from samples of an older policy"
    found = _which_kl(subject, case, {"use_bias_correction_kl": True}, weighted=True)
    bias = _off_any_kl(subject, case, {"use_bias_correction_kl": False})
    return f"{found} with use_bias_correction_kl; {percent(bias)} off without it"


def _kl_gradient(subject: Subject, case: Enumerable, settings: dict[str, object]) -> torch.Tensor:
    """(actions,) exact expectation of what the KL term adds to the gradient, at beta 1 where there is a beta."""
    if "beta" in subject.takes:
        full, rest = (subject.run(case.batch, **settings | {"beta": beta}) for beta in (1.0, 0.0))
        by_row, value = full.gradient - rest.gradient, float(full.loss - rest.loss)
    else:  # its weight is fixed: equal rewards leave the KL term alone
        answer = subject.run(case.batch.rewarded(torch.zeros(16, dtype=torch.float64)), **settings)
        by_row, value = answer.gradient, float(answer.loss)
        if not by_row.any() and value == 0:
            raise NotAsked("has no KL term")
    assert bool(by_row.isfinite().all()), "the KL term's gradient is not finite"
    assert bool(by_row.any()), f"the KL term carries no gradient (its value is {value:.2g})"
    return case.gradient(by_row)


def _which_kl(
    subject: Subject, case: Enumerable, settings: dict[str, object], stated: str = "", weighted: bool = False
) -> str:
    """Of which KL the term's mean gradient is, up to a factor; an AssertionError where it is of none."""
    found = _kl_gradient(subject, case, settings)
    name = f"{stated}: " if stated else ""
    reverse, forward = case.kl_gradient(forward=False), case.kl_gradient(forward=True)
    if float(found.norm()) <= ROUNDING * float(reverse.norm()):
        assert stated == "k1", (
            f"{name}the KL term's mean gradient is 0: it does not pull to the reference (k1 as a loss)"
        )
        return "0"
    if _residual(found, reverse) <= 10 * ROUNDING:
        return "∇KL(π‖ref)"
    allowed_forward = stated in ("", "k3")
    if allowed_forward and _residual(found, forward) <= 10 * ROUNDING:
        return "∇KL(ref‖π)"
    least = min(_residual(found, reverse), _residual(found, forward) if allowed_forward else math.inf)
    why = "no importance weight: " if weighted else ""
    raise AssertionError(f"{name}{why}the KL term's mean gradient is {percent(least)} off any KL's")


def _off_any_kl(subject: Subject, case: Enumerable, settings: dict[str, object]) -> float:
    found = _kl_gradient(subject, case, settings)
    return min(_residual(found, case.kl_gradient(forward)) for forward in (False, True))


def _residual(found: torch.Tensor, target: torch.Tensor) -> float:
    """The part of a gradient that is not a positive multiple of another, relative to its length."""
    factor = ((found * target).sum() / target.square().sum()).clamp(min=0)
    return float((found - factor * target).norm() / found.norm())


def _lowest_kl(subject: Subject, settings: dict[str, object]) -> float:
    """The least KL term of one sample, over 50 pairs of probabilities."""
    source = torch.Generator().manual_seed(0)
    lowest = math.inf
    for p, q in (-4 * torch.rand(50, 2, generator=source, dtype=torch.float64) - 0.01).tolist():
        batch = on_policy()
        same = {name: torch.full_like(batch.logprobs, p) for name in ("logprobs", "old_logprobs")}
        batch = replace(batch, ref_logprobs=torch.full_like(batch.logprobs, q), **same)
        with_kl, without = (float(subject.run(batch, **settings | {"beta": beta}).loss) for beta in (1.0, 0.0))
        lowest = min(lowest, with_kl - without)
    return lowest
