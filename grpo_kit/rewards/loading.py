"""The rewards that a config names, built with the options that it gives them.

A name is that of a reward of the kit; or `path/to/file.py:function` or `package.module:function`, a reward of the
user's own, or a class or function that is called with its options to make one; or any name whose options hold
`reward`, one of these, or `url` (the reward `http`).
"""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from pydantic import create_model

from grpo_kit.config import Config, ConfigError, KitError, Name, Section, nearest, one_line, validated
from grpo_kit.config.hardware import placement
from grpo_kit.config.own_code import files_behind, imported, origin
from grpo_kit.config.paths import inside_project
from grpo_kit.config.settings import RewardSettings
from grpo_kit.rewards.clip import ClipSimilarity, load_clip_similarity
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rewards.embedding_scores import Consistency, Diversity, ImageQuality, MeaningKept, Safety, Style
from grpo_kit.rewards.gain import Gain, ImageGenerator
from grpo_kit.rewards.gold import gold, grammatical, keeps_objects
from grpo_kit.rewards.http import HttpScorer
from grpo_kit.rewards.judge import Judge
from grpo_kit.rewards.learned import load_aesthetic, load_hps, load_pickscore
from grpo_kit.rewards.plain import JpegSize, Length, Repetition, contrast, sharpness
from grpo_kit.rewards.protocol import COLUMNS, CONTEXT, Reward, RewardError, require_callable
from grpo_kit.rewards.references import EditDirection, FieldSimilarity, ImageSimilarity, load_dino_similarity
from grpo_kit.rewards.shaping import Shaping
from grpo_kit.rewards.slow import in_threads, with_time_limit
from grpo_kit.rewards.sound import load_clap_similarity, loudness
from grpo_kit.rewards.video import ClipFrames, ClipViews, load_xclip_similarity, motion


def _clip_similarity(clip: ClipSimilarity, field: Name | None = None) -> ClipSimilarity | FieldSimilarity:
    return clip if field is None else FieldSimilarity(clip, field)  # the encoder that the others share


def _image_similarity(clip: ClipSimilarity) -> ImageSimilarity:
    return ImageSimilarity(clip.encode_images)


def _style(clip: ClipSimilarity, reference: Name | None = None, phrase: Name | None = None) -> Style:
    return Style(clip, reference, phrase)  # a config names a file, where the class takes an image too


def _gain(generator: ImageGenerator | None, build: Callable[[str], Reward], reward: Name = "clip_similarity") -> Gain:
    if generator is None:
        raise RewardError("needs the generator: load_rewards(config, generator)")
    if (reward not in REWARDS and ":" not in reward) or reward == "gain":
        raise RewardError(f"reward: found {reward!r}, allowed: {', '.join(sorted(REWARDS.keys() - {'gain'}))}")
    return Gain(generator, build(reward))


# Each name's reward, or the class or function that makes it. The parameters of the latter are what the rewards of a
# config share (`SHARED`), and the options.
REWARDS: dict[str, Callable[..., object]] = {
    "aesthetic": load_aesthetic,
    "clap_similarity": load_clap_similarity,
    "clip_frames": ClipFrames,
    "clip_similarity": _clip_similarity,
    "clip_views": ClipViews,
    "consistency": Consistency,
    "contrast": contrast,
    "dino_similarity": load_dino_similarity,
    "diversity": Diversity,
    "edit_direction": EditDirection,
    "gain": _gain,
    "gold": gold,
    "grammatical": grammatical,
    "hps": load_hps,
    "http": HttpScorer,
    "image_quality": ImageQuality,
    "image_similarity": _image_similarity,
    "jpeg_size": JpegSize,
    "judge": Judge,
    "keeps_objects": keeps_objects,
    "length": Length,
    "loudness": loudness,
    "meaning_kept": MeaningKept,
    "motion": motion,
    "pickscore": load_pickscore,
    "repetition": Repetition,
    "safety": Safety,
    "sharpness": sharpness,
    "style": _style,
    "xclip_similarity": load_xclip_similarity,
}
SHARED = ("build", "clip", "device", "generator")
_ANY, _ANY_NAMED = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def load_rewards(config: Config, generator: ImageGenerator | None = None) -> Rewards:
    """Build the rewards and monitors of a config; those that need CLIP share one model, `gain` needs the generator.

    Raises:
        KitError: a name or an option that the kit does not have, or a model that cannot be loaded.
    """
    settings = config.reward_settings
    check_reward_settings(config)
    builder, short = _Builder(config, generator), short_names(settings)
    built = {name: builder.build(name) for name in short}
    return Rewards(
        parts={short[name]: built[name] for name in settings.weights},
        weights={short[name]: weight for name, weight in settings.weights.items()},
        monitors={short[name]: built[name] for name in settings.monitors},
        shaping={short[name]: Shaping(**shaping.model_dump()) for name, shaping in settings.shaping.items()},
        combine=settings.combine,
        on_error="raise" if config.training_settings.on_bad_reward == "raise" else "nan",
        made_from={short[name]: (reward, _entry(settings, name)) for name, reward in built.items()},
    )


