"""What a correct GRPO loss does: each function asks one property of CORRECTNESS.md of a subject.

A property returns what it measured in a few words, raises AssertionError with the measured figure where the subject
falls into the trap, and NotAsked where the subject gives no chance to find out. None knows how a loss is written: they
look at its value and its gradient. What CORRECTNESS.md leaves open (loss types, clipping) is reported, not failed.
"""

import itertools
import math
from collections import defaultdict
from dataclasses import fields, replace

import torch

from grpo_kit.preflight.loss_checks.cases import EQUAL, LENGTHS, Batch, at_ratios, drifted, on_policy
from grpo_kit.preflight.loss_checks.measures import ROUNDING, exactly, off, percent, within
from grpo_kit.preflight.loss_checks.subject import NotAsked, Subject

# lengths 10 and 100: how much more a token of the short row weighs (arXiv 2503.20783 and the loss types' own papers)
STATED_LENGTH_SHARE = {"grpo": 10.0, "sapo": 10.0} | dict.fromkeys(
    ("bnpo", "dr_grpo", "dapo", "cispo", "luspo", "vespo"), 1.0
)


def ratio_is_one_before_the_first_update(subject: Subject) -> str:
    """T1: where the policy is the one that sampled, the gradient is that of -Σ w A log π, and nothing is clipped."""
    batch = on_policy()
    for variant in subject.variants():
        alike = _policy_gradient(subject, replace(batch, ref_logprobs=batch.logprobs), variant)
        assert bool(alike.all()), f"{_no_gradient(alike)}{within(variant)}"
        ratio = _policy_gradient(subject, batch, variant) / alike
        spread = f"ratio {float(ratio.min()):.2f} to {float(ratio.max()):.2f} though the policy is the one that sampled"
        assert float((ratio - 1).abs().max()) <= ROUNDING, spread + within(variant)
        if "advantages" in subject.takes:
            _assert_constant(-alike / batch.advantages.unsqueeze(1), "gradient / -A", variant)
        else:
            assert float((alike.sum(dim=1) * batch.advantages).sum()) < 0, "better samples are made less likely"
        metrics = subject.run(batch, **variant).metrics
        clipped = {name: value for name, value in metrics.items() if "clip" in name and value}
        assert not clipped, f"{min(clipped)} is {clipped[min(clipped)]:.2f} though the policy is the one that sampled"
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
            assert math.isclose(*losses, rel_tol=ROUNDING, abs_tol=1e-6), (
                f"loss {losses[0]:.3f} or {losses[1]:.3f} by the reference"
            )
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
    return "lengths 10 and 100: " + "; ".join(
        f"{' '.join(names)} {share}".strip() + (_meaning(share) if names == [""] else "")
        for share, names in shares.items()
    )


def nothing_after_the_end_counts(subject: Subject, garbage: tuple[float, ...] = (-30.0, -0.5)) -> str:
    """T10: whatever stands in the padding, loss and gradient are the same, and padding gets no gradient."""
    batch = drifted(1)
    most = 0.0
    for variant, value in itertools.product(subject.variants(), garbage):
        plain, other = (subject.run(case, **variant, beta=0.1) for case in (batch, _with_padding(batch, value)))
        outside = float(other.gradient[~batch.mask].abs().max())
        unmasked = "" if "mask" in subject.takes else " (it takes no mask)"
        assert outside == 0, f"padding gets gradient, up to {outside:.2g}{unmasked}{within(variant)}"
        for what, moved in (("loss", off(other.loss, plain.loss)), ("gradient", off(other.gradient, plain.gradient))):
            assert moved <= ROUNDING, f"padding changes the {what} by {percent(moved)}{within(variant)}"
            most = max(most, moved)
    return f"padding changes nothing and gets no gradient{exactly(most)}"


