"""What a correct GRPO loss does: each function asks one property of a subject, by its value and its gradient.

It returns what it measured in a few words, raises AssertionError with the measured figure where the subject falls into
the trap, and NotAsked where the subject gives no chance to find out. A choice (loss type, clipping) is reported only.
"""

import itertools
import math
from collections import defaultdict
from dataclasses import replace

import torch

from grpo_kit.grpo import LOSS_TYPES
from grpo_kit.preflight.loss_checks.cases import (
    EQUAL,
    LENGTHS,
    ROUNDING,
    Batch,
    Enumerable,
    at_ratios,
    drifted,
    enumerable,
    exactly,
    off,
    on_policy,
    percent,
    within,
)
from grpo_kit.preflight.loss_checks.subject import NotAsked, Subject

# lengths 10 and 100: how much more a token of the short row weighs (arXiv 2503.20783 and the loss types' own papers)
STATED_LENGTH_SHARE = {name: 10.0 if name in ("grpo", "sapo") else 1.0 for name in LOSS_TYPES}
_LENGTH_SHARES = {"10 : 1": " (a mean of row means, as GRPO states)", "1 : 1": " (no length bias)"}


def ratio_starts_at_one(subject: Subject) -> str:
    """T1: where the policy is the one that sampled, the gradient is that of -Σ w A log π, and nothing is clipped."""
    batch, though = on_policy(), "though the policy is the one that sampled"
    for variant in subject.variants():
        alike = _policy_gradient(subject, replace(batch, ref_logprobs=batch.logprobs), variant)
        assert bool(alike.all()), f"{_no_gradient(alike)}{within(variant)}"
        ratio = _policy_gradient(subject, batch, variant) / alike
        found = f"ratio {float(ratio.min()):.2f} to {float(ratio.max()):.2f} {though}"
        assert float((ratio - 1).abs().max()) <= ROUNDING, found + within(variant)
        if "advantages" in subject.takes:
            weights = -alike / batch.advantages.unsqueeze(1)
            low, high = float(weights.min()), float(weights.max())
            found = f"gradient / -A lies between {low:.2g} and {high:.2g}{within(variant)}"
            assert low > 0 and high - low <= ROUNDING * high, found
        else:
            assert float((alike.sum(dim=1) * batch.advantages).sum()) < 0, "better samples are made less likely"
        metrics = subject.run(batch, **variant).metrics
        clipped = {name: value for name, value in metrics.items() if "clip" in name and value}
        assert not clipped, f"{min(clipped)} is {clipped[min(clipped)]:.2f} {though}"
    return "ratio 1: the gradient is -w A; nothing clipped"


def reference_is_ignored_without_kl(subject: Subject) -> str:
    """T2: with beta 0 the reference changes neither loss nor gradient."""
    subject.need("ref_logprobs")
    batch = on_policy()
    other = replace(batch, ref_logprobs=drifted(9, lengths=EQUAL).ref_logprobs)
    most = 0.0
    for variant in subject.variants():
        one, two = (_policy_gradient(subject, case, variant) for case in (batch, other))
        assert bool(one.isfinite().all()), f"gradient is not finite{within(variant)}"
        moved = off(two, one)
        assert moved <= ROUNDING, f"another reference changes the gradient by {percent(moved)}{within(variant)}"
        most = max(most, moved)
        if "beta" in subject.takes:
            losses = [float(subject.run(case, **variant).loss) for case in (batch, other)]
            same = math.isclose(*losses, rel_tol=ROUNDING, abs_tol=1e-6)
            assert same, f"loss {losses[0]:.3f} or {losses[1]:.3f} by the reference"
    return f"another reference changes nothing without the KL term{exactly(most)}"


