"""Known mistakes of GRPO code, looked for in anyone's loss function (`grpo-kit doctor module:function`)."""

from grpo_kit.preflight.loss_checks.examine import FALLS_IN, NOT_ASKED, OK, examine, table
from grpo_kit.preflight.loss_checks.subject import NotAsked, Subject, load_subject, subject_of

__all__ = ["FALLS_IN", "NOT_ASKED", "OK", "NotAsked", "Subject", "examine", "load_subject", "subject_of", "table"]
