"""Ask a subject every property, and lay the findings out as a table."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grpo_kit.preflight.loss_checks import group_properties, kl_properties, properties
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


QUESTIONS = (
    Question(
        "T1",
        "training and rollout disagree",
        "DanceGRPO and flow_grpo READMEs",
        properties.ratio_is_one_before_the_first_update,
    ),
    Question(
        "T2",
        "ratio against the reference",
        "the classic VLM-GRPO formula",
        properties.reference_is_ignored_without_kl,
    ),
    Question("T3", "leakage between groups", "Search-R1 #88, flow_grpo #46", group_properties.groups_do_not_leak),
    Question("T4", "order matters", '"returns" across prompts', group_properties.order_does_not_matter),
    Question("T4", "equal rewards", '"returns" across prompts', group_properties.equal_rewards_give_exactly_zero),
    Question(
        "T5",
        "scaling by the deviation",
        "arXiv 2503.20783, 2508.20751",
        group_properties.scaling_is_the_stated_one,
    ),
    Question("T6", "length bias", "arXiv 2503.20783, verl docs", properties.length_bias_is_the_stated_one),
    Question(
        "T7",
        "KL gradient, on-policy",
        "arXiv 2510.01555, NeMo-RL #2506",
        kl_properties.kl_term_pulls_by_the_gradient_of_a_kl,
    ),
    Question(
        "T7",
        "KL gradient, off-policy",
        "arXiv 2510.01555, NeMo-RL #2506",
        kl_properties.kl_term_is_weighted_off_policy,
    ),
    Question("T10", "end of sequence", "trl PR 2708, verl #3805", properties.nothing_after_the_end_counts),
    Question("T14", "micro-batches", "trl #5619, ms-swift #10117", properties.parts_add_up_to_the_whole),
    Question(
        "T16",
        "failed sample as a reward",
        "trl's unscorable rows",
        group_properties.unscored_rows_are_as_if_they_were_not_there,
    ),
    Question("T17", "silent stabilisers", "±20 clamps of logits", properties.logprobs_are_not_clamped),
    Question("T21", "loss 0 read as failure", "trl #3452", properties.a_loss_of_zero_still_learns),
    Question("T22", "clip on its active side", "INTELLECT-2", properties.clip_acts_on_its_active_side_alone),
    Question("T22", "unbounded negative side", "INTELLECT-2", properties.delta_bounds_the_negative_side),
    Question("T23", "flat groups move weights", "trl #5588", properties.flat_groups_give_no_gradient),
    Question("T25", "overflow", "trl #3015", properties.far_ratios_stay_finite),
)


def examine(subject: Subject, questions: Sequence[Question] = QUESTIONS) -> list[Finding]:
    """Ask the questions, all of them unless told otherwise; an error that the subject raises is a finding too."""
    return [_asked(subject, question) for question in questions]


def _asked(subject: Subject, question: Question) -> Finding:
    try:
        outcome, shown = OK, question.asks(subject)
    except NotAsked as reason:
        outcome, shown = NOT_ASKED, str(reason)
    except AssertionError as figure:
        outcome, shown = FALLS_IN, str(figure)
    except Exception as error:  # foreign code may raise anything
        lines = str(error).strip().splitlines() or ["no further text"]
        outcome, shown = FALLS_IN, f"raises {type(error).__name__}: {lines[0]:.120}"
    return Finding(question.trap, question.title, outcome, shown, question.source)


def table(findings: list[Finding], width: int = 100) -> str:
    """The findings as aligned text of at most `width` columns, with a line of totals below."""
    titles = max(len(finding.title) for finding in findings)
    lines = [f"{'trap':5}{'outcome':11}{'':{titles + 2}}found"]
    for finding in findings:
        shown = finding.shown
        if finding.outcome == FALLS_IN:
            shown += f" [seen in: {finding.source}]"
        head = f"{finding.trap:5}{finding.outcome.upper() if finding.outcome == FALLS_IN else finding.outcome:11}"
        head += f"{finding.title:{titles + 2}}"
        lines += textwrap.wrap(shown, width, initial_indent=head, subsequent_indent=" " * len(head))
    counts = [sum(finding.outcome == outcome for finding in findings) for outcome in (OK, FALLS_IN, NOT_ASKED)]
    return "\n".join([*lines, f"{counts[0]} ok, {counts[1]} fallen into, {counts[2]} not asked"])
