"""End a run whose updates are skipped again and again, since something is not finite: why, and what to try."""

import logging
from itertools import takewhile

from grpo_kit.config import KitError
from grpo_kit.grpo.finite import NonFinite
from grpo_kit.runs.folder import RunFolder, commit_status

logger = logging.getLogger(__name__)

PATIENCE = 3  # iterations in a row without an update because something was not finite

_PRECISION = "model_settings.dtype float32 or bfloat16 (float16 overflows at 65504)"
ADVICE = {  # the first part of a step that was not finite → what to try
    "weights": f"another model, or {_PRECISION}",
    "sampling": f"{_PRECISION}, or a lower learning_rate",
    "pictures": f"{_PRECISION}, other num_inference_steps, or a lower guidance_scale",
    "rewards": "mending the reward: calculate one picture's with kit.rewards.calculate_reward",
    "reference": _PRECISION,
    "scoring": f"{_PRECISION}, or a lower learning_rate",
    "loss": "smaller rewards (reward_settings.shaping, or scale_rewards group), or a lower learning_rate",
    "gradient": f"a lower learning_rate, or {_PRECISION}",
    "optimizer": f"a lower learning_rate, or {_PRECISION}",
}


class NonFiniteError(KitError):
    """A run that cannot go on, since its steps have numbers that are not finite."""


def warn_or_end(folder: RunFolder, iteration: int, cause: NonFinite, updates_per_rollout: int) -> None:
    """Log that an iteration had skipped updates; end the run where the last iterations made none.

    Raises:
        NonFiniteError: the last `PATIENCE` iterations made no update. It says why, since when, and what to try.
    """
    newest_first = reversed(folder.metrics())  # of the folder, so that a continued run ends where a whole one would
    stuck = list(takewhile(lambda row: (row.get("skipped_updates") or 0) >= updates_per_rollout, newest_first))
    if len(stuck) < PATIENCE:
        logger.warning("iteration %d: update skipped, not finite: %s", iteration, cause.detail)
        return
    since = stuck[-1]["iteration"]
    raise NonFiniteError(
        f"training: no update in {len(stuck)} iterations in a row, since iteration {since}; not finite: "
        f"{cause.detail}. Nothing of it was saved: {commit_status(folder.path)}, best/ is as it was. Try, in a new "
        f"folder: {ADVICE[cause.part]}"
    )
