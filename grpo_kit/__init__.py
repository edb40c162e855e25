"""grpo_kit: teach a vision-language model to write better text-to-image prompts, with GRPO.

The public names below are resolved when they are first used, so that `import grpo_kit` loads neither torch nor
pydantic:

    import grpo_kit as gk
    config = gk.load_config("tiny")
    kit = gk.load_experiment(config)
    gk.train(kit, "reports/first")
"""

import importlib
import sys
from collections.abc import Callable, Mapping

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "KitError": "config",
    "load_config": "config",
    "Prompt": "config.prompts",
    "load_prompts": "config.prompts",
    "release": "config.hardware",
    "load_experiment": "experiment",
    "Rollout": "rollout",
    "collect_rollout": "rollout",
    "LossOutput": "grpo",
    "completion_mask": "grpo",
    "group_advantages": "grpo",
    "grpo_loss": "grpo",
    "kl_divergence": "grpo",
    "token_logprobs": "grpo",
    "grpo_step": "training.step",
    "train": "training.loop",
    "evaluate": "evaluation.evaluate",
    "replay": "training.replay",
    "branch": "training.branch",
}

__all__ = ["__version__", *sorted(_HOME)]


def lazy_names(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`, for names that are loaded when they are first used (PEP 562).

    Args:
        package: its `__name__`; it lists its public names in `__all__`.
        home: name → the module below the package that defines it, such as `grpo.step`.
    """

    def load(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)  # found at once from now on
        return value

    def names() -> list[str]:
        module = sys.modules[package]
        return sorted({*vars(module), *module.__all__})

    return load, names


__getattr__, __dir__ = lazy_names(__name__, _HOME)

from grpo_kit import course as course  # noqa: E402  `gk.course` is as light as this file, and needs the lines above
