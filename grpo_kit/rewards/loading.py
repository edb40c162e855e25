"""The rewards that a config names."""

from collections.abc import Callable
from functools import partial

from grpo_kit.config import Config
from grpo_kit.hardware import choose_device
from grpo_kit.rewards.composition import Reward, RewardError, Rewards


def load_rewards(config: Config) -> Rewards:
    """Build the rewards and monitors of a config.

    Raises:
        RewardError: a name that the kit does not have.
    """
    settings = config.reward_settings
    unknown = [name for name in (*settings.weights, *settings.monitors) if name not in _BUILDERS]
    if unknown:
        raise RewardError(
            f"reward_settings: found {unknown[0]!r}, allowed: {', '.join(sorted(_BUILDERS))}; "
            "a reward of your own is passed as a function"
        )
    return Rewards(
        parts={name: _BUILDERS[name](config) for name in settings.weights},
        weights=settings.weights,
        monitors={name: _BUILDERS[name](config) for name in settings.monitors},
    )


def _clip_similarity(config: Config) -> Reward:
    from grpo_kit.rewards.clip_similarity import load_clip_similarity

    settings = config.model_settings
    device, _ = choose_device(settings.device)
    return load_clip_similarity(settings.clip_model, settings.clip_pretrained, device)


def _shapeworld(check: str, config: Config) -> Reward:
    from grpo_kit.rewards import shapeworld

    return getattr(shapeworld, check)


_BUILDERS: dict[str, Callable[[Config], Reward]] = {
    "clip_similarity": _clip_similarity,
    "gold": partial(_shapeworld, "gold"),
    "keeps_objects": partial(_shapeworld, "keeps_objects"),
    "grammatical": partial(_shapeworld, "grammatical"),
}
