"""What to turn down where a plan does not fit: what costs the result nothing first, each with what it saves."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from grpo_kit.config import Config, KitError, load_config
from grpo_kit.preflight.plan.fit import Plan, planned_again

_WORTH = 0.01  # of the peak: a change that saves less is left out


@dataclass(frozen=True)
class Dial:
    """A setting that can be turned down.

    Args:
        part: whose memory it takes, and the only one that it changes.
        value: the setting's next value, from a config; None where there is nothing left to turn down.
        price: what it costs besides time.
        weights: whether it changes what lies in memory all the time.
    """

    setting: str
    part: str
    value: Callable[[Config], object]
    price: str
    weights: bool = False


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


def _micro_batch(config: Config) -> int | None:
    settings = config.training_settings
    rows = settings.prompts_per_iteration * settings.group_size
    size = min(settings.micro_batch_size or rows, rows)
    return max(1, size // 4) if size > 1 else None


def _image_batch(config: Config) -> int | None:
    settings, training = config.generation_settings, config.training_settings
    if settings.image_batch_size == "auto":  # planned with one
        return None
    images = training.prompts_per_iteration * training.group_size * settings.images_per_prompt
    size = min(settings.image_batch_size, images)
    return max(1, size // 4) if size > 1 else None


def _image_side(name: str) -> Callable[[Config], int | None]:
    def smaller(config: Config) -> int | None:
        side = getattr(config.generation_settings, name)
        return None if side is None or side < 512 else side // 128 * 64

    return smaller


DIALS = (  # in the order of what they cost
    Dial("training_settings.micro_batch_size", "policy", _micro_batch, "nothing: the same gradient"),
    Dial(
        "model_settings.vae_slicing",
        "generator",
        lambda config: None if config.model_settings.vae_slicing else True,
        "nothing: the same pictures",
    ),
    Dial("generation_settings.image_batch_size", "generator", _image_batch, "nothing: the same pictures"),
    Dial(
        "model_settings.gradient_checkpointing",
        "policy",
        lambda config: None if config.model_settings.gradient_checkpointing else True,
        "nothing: the same gradient",
    ),
    Dial(
        "model_settings.lora",
        "policy",
        lambda config: {"r": 16, "alpha": 32} if config.model_settings.lora is None else None,
        "an adapter is trained instead of all weights",
        weights=True,
    ),
    Dial(
        "model_settings.base_8bit",
        "policy",
        lambda config: True if config.model_settings.lora and not config.model_settings.base_8bit else None,
        "the weights below the adapter are rounded to 8 bits",
        weights=True,
    ),
    Dial(
        "model_settings.t5_8bit",
        "generator",
        lambda config: None if config.model_settings.drop_t5 or config.model_settings.t5_8bit else True,
        "T5's weights are rounded to 8 bits",
        weights=True,
    ),
    Dial(
        "model_settings.drop_t5",
        "generator",
        lambda config: None if config.model_settings.drop_t5 else True,
        "the generator reads long prompts less well",
        weights=True,
    ),
    Dial("generation_settings.height", "generator", _image_side("height"), "smaller pictures"),
    Dial("generation_settings.width", "generator", _image_side("width"), "smaller pictures"),
)


def advice(plan: Plan, config: Config) -> list[Step]:
    """Dials turned down one after the other until the plan fits, those left out that would save nothing."""
    return list(_turned_down(plan, config))


def _turned_down(plan: Plan, config: Config) -> Iterator[Step]:
    while not plan.fits:
        found = next(_changes(plan, config), None)
        if found is None:
            return
        dial, value, config, after = found
        yield Step(dial.setting, value, dial.price, plan.peak - after.peak, after.peak, after.seconds, after.fits)
        plan = after


def _changes(plan: Plan, config: Config) -> Iterator[tuple[Dial, object, Config, Plan]]:
    """The dials that help this plan when they are turned down once: the value, and the config and the plan with it.

    Only the part that sets the peak can lower it, and weights, which lie there all the time.
    """
    for dial in DIALS:
        value = dial.value(config)
        if value is None or not (dial.weights or dial.part == plan.largest[0].name):
            continue
        try:
            changed = load_config(config, {dial.setting: value})
            after = planned_again(plan, changed, dial.part)
        except KitError:  # such as a policy without layers that can be computed again
            continue
        if _need(plan, dial.part) - _need(after, dial.part) > _WORTH * plan.peak:
            yield dial, value, changed, after


def _need(plan: Plan, name: str) -> int:
    """What a part needs alone: less of it helps even while another part's phase is as large."""
    return next(part.resident + part.working for part in plan.parts if part.name == name)
