"""The course: checks of the exercises that learners do in the notebooks."""

from grpo_kit import lazy_names

_HOME = {"Checked": "exercise", "catch_up": "exercise", "check": "exercise", "join": "progress", "leave": "progress"}
__all__ = sorted(_HOME)
__getattr__, __dir__ = lazy_names(__name__, _HOME)
