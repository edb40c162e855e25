"""Settings that hold a path: which they are, the folders that they count from, and how they are saved."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from grpo_kit.config.errors import ConfigError, shown

_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = _PACKAGE / "shipped"  # only in a wheel: data/, notebooks/ and two files of docs/, which setup.py puts there
PROJECT_ROOT = _SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent  # what comes with the kit counts from here
_MODELS = "vlm_model policy_adapter sd_model generator_config generator_lora clip_model clip_pretrained".split()
# A model may also be a hub id, so it is a path only where something lies there.
MODEL_PATHS = tuple(f"model_settings.{name}" for name in _MODELS)
PROMPT_PATHS = ("training_settings.train_prompts", "evaluation_settings.val_prompts")
_OPTIONS = "style.reference aesthetic.weights pickscore.model pickscore.processor hps.model hps.weights judge.model "
_OPTIONS += "dino_similarity.model xclip_similarity.model clap_similarity.model"
OWN_REWARDS = "reward_settings"  # the key of the file in a reward's name, `path/to/file.py:function`


def working_folder() -> Path:
    """Where reports/ is, and a user's paths count from: the checkout; of an installed kit, the folder one is in."""
    return Path.cwd() if PROJECT_ROOT == _SHIPPED else PROJECT_ROOT


def change_paths(data: dict[str, Any], change: Callable[[str, str], str]) -> None:
    """Replace each path in settings by `change(key, path)`; sections on the way are copied, not changed."""

    def named(name: object) -> object:  # a reward of the user's own may be named wherever a reward is
        file, _, function = name.rpartition(":") if isinstance(name, str) else ("", "", "")
        return f"{change(OWN_REWARDS, file)}:{function}" if file.endswith(".py") else name

    for key in MODEL_PATHS + PROMPT_PATHS:
        section, name = key.split(".")
        if isinstance(data.get(section), dict):
            data[section] = _with_path(data[section], name, key, change)
    if isinstance(judged := data.get("evaluation_settings"), dict) and "held_out" in judged:
        data["evaluation_settings"] = judged | {"held_out": named(judged["held_out"])}
    if isinstance(data.get(OWN_REWARDS), dict):
        rewards = data[OWN_REWARDS] = dict(data[OWN_REWARDS])
        for key, value in rewards.items():
            if isinstance(value, dict):
                rewards[key] = {named(name): one for name, one in value.items()}
            elif isinstance(value, list):
                rewards[key] = [named(name) for name in value]
        options = rewards.get("options")
        for name, given in options.items() if isinstance(options, dict) else ():
            if isinstance(given, dict):
                given = given | ({"reward": named(given["reward"])} if "reward" in given else {})
                for kind, option in (text.split(".") for text in _OPTIONS.split()):
                    if kind in (name, given.get("reward")):
                        given = _with_path(given, option, f"{OWN_REWARDS}.options.{name}.{option}", change)
                options[name] = given


def _with_path(section: dict[str, Any], name: str, key: str, change: Callable[[str, str], str]) -> dict[str, Any]:
    return section | {name: _changed(section[name], partial(change, key))} if name in section else section


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A path, or the paths in a list or in entries that have a "path", after the change."""
    if isinstance(value, list):
        return [_changed(one, change) for one in value]
    if isinstance(value, dict) and "path" in value:
        return value | {"path": _changed(value["path"], change)}
    return change(value) if isinstance(value, str) and value else value


def resolve_paths(data: dict[str, Any], bases: Sequence[Path]) -> None:
    """Make the paths in settings absolute: each counts from the first of the folders `bases` where it exists.

    A model that exists in none of them is a hub id, unless it looks like a path. A reward's file counts from where the
    command was given, too, before the kit's own folders; but not where a run wrote the settings down (`versions`).
    """

    def resolved(key: str, value: str) -> str:
        if "\0" in value:
            raise ConfigError(f"{key}: found {shown(value)}, allowed: text without NUL characters")
        try:
            path = Path(value).expanduser()
            folders = [base for base in bases if base not in (working_folder(), PROJECT_ROOT)]  # a file's own
            folders += [Path.cwd()] if key == OWN_REWARDS and "versions" not in data else []
            candidates = [Path(os.path.normpath(base / path)) for base in (*folders, *bases)]
            found = next((candidate for candidate in candidates if candidate.exists()), None)
        except (OSError, RuntimeError):  # a name that is too long for the file system; no home folder
            return value
        if found is None and value.startswith("data/"):
            found = Path(os.path.normpath(PROJECT_ROOT / path))
        is_path = key in (*PROMPT_PATHS, OWN_REWARDS) or path.is_absolute() or value.startswith((".", "~"))
        if found is None and is_path:
            found = candidates[0]
        return value if found is None else str(found)

    change_paths(data, resolved)


def inside_project(_key: str, value: str) -> str:
    """A path inside the project relative to it, so that saved settings can move; any other as it is."""
    path = Path(value)
    return path.relative_to(PROJECT_ROOT).as_posix() if path.is_relative_to(PROJECT_ROOT) else value
