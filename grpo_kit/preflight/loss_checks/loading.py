"""Find a function and how it is called: by its signature and, where that leaves it open, by calling it."""

import importlib
import inspect
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from grpo_kit.config import KitError
from grpo_kit.preflight.loss_checks.cases import drifted, unlike_groups
from grpo_kit.preflight.loss_checks.subject import ADVANTAGE_SHAPES, TENSORS, Subject, described

SETTINGS: dict[str, object] = {  # with what is passed where a function has no default of its own
    "beta": 0.0,
    "epsilon": 0.2,
    "epsilon_high": 0.2,
    "delta": None,
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "kl_estimator": "k3",
    "use_bias_correction_kl": False,
    "weights": None,
    "num_items_in_batch": None,
    "max_completion_length": None,
}
ADVANTAGE_ARGUMENTS = ("rewards", "group_ids")
ADVANTAGE_SETTINGS: dict[str, object] = {
    "scale_rewards": "group",
    "baseline": "mean",
    "eps": 1e-4,
    "noise_floor": 0.0,
    "batch_rewards": None,
}
# For a function that takes any keyword: two calls that differ where it heeds the setting. Each may use those above it.
_PROBES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "loss_type": ({"loss_type": "grpo"}, {"loss_type": "dr_grpo"}),
    "beta": ({"beta": 0.0}, {"beta": 0.5}),
    "epsilon": ({"epsilon": 0.05}, {"epsilon": 0.5}),
    "epsilon_high": ({"epsilon_high": 0.05}, {"epsilon_high": 3.0}),
    "delta": ({"delta": None}, {"delta": 1.3}),
    "importance_sampling_level": ({"importance_sampling_level": "token"}, {"importance_sampling_level": "sequence"}),
    "kl_estimator": ({"beta": 0.5, "kl_estimator": "k2"}, {"beta": 0.5, "kl_estimator": "k3"}),
    "use_bias_correction_kl": tuple({"beta": 0.5, "use_bias_correction_kl": value} for value in (False, True)),
    "weights": ({"weights": None}, {"weights": torch.full((6, 7), 0.5, dtype=torch.float64)}),
    "num_items_in_batch": tuple({"loss_type": "dapo", "num_items_in_batch": value} for value in (10.0, 1000.0)),
    "max_completion_length": tuple({"loss_type": "dr_grpo", "max_completion_length": value} for value in (10, 1000)),
}


def load_subject(loss: str, advantages: str = "") -> Subject:
    """The functions at two places of the form module:function; modules are looked for where the command is called too.

    Raises:
        KitError: a place that names no function, and what `subject_of` raises.
    """
    return subject_of(_imported(loss), loss, _imported(advantages) if advantages else None)


def subject_of(loss: Callable | None, name: str = "", advantages: Callable | None = None) -> Subject:
    """Find out how a loss function is called, by its signature and, where that leaves it open, by calling it.

    Raises:
        KitError: a function that needs what the doctor does not know, or that fails on an ordinary batch.
    """
    name = name or getattr(loss or advantages, "__name__", "loss")
    subject = Subject(name, None, frozenset())
    if advantages is not None:
        subject = _with_advantages(subject, advantages)
    return subject if loss is None else _with_loss(subject, loss)


def _imported(place: str) -> Callable:
    module, separator, attribute = place.partition(":")
    if not separator or not module or not attribute:
        raise KitError(f"function {place!r:.100}: allowed: module:function, such as grpo_kit.grpo:grpo_loss")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a foreign module does while it is imported
        raise KitError(f"module {module!r:.100}: cannot be imported: {_one_line(error)}") from error
    function = getattr(found, attribute, None)
    if not callable(function):
        raise KitError(f"function {place!r:.100}: found no function {attribute!r:.60} in {module}")
    return function


