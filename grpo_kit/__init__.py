"""grpo_kit: teach a vision-language model to write better text-to-image prompts, with GRPO.

The public names below are resolved when they are first used, so that `import grpo_kit` loads neither torch nor
pydantic:

    import grpo_kit as gk
    config = gk.load_config("tiny")
    kit = gk.load_experiment(config)
    gk.train(kit, "reports/first")

`train`, `evaluate`, `replay` and `branch` are functions here and files of the same name below. `gk.train` and
`from grpo_kit import train` always give the function, whatever was imported before; the rest of such a file is reached
by `from grpo_kit.train import ...`.
"""

import sys
from types import ModuleType

from grpo_kit.lazy import lazy_names

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "KitError": "config",
    "load_config": "config",
    "Prompt": "prompts",
    "load_prompts": "prompts",
    "release": "hardware",
    "load_experiment": "experiment",
    "Rollout": "rollout",
    "collect_rollout": "rollout",
    "LossOutput": "grpo",
    "completion_mask": "grpo",
    "group_advantages": "grpo",
    "grpo_loss": "grpo",
    "kl_divergence": "grpo",
    "token_logprobs": "grpo",
    "grpo_step": "grpo.step",
    "train": "train",
    "evaluate": "evaluate",
    "replay": "replay",
    "branch": "branch",
}

__all__ = ["__version__", *sorted(_HOME)]


__getattr__, __dir__ = lazy_names(__name__, _HOME)


class _Package(ModuleType):
    """This package's module type: importing `grpo_kit.train` must not put the file in place of the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            return  # the import system binds each submodule to its parent; the file stays in sys.modules
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
