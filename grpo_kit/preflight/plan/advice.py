"""What to turn down where a plan does not fit: what costs the result nothing first, each with what it saves."""

from dataclasses import dataclass

from grpo_kit.config import Config, KitError, load_config
from grpo_kit.preflight.plan import planned_again
from grpo_kit.preflight.plan.parts import Plan

_WORTH = 0.01  # of the peak: a change that saves less is left out


@dataclass(frozen=True)
class Dial:
    """A setting that can be turned down."""

    setting: str
    part: str  # whose memory it takes, and the only one that it changes
    price: str  # what it costs besides time
    weights: bool = False  # whether it changes what lies in memory all the time

    def next_value(self, config: Config) -> object:
        """The setting's next value; None where nothing is left to turn down."""
        section, name = self.setting.split(".")
        value, models = getattr(getattr(config, section), name), config.model_settings
        rows = config.training_settings.prompts_per_iteration * config.training_settings.group_size
        match name:
            case "micro_batch_size":
                return _quarter(value, rows)
            case "image_batch_size":  # auto is planned with one
                return None if value == "auto" else _quarter(value, rows * config.generation_settings.images_per_prompt)
            case "height" | "width":
                return None if value is None or value < 512 else value // 128 * 64
            case "lora":
                return {"r": 16, "alpha": 32} if value is None else None
        useless = (name == "base_8bit" and not models.lora) or (name == "t5_8bit" and models.drop_t5)
        return None if value or useless else True


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


def _quarter(size: int | None, most: int) -> int | None:
    size = min(size or most, most)
    return max(1, size // 4) if size > 1 else None


_SAME_GRADIENT, _SAME_PICTURES = "nothing: the same gradient", "nothing: the same pictures"
DIALS = (  # in the order of what they cost
    Dial("training_settings.micro_batch_size", "policy", _SAME_GRADIENT),
    Dial("model_settings.vae_slicing", "generator", _SAME_PICTURES),
    Dial("generation_settings.image_batch_size", "generator", _SAME_PICTURES),
    Dial("model_settings.gradient_checkpointing", "policy", _SAME_GRADIENT),
    Dial("model_settings.lora", "policy", "an adapter is trained instead of all weights", weights=True),
    Dial("model_settings.base_8bit", "policy", "the weights below the adapter are rounded to 8 bits", weights=True),
    Dial("model_settings.t5_8bit", "generator", "T5's weights are rounded to 8 bits", weights=True),
    Dial("model_settings.drop_t5", "generator", "the generator reads long prompts less well", weights=True),
    Dial("generation_settings.height", "generator", "smaller pictures"),
    Dial("generation_settings.width", "generator", "smaller pictures"),
)


def advice(plan: Plan, config: Config) -> list[Step]:
    """Dials turned down one after the other until the plan fits, those left out that would save nothing."""
    steps: list[Step] = []
    while not plan.fits:
        for dial in DIALS:
            value = dial.next_value(config)
            if value is None or not (dial.weights or dial.part == plan.largest[0].name):
                continue  # only the part that sets the peak can lower it, and weights, which lie there all the time
            try:
                changed = load_config(config, {dial.setting: value})
                after = planned_again(plan, changed, dial.part)
            except KitError:  # such as a policy without layers that can be computed again
                continue
            before, now = (next(p for p in found.parts if p.name == dial.part) for found in (plan, after))
            if before.resident + before.working - now.resident - now.working > _WORTH * plan.peak:
                break  # the part needs less alone, even while another part's phase is as large
        else:
            return steps
        saved = plan.peak - after.peak
        steps.append(Step(dial.setting, value, dial.price, saved, after.peak, after.seconds, after.fits))
        plan, config = after, changed
    return steps
