"""The guard: ends a run whose steps are skipped again and again, with a diagnosis in one line."""

import logging
from collections.abc import Mapping, Sequence

from grpo_kit.config import KitError
from grpo_kit.grpo.finite import NonFinite
from grpo_kit.runs.disk_errors import last_commit
from grpo_kit.runs.folder import RunFolder

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


def without_update(metrics: Sequence[Mapping], updates_per_rollout: int) -> list[int]:
    """The last iterations in a row of which all updates were skipped, the newest last."""
    found: list[int] = []
    for row in reversed(metrics):
        if (row.get("skipped_updates") or 0) < updates_per_rollout:
            break
        found.insert(0, int(row["iteration"]))
    return found


def guard(folder: RunFolder, iteration: int, trouble: NonFinite, updates_per_rollout: int) -> None:
    """Log that an iteration had skipped updates; end the run where nothing else happens any more.

    It reads what the folder holds, so that a continued run ends where the uninterrupted one would.

    Raises:
        NonFiniteError: the last `PATIENCE` iterations made no update. It says what was not finite first, since when,
            which iteration is committed, and what to try.
    """
    stuck = without_update(folder.metrics(), updates_per_rollout)
    if len(stuck) < PATIENCE:
        logger.warning("iteration %d: update skipped, not finite: %s", iteration, trouble.detail)
        return
    committed = last_commit(folder.path) or 0
    raise NonFiniteError(
        f"training: no update in {len(stuck)} iterations in a row, since iteration {stuck[0]}; not finite: "
        f"{trouble.detail}. Nothing of it was saved: iteration {committed} is committed, best/ is as it was. Try, in a "
        f"new folder: {ADVICE[trouble.part]}"
    )
