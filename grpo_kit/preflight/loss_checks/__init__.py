"""The trap doctor: known mistakes of GRPO code, looked for in anyone's loss (`grpo-kit doctor module:function`)."""

from grpo_kit.preflight.loss_checks.examine import FALLS_IN, NOT_ASKED, OK, QUESTIONS, Finding, Question, examine, table
from grpo_kit.preflight.loss_checks.loading import load_subject, subject_of
from grpo_kit.preflight.loss_checks.subject import NotAsked, Subject

__all__ = [
    "FALLS_IN",
    "NOT_ASKED",
    "OK",
    "QUESTIONS",
    "Finding",
    "NotAsked",
    "Question",
    "Subject",
    "examine",
    "load_subject",
    "subject_of",
    "table",
]
