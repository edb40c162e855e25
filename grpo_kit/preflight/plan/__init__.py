"""What a run needs before it is started: `plan(config)` gives parameters, memory and seconds, part by part."""

from grpo_kit import lazy_names

_HOME = {"Plan": "fit", "plan": "fit", "PlanError": "architectures"}

__all__ = sorted(_HOME)

__getattr__, __dir__ = lazy_names(__name__, _HOME)
