"""What to turn down where a plan does not fit: what costs the result nothing first, each with what it saves."""

from collections.abc import Callable
from dataclasses import dataclass

from grpo_kit.config import Config, KitError, load_config
from grpo_kit.preflight.plan import planned_again
from grpo_kit.preflight.plan.parts import Plan

_WORTH = 0.01  # of the peak: a change that saves less is left out


@dataclass(frozen=True)
class Dial:
    """A setting that can be turned down.

    Args:
        part: whose memory it takes, and the only one that it changes.
        next: from a config and the setting's value to the next value; None where nothing is left to turn down.
        price: what it costs besides time.
        weights: whether it changes what lies in memory all the time.
    """

    setting: str
    part: str
    next: Callable[[Config, object], object]
    price: str
    weights: bool = False

    def next_value(self, config: Config) -> object:
        """The setting's next value; None where there is none."""
        section, name = self.setting.split(".")
        return self.next(config, getattr(getattr(config, section), name))


@dataclass(frozen=True)
class Step:
    """A dial turned down, with those before it."""

    setting: str
    value: object
    price: str
    saved: int  # bytes of the peak
    peak: int
    seconds: float  # of an iteration
    fits: bool


def _rows(config: Config) -> int:
    return config.training_settings.prompts_per_iteration * config.training_settings.group_size


def _quarter(size: int | None, most: int) -> int | None:
    size = min(size or most, most)
    return max(1, size // 4) if size > 1 else None


def _fewer_rows(config: Config, size: int | None) -> int | None:
    return _quarter(size, _rows(config))


def _fewer_images(config: Config, size: int | str) -> int | None:
    images = _rows(config) * config.generation_settings.images_per_prompt
    return None if size == "auto" else _quarter(size, images)  # auto is planned with one


def _on(config: Config, value: bool) -> bool | None:
    return None if value else True


def _smaller(config: Config, side: int | None) -> int | None:
    return None if side is None or side < 512 else side // 128 * 64


def _adapter(config: Config, value: object) -> dict[str, int] | None:
    return {"r": 16, "alpha": 32} if value is None else None


def _base_in_8_bits(config: Config, value: bool) -> bool | None:
    return True if config.model_settings.lora and not value else None


def _t5_in_8_bits(config: Config, value: bool) -> bool | None:
    return None if config.model_settings.drop_t5 or value else True


_SAME_GRADIENT, _SAME_PICTURES = "nothing: the same gradient", "nothing: the same pictures"
_ADAPTER = "an adapter is trained instead of all weights"
_BASE_IN_8_BITS = "the weights below the adapter are rounded to 8 bits"
DIALS = (  # in the order of what they cost
    Dial("training_settings.micro_batch_size", "policy", _fewer_rows, _SAME_GRADIENT),
    Dial("model_settings.vae_slicing", "generator", _on, _SAME_PICTURES),
    Dial("generation_settings.image_batch_size", "generator", _fewer_images, _SAME_PICTURES),
    Dial("model_settings.gradient_checkpointing", "policy", _on, _SAME_GRADIENT),
    Dial("model_settings.lora", "policy", _adapter, _ADAPTER, weights=True),
    Dial("model_settings.base_8bit", "policy", _base_in_8_bits, _BASE_IN_8_BITS, weights=True),
    Dial("model_settings.t5_8bit", "generator", _t5_in_8_bits, "T5's weights are rounded to 8 bits", weights=True),
    Dial("model_settings.drop_t5", "generator", _on, "the generator reads long prompts less well", weights=True),
    Dial("generation_settings.height", "generator", _smaller, "smaller pictures"),
    Dial("generation_settings.width", "generator", _smaller, "smaller pictures"),
)


def advice(plan: Plan, config: Config) -> list[Step]:
    """Dials turned down one after the other until the plan fits, those left out that would save nothing."""
    steps: list[Step] = []
    while not plan.fits and (found := _next_change(plan, config)):
        dial, value, config, after = found
        steps.append(
            Step(dial.setting, value, dial.price, plan.peak - after.peak, after.peak, after.seconds, after.fits)
        )
        plan = after
    return steps


def _next_change(plan: Plan, config: Config) -> tuple[Dial, object, Config, Plan] | None:
    """The first dial that helps this plan when it is turned down once: its value, and config and plan with it.

    Only the part that sets the peak can lower it, and weights, which lie there all the time. What helps is what makes a
    part need less alone, even while another part's phase is as large.
    """
    for dial in DIALS:
        value = dial.next_value(config)
        if value is None or not (dial.weights or dial.part == plan.largest[0].name):
            continue
        try:
            changed = load_config(config, {dial.setting: value})
            after = planned_again(plan, changed, dial.part)
        except KitError:  # such as a policy without layers that can be computed again
            continue
        (before, now) = (next(p for p in found.parts if p.name == dial.part) for found in (plan, after))
        if before.resident + before.working - now.resident - now.working > _WORTH * plan.peak:
            return dial, value, changed, after
    return None
