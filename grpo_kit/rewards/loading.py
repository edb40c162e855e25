"""The rewards that a config names."""

from collections.abc import Callable

from grpo_kit.config import Config
from grpo_kit.hardware import choose_device
from grpo_kit.rewards.composition import Reward, RewardError, Rewards


def load_rewards(config: Config) -> Rewards:
    """Build the rewards and monitors of a config.

    Raises:
        RewardError: a name that the kit does not have.
    """
    settings = config.reward_settings
    builders = _builders(config)
    unknown = [name for name in (*settings.weights, *settings.monitors) if name not in builders]
    if unknown:
        raise RewardError(
            f"reward_settings: found {unknown[0]!r}, allowed: {', '.join(sorted(builders))}; "
            "a reward of your own is passed as a function"
        )
    return Rewards(
        parts={name: builders[name]() for name in settings.weights},
        weights=settings.weights,
        monitors={name: builders[name]() for name in settings.monitors},
    )


def _builders(config: Config) -> dict[str, Callable[[], Reward]]:
    def clip_similarity() -> Reward:
        from grpo_kit.rewards.clip_similarity import load_clip_similarity

        settings = config.model_settings
        device, _ = choose_device(settings.device)
        return load_clip_similarity(settings.clip_model, settings.clip_pretrained, device)

    def shapeworld(name: str) -> Callable[[], Reward]:
        def build() -> Reward:
            from grpo_kit.rewards import shapeworld as checks

            return getattr(checks, name)

        return build

    checks = ("gold", "keeps_objects", "grammatical")
    return {"clip_similarity": clip_similarity, **{name: shapeworld(name) for name in checks}}
