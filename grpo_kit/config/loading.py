"""One `Config` from a profile, a file, a run folder or a dict, with the settings that are changed by dotted key.

A file may leave out what it takes over: it builds on the profile that its key "profile" names. A file without that key
builds on `classic` when it names a policy or generator of its own (the flat form of VLM-GRPO), else on `tiny`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_kit.config.errors import ConfigError, KitError, nearest, shown
from grpo_kit.config.paths import MODEL_PATHS, PROJECT_ROOT, PROMPT_PATHS, resolve_paths, working_folder
from grpo_kit.config.settings import PROFILES, Config, TrainingSettings, merged, profile_settings
from grpo_kit.config.strict import line_of, read_strictly
from grpo_kit.config.validation import forms_of, validated

RECORDS = ("versions", "machine", "contents", "rewards")  # what a run's config.json says of its making; no settings
_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}


def load_config(
    name_or_path: str | Path | Mapping[str, Any] | Config = "tiny", overrides: Mapping[str, object] | None = None
) -> Config:
    """Read a configuration and check every key.

    Args:
        name_or_path: a profile (`tiny`, `workshop`, `full`, `classic`, `gpu_16gb`, …), a JSON or YAML file, a run
            folder (its config.json), a dict of the same shape, or a `Config`.
        overrides: dotted keys, such as `{"training_settings.group_size": 8}`; values may be given as text ("1e-6").

    Relative paths count from the file's folder, then from the project's; in a dict or an override from the project's,
    or, of a kit that was installed without its checkout, from the working folder. Raises `ConfigError`, one line that
    names the key, the value found, what is allowed and, for a file, the line.
    """
    path = None
    if isinstance(name_or_path, Config):
        data = name_or_path.model_dump()
    elif isinstance(name_or_path, Mapping):
        data = _complete(name_or_path)
    elif str(name_or_path) in PROFILES:
        data = profile_settings(str(name_or_path))
    else:
        path = _config_file(name_or_path)
        data = _complete(_read(path), f" (in {path})")
    for key, value in (overrides or {}).items():
        _override(data, key, value)
    resolve_paths(data, [working_folder(), PROJECT_ROOT])

    def place(sentence: str) -> str:
        """Where in the file the key stands with which an error begins."""
        line = path and line_of(path.read_bytes(), sentence.partition(":")[0].split("."))
        return f" (in {path}:{line})" if line else f" (in {path})" if path else ""

    return validated(Config, data, source=place)


def settings_from_texts(texts: Sequence[str]) -> dict[str, object]:
    """Overrides from a command's `section.key=value` texts; a path that exists here counts from the working folder."""
    settings: dict[str, object] = {}
    for key, value in pairs_from_texts(texts, "-o").items():
        is_here = key in MODEL_PATHS + PROMPT_PATHS and value and "\0" not in value and Path(value).exists()
        settings[key] = str(Path(value).resolve()) if is_here else value
    return settings


def pairs_from_texts(texts: Sequence[str], option: str) -> dict[str, str]:
    """Name → value of the `name=value` texts that a command's option was given; else a `KitError`."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise KitError(f"{option} {text!r:.80}: allowed: name=value")
        if name in pairs:
            raise KitError(f"{option} {name!r:.80}: given twice. Give it once")
        pairs[name] = value
    return pairs


def _config_file(name_or_path: str | Path) -> Path:
    try:
        path = Path(name_or_path).expanduser()
        path = path / "config.json" if path.is_dir() else path
        found = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL inside, no home folder
        found = False
    if not found:
        what = f"configuration {shown(str(name_or_path))}: neither a profile nor a file"
        allowed = f"{', '.join(PROFILES)}, or the path of a JSON or YAML file or run folder"
        raise ConfigError(f"{what}{nearest(str(name_or_path), PROFILES)}; allowed: {allowed}")
    return path


def _read(path: Path) -> dict[str, Any]:
    """The settings in a file, with its paths resolved."""
    data = read_strictly(path, as_yaml=path.suffix.lower() in (".yaml", ".yml"))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found {shown(data)}, allowed: a JSON object with the sections of a profile")
    resolve_paths(data, [path.parent.resolve(), PROJECT_ROOT])
    return data


def _complete(given: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """Fill what a user's settings leave out from the profile that they build on."""
    data = {key: value for key, value in given.items() if key not in RECORDS}
    name = data.get("profile")
    if name is None:
        models = data.get("model_settings")
        names_models = isinstance(models, Mapping) and not {"vlm_model", "sd_model"}.isdisjoint(models)
        name = "classic" if names_models else "tiny"
    if name not in PROFILES:
        hint = nearest(str(name), PROFILES)
        raise ConfigError(f"profile: found {shown(name)}{hint}; allowed: {', '.join(PROFILES)}{source}")
    return merged(profile_settings(name), data) | {"profile": name}


def _override(data: dict[str, Any], key: str, value: object) -> None:
    """Set one dotted key; the checks of `Config` say whether key and value are allowed."""
    *parts, name = _keys(key)
    if not parts and name in TrainingSettings.model_fields:
        raise ConfigError(f"{key}: no section named. Write training_settings.{key}")
    section = data
    for part in parts:
        below = {} if section.get(part) is None else section[part]
        if not isinstance(below, dict):
            raise ConfigError(f"{shown(key)}: {shown(part)} is a single value. Set it without a further dot")
        section[part] = dict(below)
        section = section[part]
    section[name] = _value(key, value) if isinstance(value, str) else value


def _keys(key: str) -> list[str]:
    """The parts of a dotted key; the dots in a reward's `file.py:function` divide nothing."""
    before, colon, after = key.partition(":")
    if not colon:
        return key.split(".")
    *sections, home = before.split(".", 2)
    function, *rest = after.split(".")
    return [*sections, f"{home}:{function}", *rest]


def _value(key: str, text: str) -> object:
    """Read an override given as text: JSON where the setting takes what it says, else the text itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    types = {form.get("type") for form in forms_of(Config, _keys(key))}
    return text if "string" in types and _JSON_TYPES.get(type(value)) not in types else value