def length_bias_is_the_stated_one(subject: Subject) -> str:
    """T6: what a token of a row of 10 weighs against one of a row of 100. 10 : 1 is GRPO's own mean of row means."""
    batch = on_policy(lengths=(10, 100)).rewarded(torch.tensor([1.0, -1.0], dtype=torch.float64))
    batch = replace(batch, ref_logprobs=batch.logprobs)
    shares: dict[str, list[str]] = defaultdict(list)
    for name, settings in subject.forms().items():
        gradient = _policy_gradient(subject, batch, settings)
        share = float((gradient[0, 0] / gradient[1, 0]).abs())
        assert math.isfinite(share) and share > 0, f"{_no_gradient(gradient)}{within(settings)}"
        stated = STATED_LENGTH_SHARE.get(name, share)
        assert math.isclose(share, stated, rel_tol=ROUNDING), f"{name} gives {share:.3g} : 1, states {stated:.3g} : 1"
        shares[f"{share:.3g} : 1"].append(name)
    found = (
        share + _LENGTH_SHARES.get(share, "") if names == [""] else f"{' '.join(names)} {share}"
        for share, names in shares.items()
    )
    return f"lengths 10 and 100: {'; '.join(found)}"


def kl_term_has_the_gradient_of_a_kl(subject: Subject) -> str:
    """T7, on-policy, in exact expectation: k1 as a loss gives 0, k2 ∇KL(π‖ref), k3 ∇KL(ref‖π); k3 is never negative.

    What trains is the mean of the term's gradient (arXiv 2510.01555). With an importance weight that carries gradient
    each estimator gives ∇KL(π‖ref), which is right too. An unnamed estimator has to give one of the two.
    """
    subject.need("ref_logprobs", "it has no KL term")
    case = enumerable()
    if "kl_estimator" not in subject.takes:
        return f"{_which_kl(subject, case, {})} in expectation"
    plain = {"use_bias_correction_kl": False} if "use_bias_correction_kl" in subject.takes else {}
    names = [name for name in ("k1", "k2", "k3") if subject.has("kl_estimator", name)]
    found = {name: _which_kl(subject, case, plain | {"kl_estimator": name}, stated=name) for name in names}
    if "k3" in found:
        lowest, batch, source = math.inf, on_policy(), torch.Generator().manual_seed(0)
        for p, q in (-4 * torch.rand(50, 2, generator=source, dtype=torch.float64) - 0.01).tolist():
            own, reference = (torch.full_like(batch.logprobs, value) for value in (p, q))
            one = replace(batch, logprobs=own, old_logprobs=own, ref_logprobs=reference)
            settings = plain | {"kl_estimator": "k3"}
            with_kl, without = (float(subject.run(one, **settings | {"beta": beta}).loss) for beta in (1.0, 0.0))
            lowest = min(lowest, with_kl - without)
        assert lowest >= -1e-5, f"k3 is {lowest:.2g} for one sample: it can never be negative"
    return ", ".join(f"{name} {gradient}" for name, gradient in found.items())


def kl_term_is_weighted_off_policy(subject: Subject) -> str:
    """T7, off-policy: samples of an older policy give the KL's gradient only with the importance weight.

    Its lack is a stated bias of GRPO (arXiv 2510.01555, 2512.02556). Offered as a setting, the weight is asked for.
    """
    subject.need("ref_logprobs", "it has no KL term")
    subject.need("old_logprobs", "on-policy only")
    case = enumerable(off_policy=True)
    if "use_bias_correction_kl" not in subject.takes:
        return f"{_which_kl(subject, case, {}, weighted=True)} from samples of an older policy"
    found = _which_kl(subject, case, {"use_bias_correction_kl": True}, weighted=True)
    biased = _kl_gradient(subject, case, {"use_bias_correction_kl": False})
    bias = min(_residual(biased, case.kl_gradient(forward)) for forward in (False, True))
    return f"{found} with use_bias_correction_kl; {percent(bias)} off without it"


