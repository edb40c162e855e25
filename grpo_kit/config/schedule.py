"""Learning rates under transformers' schedules, each fixed by its update's place in the run: no state is kept."""

import functools
import json
import math
from collections.abc import Callable

from grpo_kit.config.errors import ConfigError, one_line
from grpo_kit.config.settings import TrainingSettings


def scheduled_rates(settings: TrainingSettings, iteration: int) -> list[float]:
    """The learning rate of each of an iteration's optimizer updates.

    Of all `num_iterations` × `updates_per_rollout` updates one that is skipped counts too, so that an iteration has the
    same rates whatever came before it. A `ConfigError` where `lr_scheduler_kwargs` do not belong to the schedule.
    """
    count = settings.updates_per_rollout
    if settings.lr_scheduler_type == "constant":
        return [settings.learning_rate] * count
    total = settings.num_iterations * count
    warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * total)
    options = json.dumps(settings.lr_scheduler_kwargs, sort_keys=True)
    factor = _factor(settings.lr_scheduler_type, settings.learning_rate, warmup, total, options)
    return [settings.learning_rate * factor((iteration - 1) * count + update) for update in range(count)]


@functools.lru_cache(maxsize=8)
def _factor(kind: str, rate: float, warmup: int, total: int, options: str) -> Callable[[int], float]:
    """Number of an update, from 0 → its share of the learning rate, as `transformers.get_scheduler` has it."""
    import torch
    from transformers import get_scheduler

    unused = torch.optim.SGD([torch.zeros(1)], lr=rate)  # schedules read the rate from an optimizer
    try:
        (factor,) = get_scheduler(kind, unused, warmup, total, json.loads(options)).lr_lambdas
        if not all(math.isfinite(factor(update)) for update in (0, warmup, total - 1)):
            raise ValueError("a rate is not finite")
    except (TypeError, ValueError, ArithmeticError) as error:
        allowed = f"what {kind!r} of transformers takes ({one_line(error)})"
        raise ConfigError(f"training_settings.lr_scheduler_kwargs: found {options:.80}, allowed: {allowed}") from error
    return factor