def _with_loss(subject: Subject, loss: Callable) -> Subject:
    """Decide which arguments a loss takes, and in which form mask and advantages suit it."""
    parameters = _parameters(loss, subject.name, (*TENSORS, *SETTINGS))
    named = frozenset(parameters) & {*TENSORS, *SETTINGS}
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    takes = named | (_suiting_tensors(named) if is_open else frozenset())
    if "logprobs" not in takes or not takes & {"advantages", "rewards"}:
        raise KitError(f"{subject.name}: takes {_listed(takes)}; needs logprobs, and advantages or rewards")
    subject = replace(subject, loss=_with_defaults(loss, parameters, SETTINGS), takes=takes)
    subject = _in_working_form(subject)
    for setting, (one, other) in _PROBES.items() if is_open else ():
        if setting not in subject.takes and _heeds(subject, setting, one, other):
            subject = replace(subject, takes=subject.takes | {setting})
    return subject


def _with_advantages(subject: Subject, function: Callable) -> Subject:
    name = getattr(function, "__name__", "advantages")
    known = (*ADVANTAGE_ARGUMENTS, *ADVANTAGE_SETTINGS)
    parameters = _parameters(function, name, known)
    takes = frozenset(parameters) & frozenset(known)
    if "scale_rewards" in takes and isinstance(parameters["scale_rewards"].default, bool):
        takes -= {"scale_rewards"}  # of another meaning than "group", "batch", "none": left at its default
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        takes |= frozenset(ADVANTAGE_ARGUMENTS)
    function = _with_defaults(function, parameters, ADVANTAGE_SETTINGS)
    rewards, group_ids = unlike_groups(0)
    try:
        found = replace(subject, advantages=function, advantages_take=takes).weigh(rewards, group_ids)
    except Exception as error:
        raise KitError(f"{name}: raised on ordinary rewards (20 of them): {_one_line(error)}") from error
    if not isinstance(found, torch.Tensor) or found.shape != rewards.shape:
        raise KitError(f"{name}: returned {described(found)}, allowed: a tensor of the shape of rewards, (N,)")
    return replace(subject, advantages=function, advantages_take=takes)


def _parameters(function: Callable, name: str, known: tuple[str, ...]) -> dict[str, inspect.Parameter]:
    """The parameters by name; one that must be given and is not known is an error."""
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise KitError(f"{name}: its arguments cannot be read ({_one_line(error)}); wrap it in a function") from error
    for parameter in parameters.values():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if needed and (parameter.kind is parameter.POSITIONAL_ONLY or parameter.name not in known):
            why = (
                "by position only" if parameter.kind is parameter.POSITIONAL_ONLY else "which the doctor does not know"
            )
            raise KitError(f"{name}: needs {parameter.name!r}, {why}; allowed, by name: {', '.join(known)}")
    return parameters


def _with_defaults(
    function: Callable, parameters: dict[str, inspect.Parameter], settings: dict[str, object]
) -> Callable:
    """The function with values for those of the settings that it has no default for."""
    needed = {name: value for name, value in settings.items() if name in parameters}
    needed = {name: value for name, value in needed.items() if parameters[name].default is inspect.Parameter.empty}
    return lambda **arguments: function(**needed | arguments)


def _suiting_tensors(named: frozenset[str]) -> frozenset[str]:
    """What is passed to a function that takes any keyword: rewards only where it names them."""
    by_rewards = "rewards" in named and "advantages" not in named
    return frozenset(TENSORS) - ({"advantages"} if by_rewards else {"rewards", "group_ids"})


def _in_working_form(subject: Subject) -> Subject:
    """Masks may be boolean or numbers, advantages of several shapes: the first combination that works."""
    problem: Exception | None = None
    for dtype, shape in itertools.product((torch.bool, torch.int64, torch.float64), ADVANTAGE_SHAPES):
        form = replace(subject, mask_dtype=dtype, advantages_shape=shape)
        try:
            form.run(drifted())
            return form
        except Exception as error:
            if isinstance(error, KitError):
                raise
            problem = problem or error
    raise KitError(f"{subject.name}: fails on an ordinary batch (6 rows, 7 tokens): {_one_line(problem)}") from problem


def _heeds(subject: Subject, setting: str, one: dict[str, object], other: dict[str, object]) -> bool:
    trial = replace(subject, takes=subject.takes | {setting})
    if not (trial.works(**one) and trial.works(**other)):
        return False
    return not torch.equal(*(trial.run(drifted(drift=1.0), **settings).gradient for settings in (one, other)))


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "none of the known arguments"


def _one_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines() or ["no further text"]
    return f"{type(error).__name__}: {lines[0]:.200}"
