"""The function that is examined: found by its name, called by the names of the arguments that it has."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from grpo_kit.config import KitError, one_line
from grpo_kit.config.own_code import imported
from grpo_kit.grpo import LOSS_TYPES, group_advantages, grpo_loss
from grpo_kit.preflight.loss_checks.cases import Batch, drifted, unlike_groups

TENSORS = ("logprobs", "old_logprobs", "ref_logprobs", "advantages", "rewards", "group_ids", "mask")


def _settings(function: Callable) -> dict[str, object]:
    """What one of the kit's functions takes by name besides tensors, with its defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in TENSORS}


# with what is passed where a function has no default of its own
SETTINGS = _settings(grpo_loss) | {"epsilon_high": 0.2}
ADVANTAGE_SETTINGS = _settings(group_advantages)


class NotAsked(Exception):
    """A property that a function gives no chance to test; the text says why."""


@dataclass(frozen=True)
class Answer:
    """What a loss function returned for a batch: loss, its gradient by the log-probabilities (N, T), its metrics."""

    loss: torch.Tensor
    gradient: torch.Tensor
    metrics: dict[str, float]


@dataclass(frozen=True)
class Subject:
    """A loss function with the known arguments that it takes; perhaps an advantage function beside it."""

    name: str
    loss: Callable | None
    takes: frozenset[str]
    advantages: Callable | None = None
    advantages_take: frozenset[str] = frozenset()
    mask_dtype: torch.dtype = torch.bool

    def run(self, batch: Batch, **settings: object) -> Answer:
        """Call the loss; beta is 0 unless given, what else is not given is the function's own default."""
        leaf = batch.logprobs.detach().clone().requires_grad_()
        tokens, length = float(batch.mask.sum()), batch.mask.shape[1]
        known = vars(batch) | {"logprobs": leaf, "mask": batch.mask.to(self.mask_dtype)}
        known |= {"beta": 0.0, "num_items_in_batch": tokens, "max_completion_length": length} | settings
        output = _called(self.loss, self.takes, known, leaf.dtype)
        value = getattr(output, "loss", output)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise TypeError(f"returned {_described(value)}, allowed: a scalar tensor, or an object with one in .loss")
        gradient = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] if value.requires_grad else None
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        metrics = getattr(output, "metrics", None)
        return Answer(value.detach().reshape(()), gradient, metrics if isinstance(metrics, dict) else {})

    def weigh(self, rewards: torch.Tensor, group_ids: torch.Tensor, **settings: object) -> torch.Tensor:
        """(N,) what each row is weighed by: its advantage, or, up to a factor, what the loss's gradient implies."""
        if self.advantages is not None:
            known = {"rewards": rewards, "group_ids": group_ids} | settings
            return _called(self.advantages, self.advantages_take, known, rewards.dtype)
        self.need_rewards()
        logprobs = torch.linspace(-2, -1, 3 * len(rewards), dtype=rewards.dtype).reshape(-1, 3)
        mask = torch.ones(len(rewards), 3, dtype=torch.bool)
        batch = Batch(logprobs, logprobs, logprobs, mask, rewards, group_ids, torch.zeros_like(rewards))
        return -self.run(batch).gradient.sum(dim=1)

    @property
    def knows_groups(self) -> bool:
        """What weighs the rows is given their groups."""
        return "group_ids" in (self.takes if self.advantages is None else self.advantages_take)

    def need(self, name: str, why: str = "") -> None:
        """Leave a property out where the function does not take an argument."""
        if name not in self.takes:
            raise NotAsked(f"takes no {name}{why and f': {why}'}")

    def need_rewards(self) -> None:
        """Leave a property of advantages out where the function takes them as they are."""
        if self.advantages is None and "advantages" in self.takes:
            raise NotAsked("takes advantages, not rewards; give --advantages to ask it of them")

    def has(self, name: str, value: object) -> bool:
        """The function takes this value of a setting without an error."""
        try:
            self.need(name)
            self.run(drifted(), **{"beta": 0.1, name: value})
        except Exception:  # it does not have such a value: that is the answer
            return False
        return True

    def forms(self) -> dict[str, dict[str, object]]:
        """Settings of each known loss type that the function has, by its name; {"": {}} where it has none."""
        names = [name for name in LOSS_TYPES if self.has("loss_type", name)]
        forms = {name: {"loss_type": name} for name in names} or {"": {}}
        if "cispo" in forms and "epsilon_high" in self.takes:
            forms["cispo"]["epsilon_high"] = 5.0  # CISPO bounds the ratio itself, not its distance from 1
        return forms

    def variants(self) -> list[dict[str, object]]:
        """The settings that change the form of the loss, in all combinations that the function offers."""
        level = "importance_sampling_level"
        levels = [{level: name} for name in ("token", "sequence") if self.has(level, name)] or [{}]
        return [form | chosen for form in self.forms().values() for chosen in levels]