def reward_record(config: Config) -> dict[str, dict[str, Any]]:
    """What `Rewards.record` will say of a config's rewards, before they are built."""
    settings = config.reward_settings
    check_reward_settings(config)
    names = short_names(settings).items()
    return {short: {"weight": settings.weights.get(name), **_entry(settings, name)} for name, short in names}


def short_names(settings: RewardSettings) -> dict[str, str]:
    """Name in the settings → what metrics and tables call it: of a reward of the user's own its function, as TRL does.

    Its file's or module's name stands before it where the kit, or another reward of the settings, is called so.

    Raises:
        ConfigError: two are still called the same.
    """
    named = {name: name.rpartition(":")[2] for name in (*settings.weights, *settings.monitors)}
    counts = Counter(named.values())
    for name, short in named.items():
        home = re.split(r"[\\/.]", name.rpartition(":")[0].removesuffix(".py"))[-1]
        if home and (counts[short] > 1 or short in REWARDS):
            named[name] = f"{home}:{short}"
    twice = [name for name, count in Counter(named.values()).items() if count > 1]
    if twice:
        raise ConfigError(
            f"reward_settings: two rewards are called {twice[0]!r}. Give one a name of its own: "
            'options {"my_name": {"reward": "path/to/file.py:function"}}'
        )
    return named


def _entry(settings: RewardSettings, name: str) -> dict[str, Any]:
    """What a run writes down of a reward that its config names."""
    target, options = _target(settings, name)
    own = origin(imported(target)) | {"files": files_behind(target)} if ":" in target else {}
    file, colon, function = name.rpartition(":")
    return {"reward": f"{inside_project('', file)}{colon}{function}", "options": dict(options), **own}


def check_reward_settings(config: Config) -> None:
    """Check the names and options of a config's rewards without loading a model.

    Raises:
        KitError: one line that names what is wrong and what is allowed.
    """
    settings = config.reward_settings
    short = short_names(settings)
    named = {"": short} | {f".{key}": getattr(settings, key) for key in ("options", "threads", "timeout")}
    for key, name in [(key, name) for key, names in named.items() for name in names]:
        target, _ = _target(settings, name)
        if target not in REWARDS and ":" not in target:
            raise RewardError(
                f"reward_settings{key}: found {target!r}, allowed: {', '.join(sorted(REWARDS))}; or one of your own: "
                "path/to/file.py:function, package.module:function"
            )
    for name in dict.fromkeys([*short, *settings.options]):
        target, options = _target(settings, name)
        if target in REWARDS:
            _options(target, options, name)
        elif name in short:
            _check_own(name, target, options)


def _target(settings: RewardSettings, name: str) -> tuple[str, dict[str, Any]]:
    """The kit's reward, or the place of one of the user's own, that a name stands for; and its options."""
    options = settings.options.get(name, {})
    if name in REWARDS or ":" in name:
        return name, options
    target = options.get("reward", "http" if "url" in options else name)
    return str(target), {key: value for key, value in options.items() if key != "reward"}


