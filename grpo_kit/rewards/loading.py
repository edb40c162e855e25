"""The rewards that a config names, built with the options that it gives them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field, create_model

from grpo_kit.config import Config, ConfigError, Count, Name, Number, Section, Whole, validated
from grpo_kit.config.hardware import placement
from grpo_kit.rewards.calls import in_threads, with_time_limit
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rewards.protocol import Reward, RewardError
from grpo_kit.rewards.shaping import Shaping

if TYPE_CHECKING:
    from grpo_kit.rewards.clip_similarity import ClipSimilarity
    from grpo_kit.rewards.gain import Draws


def load_rewards(config: Config, generator: "Draws | None" = None) -> Rewards:
    """Build the rewards and monitors of a config; those that need CLIP share one model.

    Args:
        config: its `reward_settings` name them; `training_settings.on_bad_reward` says whether one that fails raises.
        generator: for `gain`, which draws the users' own prompts.

    Raises:
        KitError: a name or an option that the kit does not have, or a model that cannot be loaded.
    """
    settings = config.reward_settings
    check_reward_settings(config)
    shared = _Shared(config, generator)
    return Rewards(
        parts={name: _built(name, shared) for name in settings.weights},
        weights=settings.weights,
        monitors={name: _built(name, shared) for name in settings.monitors},
        shaping={name: Shaping(**shaping.model_dump()) for name, shaping in settings.shaping.items()},
        combine=settings.combine,
        on_error="raise" if config.training_settings.on_bad_reward == "raise" else "nan",
    )


def check_reward_settings(config: Config) -> None:
    """Check the names and options of a config's rewards without loading anything.

    Raises:
        KitError: one line that names what is wrong and what is allowed.
    """
    settings = config.reward_settings
    _check_names(
        "reward_settings", [*settings.weights, *settings.monitors], "; a reward of your own is passed as a function"
    )
    for key in ("options", "threads", "timeout"):
        _check_names(f"reward_settings.{key}", getattr(settings, key))
    for name in {**settings.weights, **dict.fromkeys(settings.monitors), **settings.options}:
        _options(name, settings.options.get(name, {}))


def _check_names(place: str, names: "list[str] | Mapping[str, object]", advice: str = "") -> None:
    for name in names:
        if name not in _BUILDERS:
            raise RewardError(f"{place}: found {name!r}, allowed: {', '.join(sorted(_BUILDERS))}{advice}")


@dataclass
class _Shared:
    """What the rewards of one config have in common; the model is loaded when the first of them needs it."""

    config: Config
    generator: "Draws | None"

    @cached_property
    def device(self) -> torch.device:
        return placement(self.config.model_settings)["reward_device"][0]

    @cached_property
    def clip(self) -> "ClipSimilarity":
        from grpo_kit.rewards.clip_similarity import load_clip_similarity

        settings = self.config.model_settings
        return load_clip_similarity(settings.clip_model, settings.clip_pretrained, self.device)


def _built(name: str, shared: _Shared) -> Reward:
    """A reward with its options, in threads and with a time limit where the config says so."""
    settings = shared.config.reward_settings
    try:
        reward = _BUILDERS[name](shared, **_options(name, settings.options.get(name, {})))
    except RewardError as error:  # from its constructor, which does not know where its arguments stand
        raise ConfigError(f"reward_settings.options.{name}: {error}") from error
    if name in settings.threads:
        reward = in_threads(reward, settings.threads[name])
    return with_time_limit(reward, settings.timeout[name]) if name in settings.timeout else reward


def _options(name: str, given: Mapping[str, object]) -> dict[str, object]:
    """A reward's options, checked against the parameters of its builder; the defaults where they are left out."""
    known = [known for known in inspect.signature(_BUILDERS[name]).parameters.values() if known.name != "shared"]
    if given and not known:
        raise ConfigError(f"reward_settings.options.{name}: found {', '.join(given)}, allowed: none, it has no options")
    fields = {p.name: (p.annotation, ... if p.default is p.empty else p.default) for p in known}
    checked = validated(create_model(name, __base__=Section, **fields), given, f"reward_settings.options.{name}")
    return {field: getattr(checked, field) for field in fields}