def parts_add_up_to_the_whole(subject: Subject) -> str:
    """T14: micro-batches, cut along groups and told the whole batch's weights where possible, give its gradient."""
    batch, told = _four_groups(), "weights" in subject.takes
    weights = batch.mask / batch.mask.sum() * torch.linspace(0.5, 2, len(batch.mask)).unsqueeze(1).double()
    fitting: dict[str, list[str]] = defaultdict(list)
    for variant in subject.variants():
        settings = variant | {"beta": 0.1, "max_completion_length": 9, "num_items_in_batch": float(batch.mask.sum())}
        rule, name = _adding_rule(subject, batch, settings, weights if told else None), variant.get("loss_type", "")
        fitting[rule] += [name] * (name not in fitting[rule])
    if told:
        return "parts told the whole batch's weights add up to its gradient"
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
    """T22: where the policy already went too far with the advantage it may stop; the other way it must go on.

    Clipping at all is a choice; where clip metrics are reported, they count the active side only.
    """
    _need_ratio(subject)
    batch = at_ratios([math.log(ratio) for ratio in (1.5, 0.5, 1.5, 0.5, 1.1, 0.9)], [1, -1, -1, 1, 1, -1])
    answer = subject.run(batch, **_clipping_type(subject))
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
    """T22: as its ratio grows, a bad sample's loss grows without delta and stops at delta with it.

    Having no delta is a choice; what that leaves open is said.
    """
    _need_ratio(subject)
    settings = _clipping_type(subject)
    if "delta" not in subject.takes:
        pushes = [_push_of_a_bad_row(subject, log_ratio, settings) for log_ratio in (0.0, 5.0)]
        times = pushes[1] / pushes[0]
        open_side = "unbounded, as PPO's clip leaves it" if times > 10 else "bounded"
        raise NotAsked(f"takes no delta; at ratio e^5 a bad sample pushes {times:.3g} × as hard: {open_side}")
    free, bound = (
        [_effective_ratio(subject, x, settings | {"delta": delta}) for x in (1.0, 5.0, 9.0)] for delta in (None, 4.0)
    )
    assert free[0] < free[1] < free[2], f"bounded at {free[2]:.3g} though delta is None"
    assert all(math.isclose(x, 4.0, rel_tol=1e-3) for x in bound[1:]), f"delta 4: a ratio of e^9 counts {bound[2]:.4g}"
    assert math.isclose(bound[0], free[0], rel_tol=1e-3), f"delta 4 changes ratio {free[0]:.3g}, which lies below it"
    return f"a bad sample's ratio of e^9 counts {bound[2]:.3g} with delta 4, {free[2]:.4g} without delta"


def flat_groups_give_no_gradient(subject: Subject) -> str:
    """T23: equal rewards within each group and beta 0 leave nothing to learn, exactly."""
    if "beta" not in subject.takes and "ref_logprobs" in subject.takes:
        raise NotAsked("takes no beta: its KL cannot be switched off")
    levels = torch.tensor([0.1] * 3 + [0.7] * 3, dtype=torch.float64)
    batch = replace(on_policy().rewarded(levels), advantages=torch.zeros(6, dtype=torch.float64)).single()
    for variant in subject.variants():
        largest = float(subject.run(batch, **variant).gradient.abs().max())
        assert largest == 0, f"two groups, each of equal rewards, beta 0: gradient up to {largest:.2g}{within(variant)}"
    return "groups of equal rewards, beta 0: gradient exactly 0"


def far_ratios_stay_finite(subject: Subject) -> str:
    """T25: in float32, log-ratios of ±100 (to the sampler and to the reference) leave loss and gradient finite."""
    batch = drifted(2).single()
    for variant, shift in itertools.product(subject.variants(), (100.0, -100.0)):
        if shift > 0:
            far = replace(batch, old_logprobs=batch.old_logprobs - shift, ref_logprobs=batch.ref_logprobs - shift)
        else:
            far = replace(batch, logprobs=batch.logprobs + shift)
        answer = subject.run(far, **variant, beta=0.1)
        finite = bool(answer.loss.isfinite()) and bool(answer.gradient.isfinite().all())
        loss, bad = float(answer.loss), int((~answer.gradient.isfinite()).sum())
        assert finite, (
            f"log-ratio {shift:+.0f}: loss {loss:.2g}, {bad} of 42 gradient entries not finite{within(variant)}"
        )
    return "finite at log-ratios of ±100"


# --- what the properties above share ----------------------------------------------------------------------------------


