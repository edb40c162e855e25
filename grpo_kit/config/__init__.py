"""What a run is given: settings and where they come from, prompts, devices, seeds; and the errors that users mend.

The names below are loaded when they are first used: to read a run needs errors, not settings.
"""

from grpo_kit import lazy_names

_MODULES = {
    ("ConfigError", "KitError", "nearest", "one_line", "printable", "shown"): "errors",
    ("RECORDS", "load_config", "pairs_from_texts", "settings_from_texts"): "loading",
    ("PROJECT_ROOT", "working_folder"): "paths",
    ("PROFILE_FOLDER", "PROFILES", "Config", "Count", "EvaluationSettings", "LoraSettings"): "settings",
    ("ModelSettings", "Name", "Number", "Section", "TrainingSettings", "Whole"): "settings",
    ("validated",): "validation",
}
_HOME = {name: module for names, module in _MODULES.items() for name in names}

__all__ = sorted(_HOME)

__getattr__, __dir__ = lazy_names(__name__, _HOME)
