"""The rewards that a config names, built with the options that it gives them."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

import torch
from pydantic import create_model

from grpo_kit.config import Config, ConfigError, Name, Section, validated
from grpo_kit.config.hardware import placement
from grpo_kit.rewards.clip import (
    ClipSimilarity,
    Consistency,
    Diversity,
    ImageQuality,
    MeaningKept,
    Safety,
    Style,
    load_clip_similarity,
)
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rewards.gain import Gain, ImageGenerator
from grpo_kit.rewards.gold import gold, grammatical, keeps_objects
from grpo_kit.rewards.http import HttpScorer
from grpo_kit.rewards.judge import Judge
from grpo_kit.rewards.learned import load_aesthetic, load_hps, load_pickscore
from grpo_kit.rewards.plain import JpegSize, Length, Repetition, contrast, sharpness
from grpo_kit.rewards.protocol import Reward, RewardError
from grpo_kit.rewards.shaping import Shaping
from grpo_kit.rewards.slow import in_threads, with_time_limit


def _style(clip: ClipSimilarity, reference: Name | None = None, phrase: Name | None = None) -> Style:
    return Style(clip, reference, phrase)  # a config names a file, where the class takes an image too


def _gain(generator: ImageGenerator | None, build: Callable[[str], Reward], reward: Name = "clip_similarity") -> Gain:
    if generator is None:
        raise RewardError("needs the generator: load_rewards(config, generator)")
    if reward not in REWARDS or reward == "gain":
        raise RewardError(f"reward: found {reward!r}, allowed: {', '.join(sorted(REWARDS.keys() - {'gain'}))}")
    return Gain(generator, build(reward))


# Each name's reward, or the class or function that makes it. The parameters of the latter are what the rewards of a
# config share (`SHARED`), and the options.
REWARDS: dict[str, Callable[..., object]] = {
    "aesthetic": load_aesthetic,
    "clip_similarity": lambda clip: clip,  # the encoder that the others share
    "consistency": Consistency,
    "contrast": contrast,
    "diversity": Diversity,
    "gain": _gain,
    "gold": gold,
    "grammatical": grammatical,
    "hps": load_hps,
    "http": HttpScorer,
    "image_quality": ImageQuality,
    "jpeg_size": JpegSize,
    "judge": Judge,
    "keeps_objects": keeps_objects,
    "length": Length,
    "meaning_kept": MeaningKept,
    "pickscore": load_pickscore,
    "repetition": Repetition,
    "safety": Safety,
    "sharpness": sharpness,
    "style": _style,
}
SHARED = ("build", "clip", "device", "generator")


def load_rewards(config: Config, generator: ImageGenerator | None = None) -> Rewards:
    """Build the rewards and monitors of a config; those that need CLIP share one model.

    Args:
        config: its `reward_settings` name them; `training_settings.on_bad_reward` says whether one that fails raises.
        generator: for `gain`, which draws the users' own prompts.

    Raises:
        KitError: a name or an option that the kit does not have, or a model that cannot be loaded.
    """
    settings = config.reward_settings
    check_reward_settings(config)
    builder = _Builder(config, generator)
    return Rewards(
        parts={name: builder.build(name) for name in settings.weights},
        weights=settings.weights,
        monitors={name: builder.build(name) for name in settings.monitors},
        shaping={name: Shaping(**shaping.model_dump()) for name, shaping in settings.shaping.items()},
        combine=settings.combine,
        on_error="raise" if config.training_settings.on_bad_reward == "raise" else "nan",
    )


def check_reward_settings(config: Config) -> None:
    """Check the names and options of a config's rewards without loading a model.

    Raises:
        KitError: one line that names what is wrong and what is allowed.
    """
    settings = config.reward_settings
    named = [*settings.weights, *settings.monitors]
    _check_names("reward_settings", named, "; a reward of your own is passed as a function")
    for key in ("options", "threads", "timeout"):
        _check_names(f"reward_settings.{key}", getattr(settings, key))
    for name in dict.fromkeys([*named, *settings.options]):
        _options(name, settings.options.get(name, {}))


def _check_names(place: str, names: Iterable[str], advice: str = "") -> None:
    for name in names:
        if name not in REWARDS:
            raise RewardError(f"{place}: found {name!r}, allowed: {', '.join(sorted(REWARDS))}{advice}")


def _options(name: str, given: Mapping[str, object]) -> dict[str, object]:
    """A reward's options with their defaults, checked against the annotations of what makes it."""
    parameters = inspect.signature(REWARDS[name]).parameters
    known = [] if "images" in parameters else [one for one in parameters.values() if one.name not in SHARED]
    if given and not known:
        raise ConfigError(f"reward_settings.options.{name}: found {', '.join(given)}, allowed: none, it has no options")
    fields = {one.name: (one.annotation, ... if one.default is one.empty else one.default) for one in known}
    checked = validated(create_model(name, __base__=Section, **fields), given, f"reward_settings.options.{name}")
    return {field: getattr(checked, field) for field in fields}


class _Builder:
    """Builds the rewards of one config, and loads what they share when the first of them needs it."""

    def __init__(self, config: Config, generator: ImageGenerator | None) -> None:
        self.config, self.generator = config, generator

    @cached_property
    def device(self) -> torch.device:
        """Where the reward models run."""
        return placement(self.config.model_settings)["reward_device"][0]

    @cached_property
    def clip(self) -> ClipSimilarity:
        """The CLIP that the rewards share."""
        settings = self.config.model_settings
        return load_clip_similarity(settings.clip_model, settings.clip_pretrained, self.device)

    def build(self, name: str) -> Reward:
        """A reward with its options, in threads and with a time limit where the config says so."""
        settings, reward = self.config.reward_settings, REWARDS[name]
        parameters = inspect.signature(reward).parameters
        if "images" not in parameters:
            options = _options(name, settings.options.get(name, {}))
            try:
                reward = reward(
                    **options, **{shared: getattr(self, shared) for shared in SHARED if shared in parameters}
                )
            except RewardError as error:  # it does not know where its arguments come from
                raise ConfigError(f"reward_settings.options.{name}: {error}") from error
        if name in settings.threads:
            reward = in_threads(reward, settings.threads[name])
        return with_time_limit(reward, settings.timeout[name]) if name in settings.timeout else reward
