"""The trap doctor: known mistakes of GRPO code, looked for in anyone's loss (`grpo-kit doctor module:function`)."""

from grpo_kit.doctor.examine import FALLS_IN, NOT_ASKED, OK, QUESTIONS, Finding, Question, examine, table
from grpo_kit.doctor.loading import load_subject, subject_of
from grpo_kit.doctor.subject import NotAsked, Subject

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