def nothing_after_the_end_counts(subject: Subject, garbage: tuple[float, ...] = (-30.0, -0.5)) -> str:
    """T10: whatever stands in the padding, loss and gradient are the same, and padding gets no gradient."""
    batch = drifted(1)
    most = 0.0
    for variant, value in itertools.product(subject.variants(), garbage):
        names = ("logprobs", "old_logprobs", "ref_logprobs")  # another number after the end in each of them
        padded = {name: getattr(batch, name).where(batch.mask, value * (1 + i / 8)) for i, name in enumerate(names)}
        plain, other = (subject.run(case, **variant, beta=0.1) for case in (batch, replace(batch, **padded)))
        outside = float(other.gradient[~batch.mask].abs().max())
        unmasked = "" if "mask" in subject.takes else " (it takes no mask)"
        assert outside == 0, f"padding gets gradient, up to {outside:.2g}{unmasked}{within(variant)}"
        for what, moved in (("loss", off(other.loss, plain.loss)), ("gradient", off(other.gradient, plain.gradient))):
            assert moved <= ROUNDING, f"padding changes the {what} by {percent(moved)}{within(variant)}"
            most = max(most, moved)
    return f"padding changes nothing and gets no gradient{exactly(most)}"


def parts_add_up_to_the_whole(subject: Subject) -> str:
    """T14: micro-batches, cut along groups and given the whole batch's weights where possible, give its gradient."""
    batch = drifted(4, lengths=(*LENGTHS, 3, 5))
    batch = replace(batch, group_ids=torch.arange(8) // 2).rewarded(batch.rewards)
    weights = None
    if "weights" in subject.takes:
        weights = batch.mask / batch.mask.sum() * torch.linspace(0.5, 2, 8).unsqueeze(1).double()
    fitting: dict[str, list[str]] = defaultdict(list)
    for variant in subject.variants():
        settings = variant | {"beta": 0.1, "max_completion_length": 9, "num_items_in_batch": float(batch.mask.sum())}
        rule, name = _adding_rule(subject, batch, settings, weights), variant.get("loss_type", "")
        fitting[rule] += [name] * (name not in fitting[rule])
    if weights is not None:
        return "parts given the whole batch's weights add up to its gradient"
    listed = "; ".join(f"{' '.join(names)} {rule}".strip() for rule, names in fitting.items())
    return f"takes no weights; parts add up: {listed}"


def logprobs_are_not_clamped(subject: Subject) -> str:
    """T17: an unlikely or a near-certain token is learned from as any other; one advantage is enough to learn."""
    levels = torch.tensor([0.999, 0.95, 0.30, 6e-3, 6e-6, 1e-11, 4e-18], dtype=torch.float64).log()
    logprobs = levels.expand(6, 7).clone()
    batch = replace(on_policy(lengths=(7,) * 6), logprobs=logprobs, old_logprobs=logprobs, ref_logprobs=logprobs)
    for variant in subject.variants():
        gradient = _policy_gradient(subject, batch, variant)
        assert bool(gradient[:, 2].all()), f"{_no_gradient(gradient)}{within(variant)}"
        share = gradient / gradient[:, 2:3]
        worst = int((share - 1).abs().amax(dim=0).argmax())
        found = f"a token of p = {float(levels[worst].exp()):.2g} is weighed {float(share[0, worst]) + 0.0:.2g} ×"
        assert float((share - 1).abs().max()) <= ROUNDING, found + within(variant)
        one = batch.rewarded(torch.tensor([1.0] + [0.0] * 5, dtype=torch.float64))
        norm = float(_policy_gradient(subject, one, variant).norm())
        assert norm > 0, f"gradient norm {norm} where one advantage is not 0{within(variant)}"
    return "p = .999 to 4e-18 weigh the same; one advantage is enough to learn from"


def a_loss_of_zero_still_learns(subject: Subject) -> str:
    """T21: before the first update, whatever the loss's value, there is a gradient where advantages differ from 0."""
    batch = on_policy()
    loss, norm = float(subject.run(batch).loss), float(_policy_gradient(subject, batch, {}).norm())
    assert norm > 0 and math.isfinite(norm), f"loss {loss:.2g}, gradient norm {norm:.2g}: nothing is learned"
    if abs(loss) > 1e-6:
        return f"gradient norm {norm:.2g} (loss {loss:.2g}: not of the form whose value starts at 0)"
    return f"loss 0, gradient norm {norm:.2g}"


def clip_acts_on_its_active_side_alone(subject: Subject) -> str:
    """T22: too far with the advantage it may stop, the other way it must go on; clip metrics count only the former."""
    batch = at_ratios([math.log(ratio) for ratio in (1.5, 0.5, 1.5, 0.5, 1.1, 0.9)], [1, -1, -1, 1, 1, -1])
    answer = subject.run(batch, **_settings_of_clip_and_delta(subject))
    pushes = -answer.gradient[:, 0] * batch.advantages
    lost = int((pushes[2:] <= 0).sum())
    assert not lost, f"{lost} of 4 samples that moved against their advantage, or hardly, get no push back"
    if pushes[:2].any():
        return "ratios 0.5 and 1.5: not clipped, on no side (a choice)"
    for name, rows in {"clip_ratio/low_mean": 1, "clip_ratio/high_mean": 1, "clip_ratio/region_mean": 2}.items():
        found = answer.metrics.get(name, rows / 6)
        assert math.isclose(found, rows / 6, rel_tol=ROUNDING), f"{name} {found:.2f} where {rows} of 6 rows are clipped"
    return "ratios 0.5 and 1.5: clipped where the advantage leads, only there"


def delta_bounds_the_negative_side(subject: Subject) -> str:
    """T22: as its ratio grows, a bad sample's loss grows without delta and stops at delta with it."""
    settings = _settings_of_clip_and_delta(subject)
    if "delta" not in subject.takes:
        start, far = (subject.run(at_ratios([0.0, x], [1, -1]), **settings).gradient[1].norm() for x in (0.0, 5.0))
        times = float(far) / float(start)
        open_side = "unbounded, as PPO's clip leaves it" if times > 10 else "bounded"
        raise NotAsked(f"takes no delta; at ratio e^5 a bad sample pushes {times:.3g} × as hard: {open_side}")
    counted: dict[float | None, list[float]] = defaultdict(list)  # the ratio that a bad row's loss counts
    for delta, log_ratio in itertools.product((None, 4.0), (1.0, 5.0, 9.0)):
        given = settings | {"delta": delta}
        start, far = (subject.run(at_ratios([0.0, x], [1, -1]), **given) for x in (0.0, log_ratio))
        counted[delta].append(1 + float((far.loss - start.loss) / start.gradient[1].sum()))
    free, bound = counted.values()
    assert free[0] < free[1] < free[2], f"bounded at {free[2]:.3g} though delta is None"
    assert all(math.isclose(x, 4.0, rel_tol=1e-3) for x in bound[1:]), f"delta 4: a ratio of e^9 counts {bound[2]:.4g}"
    assert math.isclose(bound[0], free[0], rel_tol=1e-3), f"delta 4 changes ratio {free[0]:.3g}, which lies below it"
    return f"a bad sample's ratio of e^9 counts {bound[2]:.3g} with delta 4, {free[2]:.4g} without delta"


def flat_groups_give_no_gradient(subject: Subject) -> str:
    """T23: equal rewards within each group and beta 0 leave nothing to learn, exactly."""
    if "beta" not in subject.takes and "ref_logprobs" in subject.takes:
        raise NotAsked("takes no beta: its KL cannot be switched off")
    levels = torch.tensor([0.1] * 3 + [0.7] * 3, dtype=torch.float64)
    batch = replace(on_policy().rewarded(levels), advantages=torch.zeros(6, dtype=torch.float64)).in_float32()
    for variant in subject.variants():
        largest = float(subject.run(batch, **variant).gradient.abs().max())
        assert largest == 0, f"two groups, each of equal rewards, beta 0: gradient up to {largest:.2g}{within(variant)}"
    return "groups of equal rewards, beta 0: gradient exactly 0"


def far_ratios_stay_finite(subject: Subject) -> str:
    """T25: in float32, log-ratios of ±100 (to the sampler and to the reference) leave loss and gradient finite."""
    batch = drifted(2).in_float32()
    far = {  # a log-probability stays below 0: what is to be larger by 100 has the others made smaller
        100.0: replace(batch, old_logprobs=batch.old_logprobs - 100, ref_logprobs=batch.ref_logprobs - 100),
        -100.0: replace(batch, logprobs=batch.logprobs - 100),
    }
    for variant, (log_ratio, case) in itertools.product(subject.variants(), far.items()):
        answer = subject.run(case, **variant, beta=0.1)
        loss, bad = float(answer.loss), int((~answer.gradient.isfinite()).sum())
        found = f"log-ratio {log_ratio:+.0f}: loss {loss:.2g}, {bad} of 42 gradient entries not finite"
        assert math.isfinite(loss) and not bad, found + within(variant)
    return "finite at log-ratios of ±100"


def _policy_gradient(subject: Subject, batch: Batch, settings: dict[str, object]) -> torch.Tensor:
    """(N, T) gradient of the loss without its KL term, also where that cannot be switched off."""
    gradient = subject.run(batch, **settings).gradient
    if "beta" in subject.takes or "ref_logprobs" not in subject.takes:
        return gradient
    idle = subject.run(batch.rewarded(torch.zeros_like(batch.rewards)), **settings).gradient
    if not idle.isfinite().all():
        raise NotAsked("takes no beta, and equal rewards give no number: its KL cannot be told from the rest")
    return gradient - idle


def _no_gradient(gradient: torch.Tensor) -> str:
    return f"{int((gradient == 0).sum())} of {gradient.numel()} tokens get no gradient"


def _adding_rule(subject: Subject, batch: Batch, settings: dict[str, object], weights: torch.Tensor | None) -> str:
    """How parts have to be added to give the whole's gradient: as they are, by their share of rows or of tokens."""
    whole = subject.run(batch, **settings | ({} if weights is None else {"weights": weights})).gradient
    rules = {"as they are": lambda keep: 1.0}
    if weights is None:
        rules["by their share of rows"] = lambda keep: len(keep) / len(batch.mask)
        rules["by their share of tokens"] = lambda keep: float(batch.mask[keep].sum() / batch.mask.sum())
    worst = dict.fromkeys(rules, 0.0)
    for rule, share in rules.items():
        for size in (2, 4, 6):
            total = torch.zeros_like(whole)
            for keep in torch.arange(8).split(size):
                own = {} if weights is None else {"weights": weights[keep]}
                total[keep] += share(keep) * subject.run(batch.rows(keep), **settings | own).gradient
            worst[rule] = max(worst[rule], off(total, whole))
        if worst[rule] <= 10 * ROUNDING:  # sums of differently many terms
            return rule
    kind = f"{settings['loss_type']}: " if "loss_type" in settings else ""
    given = "given the whole batch's weights " if weights is not None else ""
    raise AssertionError(f"{kind}micro-batches {given}miss the whole's gradient by {percent(min(worst.values()))}")


def _settings_of_clip_and_delta(subject: Subject) -> dict[str, object]:
    """GRPO's own loss type where there are types, since some of the others have no clip and no delta."""
    if not subject.takes & {"old_logprobs", "ref_logprobs"}:  # the cases give both the sampler's probabilities
        raise NotAsked("takes no old_logprobs: there is no ratio")
    return subject.forms().get("grpo", {})


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


def _which_kl(subject: Subject, case: Enumerable, settings: dict, stated: str = "", weighted: bool = False) -> str:
    """Of which KL the term's mean gradient is, up to a factor; an AssertionError where it is of none."""
    found, reverse = _kl_gradient(subject, case, settings), case.kl_gradient(forward=False)
    term = f"{stated}: the KL term's mean gradient" if stated else "the KL term's mean gradient"
    if float(found.norm()) <= ROUNDING * float(reverse.norm()):
        assert stated == "k1", f"{term} is 0: it does not pull to the reference (k1 as a loss)"
        return "0"
    residuals = {"∇KL(π‖ref)": _residual(found, reverse)}
    if stated in ("", "k3"):
        residuals["∇KL(ref‖π)"] = _residual(found, case.kl_gradient(forward=True))
    nearest = min(residuals, key=residuals.get)
    why = "no importance weight: " if weighted else ""
    assert residuals[nearest] <= 10 * ROUNDING, f"{why}{term} is {percent(residuals[nearest])} off any KL's"
    return nearest


def _residual(found: torch.Tensor, target: torch.Tensor) -> float:
    """The part of a gradient that is not a positive multiple of another, relative to its length."""
    factor = ((found * target).sum() / target.square().sum()).clamp(min=0)
    return float((found - factor * target).norm() / found.norm())