def load_subject(loss: str, advantages: str = "") -> Subject:
    """The functions at two places of the form module:function; a `KitError` as of `imported` and `subject_of`."""
    return subject_of(imported(loss), loss, imported(advantages) if advantages else None)


def subject_of(loss: Callable | None, name: str = "", advantages: Callable | None = None) -> Subject:
    """Find out by their signatures how a loss function, an advantage function or both are called, and try it once.

    A loss names logprobs (N, T), advantages (N,) or rewards (N,), and what else of `TENSORS` and `SETTINGS` it takes;
    an advantage function names rewards (N,), group_ids (N,) and what it takes of `ADVANTAGE_SETTINGS`.
    A `KitError` where one needs other arguments, or fails on an ordinary batch.
    """
    subject = Subject(name or getattr(loss or advantages, "__name__", "loss"), None, frozenset())
    subject = subject if advantages is None else _with_advantages(subject, advantages)
    return subject if loss is None else _with_loss(subject, loss)


def _with_loss(subject: Subject, loss: Callable) -> Subject:
    """The subject with a loss, called with a boolean mask or, where that fails, with one of numbers."""
    loss, takes = _callable_by_name(loss, subject.name, TENSORS, SETTINGS)
    if "logprobs" not in takes or not takes & {"advantages", "rewards"}:
        listed = ", ".join(sorted(takes)) or "none of the known arguments"
        raise KitError(f"{subject.name}: takes {listed}; needs logprobs, and advantages or rewards, by name")
    problems = []
    for dtype in (torch.bool, torch.float64):
        form = replace(subject, loss=loss, takes=takes, mask_dtype=dtype)
        try:
            form.run(drifted())
            return form
        except Exception as error:  # foreign code may raise anything
            problems.append(error)
    raise KitError(
        f"{subject.name}: fails on an ordinary batch (6 rows, 7 tokens): {_named(problems[0])}"
    ) from problems[0]


def _with_advantages(subject: Subject, function: Callable) -> Subject:
    name = getattr(function, "__name__", "advantages")
    function, takes = _callable_by_name(function, name, ("rewards", "group_ids"), ADVANTAGE_SETTINGS)
    subject = replace(subject, advantages=function, advantages_take=takes)
    rewards, group_ids = unlike_groups(0)
    try:
        found = subject.weigh(rewards, group_ids)
    except Exception as error:  # foreign code may raise anything
        raise KitError(f"{name}: raised on ordinary rewards (20 of them): {_named(error)}") from error
    if not isinstance(found, torch.Tensor) or found.shape != rewards.shape:
        raise KitError(f"{name}: returned {_described(found)}, allowed: a tensor of the shape of rewards, (N,)")
    return subject


def _callable_by_name(
    function: Callable, name: str, arguments: Sequence[str], settings: Mapping[str, object]
) -> tuple[Callable, frozenset[str]]:
    """The function with a value for each setting that it has no default for, and the known names that it takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise KitError(f"{name}: its arguments cannot be read ({_named(error)}); wrap it in a function") from error
    known = (*arguments, *settings)
    parameters = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p for p in parameters if p.default is p.empty]
    for p in required:
        if p.kind is p.POSITIONAL_ONLY or p.name not in known:
            why = "by position only" if p.kind is p.POSITIONAL_ONLY else "which is not known"
            raise KitError(f"{name}: needs {p.name!r}, {why}; allowed, by name: {', '.join(known)}")
    filled = {p.name: settings[p.name] for p in required if p.name in settings}
    # an on/off switch of a setting's name is something else
    others = {p.name for p in parameters if isinstance(p.default, bool) and type(settings.get(p.name)) is not bool}
    return functools.partial(function, **filled), frozenset(known) & {p.name for p in parameters} - others


def _called(function: Callable, takes: frozenset[str], known: Mapping[str, object], dtype: torch.dtype) -> object:
    """What a function returns; tensors that it makes by itself are of the batch's dtype, as they are in training."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return function(**{name: value for name, value in known.items() if name in takes})
    finally:
        torch.set_default_dtype(before)


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