def _check_own(name: str, target: str, options: Mapping[str, object]) -> None:
    """Import a reward of the user's own, and see that it, or what makes it, takes its options and what it is given."""
    try:
        thing = imported(target)
    except KitError as error:
        raise RewardError(f"reward {name!r}: {error}") from error
    if not callable(thing):
        require_callable(name, thing)  # it says why
    makes, signature = _makes_reward(thing, options), inspect.signature(thing)
    kinds = {key: one.kind for key, one in signature.parameters.items()}
    taken = () if makes else (*COLUMNS, *CONTEXT, "completions")
    known = [key for key, kind in kinds.items() if kind not in (_ANY, _ANY_NAMED) and key not in taken]
    if unknown := [key for key in options if key not in known and _ANY_NAMED not in kinds.values()]:
        allowed = f"{nearest(unknown[0], known)}; allowed: {', '.join(known) or 'none, it has no options'}"
        raise ConfigError(f"reward_settings.options.{name}.{unknown[0]}: unknown{allowed}")
    if makes:
        try:
            signature.bind(**dict.fromkeys([*options, *(key for key in SHARED if key in known and key not in options)]))
        except TypeError as error:
            raise ConfigError(f"reward_settings.options.{name}: {error}, to make the reward. Set it") from None
    if inspect.isclass(thing):  # its objects are called, with None in the place of one here
        has_call = any("__call__" in vars(kind) for kind in thing.__mro__)
        require_callable(name, partial(thing.__call__, None) if has_call else None)
    elif not makes:
        require_callable(name, partial(thing, **options))


def _makes_reward(thing: Callable[..., object], options: Mapping[str, object]) -> bool:
    """Whether it makes a reward from options: a class, or a function that asks for nothing else."""
    parameters = inspect.signature(thing).parameters
    if inspect.isclass(thing) or {*COLUMNS, "completions"} & parameters.keys():
        return inspect.isclass(thing)
    needed = [key for key, one in parameters.items() if one.default is one.empty and one.kind is not _ANY_NAMED]
    return inspect.isfunction(thing) and all(key in options or key in SHARED for key in needed)


def _options(target: str, given: Mapping[str, object], name: str) -> dict[str, object]:
    """A reward's options with their defaults, checked against the annotations of what makes it."""
    parameters = inspect.signature(REWARDS[target]).parameters
    known = [] if "images" in parameters else [one for one in parameters.values() if one.name not in SHARED]
    if given and not known:
        raise ConfigError(f"reward_settings.options.{name}: found {', '.join(given)}, allowed: none, it has no options")
    fields = {one.name: (one.annotation, ... if one.default is one.empty else one.default) for one in known}
    checked = validated(create_model(target, __base__=Section, **fields), given, f"reward_settings.options.{name}")
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
        settings = self.config.reward_settings
        target, options = _target(settings, name)
        reward = imported(target) if ":" in target else REWARDS[target]
        parameters = inspect.signature(reward).parameters
        if _makes_reward(reward, options):
            options = options if ":" in target else _options(target, options, name)
            shared = [key for key in SHARED if key in parameters and key not in options]
            shared = [key for key in shared if ":" not in target or parameters[key].default is inspect.Parameter.empty]
            try:
                reward = reward(**options, **{key: getattr(self, key) for key in shared})
            except RewardError as error:  # it does not know where its arguments come from
                raise ConfigError(f"reward_settings.options.{name}: {error}") from error
            except Exception as error:
                if ":" not in target or isinstance(error, KitError):
                    raise
                text = one_line(f"{type(error).__name__}: {error}", 300)
                raise RewardError(f"reward {name!r}: cannot be made: {text}. Correct it, or its options") from error
        elif options:
            reward = partial(reward, **options)
        if name in settings.threads:
            reward = in_threads(reward, settings.threads[name])
        return with_time_limit(reward, settings.timeout[name]) if name in settings.timeout else reward