def _policy_gradient(subject: Subject, batch: Batch, settings: dict[str, object]) -> torch.Tensor:
    """(N, T) gradient of the loss without its KL term, also where that cannot be switched off."""
    gradient = subject.run(batch, **settings).gradient
    if "beta" in subject.takes or "ref_logprobs" not in subject.takes:
        return gradient
    idle = subject.run(batch.rewarded(torch.zeros_like(batch.rewards)), **settings).gradient
    if not idle.isfinite().all():
        raise NotAsked("takes no beta, and equal rewards give no number: its KL cannot be told from the rest")
    return gradient - idle


def _four_groups() -> Batch:
    """Eight rows of four groups."""
    batch = drifted(4, lengths=(*LENGTHS, 3, 5))
    return replace(batch, group_ids=torch.arange(8) // 2).rewarded(batch.rewards)


def _adding_rule(subject: Subject, batch: Batch, settings: dict[str, object], weights: torch.Tensor | None) -> str:
    """How parts have to be added to give the whole's gradient: as they are, by their share of rows or of tokens."""
    whole = subject.run(batch, **settings | ({} if weights is None else {"weights": weights})).gradient
    rules = {"as they are": lambda keep: 1.0}
    if weights is None:
        rules["by their share of rows"] = lambda keep: len(keep) / len(batch.mask)
        rules["by their share of tokens"] = lambda keep: float(batch.mask[keep].sum() / batch.mask.sum())
    worst: dict[str, float] = {}
    for rule, share in rules.items():
        worst[rule] = 0.0
        for size in (2, 4, 6):
            total = torch.zeros_like(whole)
            for keep in torch.arange(8).split(size):
                own = {} if weights is None else {"weights": weights[keep]}
                total[keep] += share(keep) * subject.run(batch.rows(keep), **settings | own).gradient
            worst[rule] = max(worst[rule], off(total, whole))
        if worst[rule] <= 10 * ROUNDING:  # sums of differently many terms
            return rule
    kind = f"{settings['loss_type']}: " if "loss_type" in settings else ""
    told = "told the whole batch's weights " if weights is not None else ""
    raise AssertionError(f"{kind}micro-batches {told}miss the whole's gradient by {percent(min(worst.values()))}")


def _clipping_type(subject: Subject) -> dict[str, object]:
    """GRPO's own type where the function has types: some of the others have no clip and no delta."""
    return subject.forms().get("grpo", {})


def _need_ratio(subject: Subject) -> None:
    """Cases give the reference the sampler's probabilities, so a ratio to either will do."""
    if not subject.takes & {"old_logprobs", "ref_logprobs"}:
        raise NotAsked("takes no old_logprobs: there is no ratio")


def _push_of_a_bad_row(subject: Subject, log_ratio: float, settings: dict[str, object]) -> float:
    """Length of the gradient that a row with a negative advantage gets at a log-ratio; the other row has ratio 1."""
    return float(subject.run(at_ratios([0.0, log_ratio], [1, -1]), **settings).gradient[1].norm())


def _effective_ratio(subject: Subject, log_ratio: float, settings: dict[str, object]) -> float:
    """The ratio that a bad row's loss counts: 1 + growth of the loss over the row's weight."""
    start, far = (subject.run(at_ratios([0.0, x], [1, -1]), **settings) for x in (0.0, log_ratio))
    return 1 + float((far.loss - start.loss) / start.gradient[1].sum())


def _with_padding(batch: Batch, value: float) -> Batch:
    """The batch with other numbers after each row's end, a different one in each tensor."""
    names = [field.name for field in fields(batch) if field.name.endswith("logprobs")]
    spoiled = {name: getattr(batch, name).where(batch.mask, value * (1 + i / 8)) for i, name in enumerate(names)}
    return replace(batch, **spoiled)


def _assert_constant(values: torch.Tensor, what: str, variant: dict[str, object]) -> None:
    low, high = float(values.min()), float(values.max())
    assert low > 0 and high - low <= ROUNDING * high, f"{what} lies between {low:.2g} and {high:.2g}{within(variant)}"


def _no_gradient(gradient: torch.Tensor) -> str:
    return f"{int((gradient == 0).sum())} of {gradient.numel()} tokens get no gradient"


def _meaning(share: str) -> str:
    meanings = {"10 : 1": " (a mean of row means, as GRPO states)", "1 : 1": " (no length bias)"}
    return meanings.get(share, "")
