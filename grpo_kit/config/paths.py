"""Settings that hold a path: which they are, the folders that they count from, and how they are saved."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from grpo_kit.config.errors import ConfigError, shown

_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = _PACKAGE / "shipped"  # only in a wheel: data/, notebooks/ and docs/plans.json, which setup.py puts there
PROJECT_ROOT = _SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent  # what comes with the kit counts from here
_MODELS = "vlm_model policy_adapter sd_model generator_config generator_lora clip_model clip_pretrained".split()
# A model may also be a hub id, so it is a path only where something lies there.
MODEL_PATHS = tuple(f"model_settings.{name}" for name in _MODELS)
PROMPT_PATHS = ("training_settings.train_prompts", "evaluation_settings.val_prompts")
_REWARD_OPTIONS = (
    "style.reference aesthetic.weights pickscore.model pickscore.processor hps.model hps.weights judge.model".split()
)
REWARD_PATHS = tuple(f"reward_settings.options.{option}" for option in _REWARD_OPTIONS)


def working_folder() -> Path:
    """Where reports/ is, and a user's paths count from: the checkout; of an installed kit, the folder one is in."""
    return Path.cwd() if PROJECT_ROOT == _SHIPPED else PROJECT_ROOT


def change_paths(data: dict[str, Any], change: Callable[[str, str], str]) -> None:
    """Replace each path in settings by `change(dotted key, path)`; sections on the way are copied, not changed."""
    for key in MODEL_PATHS + PROMPT_PATHS + REWARD_PATHS:
        *sections, name = key.split(".")
        place = data
        for section in sections:
            if not isinstance(place.get(section), dict):
                break
            place[section] = dict(place[section])
            place = place[section]
        else:
            if name in place:
                place[name] = _changed(place[name], partial(change, key))


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A path, or the paths in a list or in entries that have a "path", after the change."""
    if isinstance(value, list):
        return [_changed(one, change) for one in value]
    if isinstance(value, dict) and "path" in value:
        return value | {"path": _changed(value["path"], change)}
    return change(value) if isinstance(value, str) and value else value


def resolve_paths(data: dict[str, Any], bases: Sequence[Path]) -> None:
    """Make the paths in settings absolute: each counts from the first of the folders `bases` where it exists.

    A model that exists in none of them is a hub id, unless it looks like a path.

    Raises:
        ConfigError: a path with a NUL character.
    """

    def resolved(key: str, value: str) -> str:
        if "\0" in value:
            raise ConfigError(f"{key}: found {shown(value)}, allowed: text without NUL characters")
        try:
            path = Path(value).expanduser()
            candidates = [Path(os.path.normpath(base / path)) for base in bases]
            found = next((candidate for candidate in candidates if candidate.exists()), None)
        except (OSError, RuntimeError):  # a name that is too long for the file system; no home folder
            return value
        if found is None and value.startswith("data/"):
            found = Path(os.path.normpath(PROJECT_ROOT / path))
        if found is None and (key in PROMPT_PATHS or path.is_absolute() or value.startswith((".", "~"))):
            found = candidates[0]
        return value if found is None else str(found)

    change_paths(data, resolved)


def inside_project(_key: str, value: str) -> str:
    """A path inside the project relative to it, so that saved settings can move; any other as it is."""
    path = Path(value)
    return path.relative_to(PROJECT_ROOT).as_posix() if path.is_relative_to(PROJECT_ROOT) else value