# --- the builders: their parameters are the options, with the classes' own defaults -----------------------------------


def _function(file: str, function: str, shared: _Shared) -> Reward:
    return getattr(import_module(f"grpo_kit.rewards.{file}"), function)


def _of_clip(file: str, kind: str, shared: _Shared) -> Reward:
    return getattr(import_module(f"grpo_kit.rewards.{file}"), kind)(shared.clip)


def _clip_similarity(shared: _Shared) -> Reward:
    return shared.clip


_Pair = Annotated[tuple[Name, Name], Field(description="[good, bad], two texts")]


def _gain(shared: _Shared, reward: Name = "clip_similarity") -> Reward:
    from grpo_kit.rewards.gain import Gain

    if shared.generator is None:
        raise RewardError("needs the generator: load_rewards(config, generator)")
    if reward not in _BUILDERS or reward == "gain":
        raise RewardError(f"reward: found {reward!r}, allowed: {', '.join(sorted(_BUILDERS.keys() - {'gain'}))}")
    return Gain(shared.generator, _built(reward, shared))


def _image_quality(shared: _Shared, pairs: list[_Pair] | None = None) -> Reward:
    from grpo_kit.rewards.clip_scores import PHOTO_PAIRS, ImageQuality

    return ImageQuality(shared.clip, PHOTO_PAIRS if pairs is None else pairs)


def _safety(shared: _Shared, avoid: list[Name], threshold: Number = 0.25, margin: Number = 0.05) -> Reward:
    from grpo_kit.rewards.clip_scores import Safety

    return Safety(shared.clip, avoid, threshold, margin)


def _style(shared: _Shared, reference: Name | None = None, phrase: Name | None = None) -> Reward:
    from grpo_kit.rewards.clip_scores import Style

    return Style(shared.clip, reference, phrase)


def _aesthetic(shared: _Shared, weights: Name) -> Reward:
    from grpo_kit.rewards.aesthetic import load_aesthetic

    return load_aesthetic(weights, shared.clip)


def _pickscore(shared: _Shared, model: Name | None = None, processor: Name | None = None) -> Reward:
    from grpo_kit.rewards.preference import PICKSCORE, load_pickscore

    return load_pickscore(*((model, processor) if model else PICKSCORE), shared.device)


def _hps(shared: _Shared, model: Name | None = None, weights: Name | None = None) -> Reward:
    from grpo_kit.rewards.preference import HPS, load_hps

    return load_hps(*((model, weights) if model else HPS), shared.device)


def _jpeg_size(shared: _Shared, quality: Whole = 95) -> Reward:
    from grpo_kit.rewards.pixels import JpegSize

    return JpegSize(quality)


def _length(shared: _Shared, max_words: Count = 60) -> Reward:
    from grpo_kit.rewards.text import Length

    return Length(max_words)


def _repetition(shared: _Shared, size: Count = 2) -> Reward:
    from grpo_kit.rewards.text import Repetition

    return Repetition(size)


_BUILDERS: dict[str, Callable[..., Reward]] = {
    "clip_similarity": _clip_similarity,
    "gain": _gain,
    "image_quality": _image_quality,
    "sharpness": partial(_function, "pixels", "sharpness"),
    "contrast": partial(_function, "pixels", "contrast"),
    "consistency": partial(_of_clip, "clip_scores", "Consistency"),
    "meaning_kept": partial(_of_clip, "clip_scores", "MeaningKept"),
    "safety": _safety,
    "style": _style,
    "diversity": partial(_of_clip, "group", "Diversity"),
    "length": _length,
    "repetition": _repetition,
    "pickscore": _pickscore,
    "hps": _hps,
    "aesthetic": _aesthetic,
    "jpeg_size": _jpeg_size,
    "gold": partial(_function, "gold", "gold"),
    "keeps_objects": partial(_function, "gold", "keeps_objects"),
    "grammatical": partial(_function, "gold", "grammatical"),
}
