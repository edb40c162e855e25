"""Ask a subject every property, and lay the findings out as a table."""

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grpo_kit.config import one_line
from grpo_kit.preflight.loss_checks import group_properties as group
from grpo_kit.preflight.loss_checks import loss_properties as loss
from grpo_kit.preflight.loss_checks.subject import NotAsked, Subject

OK, FALLS_IN, NOT_ASKED = "ok", "falls in", "not asked"


@dataclass(frozen=True)
class Question:
    """A row of CORRECTNESS.md that can be asked of a pure function."""

    trap: str
    title: str
    source: str  # who made the mistake in public, or where it is described
    asks: Callable[[Subject], str]


@dataclass(frozen=True)
class Finding:
    """What came of a question: an outcome of OK, FALLS_IN or NOT_ASKED, with the measured figure or the reason."""

    trap: str
    title: str
    outcome: str
    shown: str
    source: str = ""


QUESTIONS = tuple(
    Question(*row)
    for row in (
        ("T1", "training and rollout disagree", "DanceGRPO and flow_grpo READMEs", loss.ratio_starts_at_one),
        ("T2", "ratio against the reference", "the classic VLM-GRPO formula", loss.reference_is_ignored_without_kl),
        ("T3", "leakage between groups", "Search-R1 #88, flow_grpo #46", group.groups_do_not_leak),
        ("T4", "order matters", '"returns" across prompts', group.order_does_not_matter),
        ("T4", "equal rewards", '"returns" across prompts', group.equal_rewards_give_exactly_zero),
        ("T5", "scaling by the deviation", "arXiv 2503.20783, 2508.20751", group.scaling_is_the_stated_one),
        ("T6", "length bias", "arXiv 2503.20783, verl docs", loss.length_bias_is_the_stated_one),
        ("T7", "KL gradient, on-policy", "arXiv 2510.01555, NeMo-RL #2506", loss.kl_term_has_the_gradient_of_a_kl),
        ("T7", "KL gradient, off-policy", "arXiv 2510.01555, NeMo-RL #2506", loss.kl_term_is_weighted_off_policy),
        ("T10", "end of sequence", "trl PR 2708, verl #3805", loss.nothing_after_the_end_counts),
        ("T14", "micro-batches", "trl #5619, ms-swift #10117", loss.parts_add_up_to_the_whole),
        ("T16", "failed sample as a reward", "trl's unscorable rows", group.unscored_rows_change_nothing),
        ("T17", "silent stabilisers", "±20 clamps of logits", loss.logprobs_are_not_clamped),
        ("T21", "loss 0 read as failure", "trl #3452", loss.a_loss_of_zero_still_learns),
        ("T22", "clip on its active side", "INTELLECT-2", loss.clip_acts_on_its_active_side_alone),
        ("T22", "unbounded negative side", "INTELLECT-2", loss.delta_bounds_the_negative_side),
        ("T23", "flat groups move weights", "trl #5588", loss.flat_groups_give_no_gradient),
        ("T25", "overflow", "trl #3015", loss.far_ratios_stay_finite),
    )
)


def examine(subject: Subject, questions: Sequence[Question] = QUESTIONS) -> list[Finding]:
    """Ask the questions; an error that the subject raises is a finding too."""
    findings = []
    for question in questions:
        try:
            outcome, shown = OK, question.asks(subject)
        except NotAsked as reason:
            outcome, shown = NOT_ASKED, str(reason)
        except AssertionError as figure:
            outcome, shown = FALLS_IN, str(figure)
        except Exception as error:  # foreign code may raise anything
            outcome, shown = FALLS_IN, f"raises {type(error).__name__}: {one_line(error, 120)}"
        findings.append(Finding(question.trap, question.title, outcome, shown, question.source))
    return findings


def table(findings: list[Finding], width: int = 100) -> str:
    """The findings as aligned text of at most `width` columns, with a line of totals below."""
    titles = max(len(finding.title) for finding in findings) + 2
    lines = [f"{'trap':5}{'outcome':11}{'':{titles}}found"]
    for finding in findings:
        outcome, seen_in = finding.outcome, ""
        if outcome == FALLS_IN:
            outcome, seen_in = outcome.upper(), f" [seen in: {finding.source}]"
        head = f"{finding.trap:5}{outcome:11}{finding.title:{titles}}"
        lines += textwrap.wrap(finding.shown + seen_in, width, initial_indent=head, subsequent_indent=" " * len(head))
    counts = Counter(finding.outcome for finding in findings)
    return "\n".join([*lines, f"{counts[OK]} ok, {counts[FALLS_IN]} fallen into, {counts[NOT_ASKED]} not asked"])
