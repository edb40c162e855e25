"""What a run recorded beside what was computed again, compared bit for bit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import starmap

import torch

from grpo_kit.config import one_line, printable
from grpo_kit.runs.durable import without_nan

ABSENT = "–"  # in place of a value that only the other side has


@dataclass(frozen=True)
class Comparison:
    """One thing, as it was recorded and as it was computed again: a number, how much it is, or where it differs."""

    part: str  # of the replay
    what: str
    recorded: str
    replayed: str
    difference: str | None = None  # the first place where both differ; None where every bit agrees

    @property
    def equal(self) -> bool:
        """Whether every bit agrees."""
        return self.difference is None


def compare(part: str, what: str, place: str, recorded: object, replayed: object) -> Comparison:
    """Compare two things bit for bit: dtype, shape, NaN and the sign of zero count.

    Args:
        part, what: name the comparison in a table; `place` does in the line about its first difference.
        recorded, replayed: plain values or tensors, and dicts and lists of these.
    """
    found = _first_difference(place, recorded, replayed)
    if found is None:
        text = recorded if isinstance(recorded, str) else f"all {len(recorded)}"
        return Comparison(part, what, text, text)
    where, *values = found
    old, new = (printable(str(value))[:80] for value in values)
    return Comparison(part, what, old, new, f"{where}: recorded {old}, replayed {new}")


def compare_each(part: str, kind: str, place: str, recorded: Mapping, replayed: Mapping) -> list[Comparison]:
    """A comparison for each name, but for what is empty; a value that only one side has is a difference."""
    pairs = [(name, pair) for name, *pair in _side_by_side(recorded, replayed) if any(pair)]
    return [compare(part, f"{kind}: {name}", f"{place}, {name}", *pair) for name, pair in pairs]


def compare_line(part: str, line: bytes, metrics: Mapping[str, float], *, as_one: bool = False) -> list[Comparison]:
    """Compare a line of metrics.jsonl with metrics, number by number or `as_one`; seconds are left out.

    The KL that a kept rollout adds where the loss needs none counts only where the replay has computed it too.
    """
    place, replayed = f"metrics.jsonl line {metrics['iteration']}", _numbers(json.dumps(without_nan(metrics)))
    try:
        recorded = _numbers(line)
    except (ValueError, TypeError) as error:
        return [unreadable(part, place, error)]
    if "kl" not in replayed:
        recorded.pop("kl", None)
    if as_one:
        return [compare(part, "metrics", place, recorded, replayed)]
    return compare_each(part, "metrics", place, recorded, replayed)


def unreadable(part: str, what: str, reason: object) -> Comparison:
    """A record that cannot be read, which is a difference too."""
    return Comparison(part, what, "unreadable", ABSENT, f"{what}: {one_line(reason)}")


def _numbers(line: bytes | str) -> dict[str, str]:
    """A line's numbers as they stand in it, so that nothing is rounded; no seconds, which two runs never share."""
    found = dict(json.loads(line, parse_float=str, parse_int=str))
    kept = {name: value for name, value in found.items() if name != "step_time" and not name.startswith("time/")}
    return {name: "null" if value is None else value for name, value in kept.items()}


def _first_difference(place: str, recorded: object, replayed: object) -> tuple[str, object, object] | None:
    """The first place where two things differ, and the value of each there; None where every bit agrees."""
    both = (recorded, replayed)
    if all(isinstance(one, torch.Tensor) for one in both):
        old, new = (f"{one.dtype} {tuple(one.shape)}" for one in both)
        if old != new:
            return place, old, new
        old, new = (one.detach().cpu().contiguous().reshape(-1) for one in both)
        unequal = (old.view(torch.uint8) != new.view(torch.uint8)).nonzero()
        first = int(unequal[0]) // old.element_size() if len(unequal) else None
        return None if first is None else (f"{place}[{first}]", old[first].item(), new[first].item())
    if all(isinstance(one, dict) for one in both):
        pairs = [(f"{place}, {name}", *pair) for name, *pair in _side_by_side(*both)]
    elif all(isinstance(one, list | tuple) for one in both) and len(recorded) == len(replayed):  # JSON has no tuples
        pairs = [(f"{place}[{i}]", *pair) for i, pair in enumerate(zip(*both, strict=True))]
    else:
        return None if repr(recorded) == repr(replayed) else (place, *both)
    return next(filter(None, starmap(_first_difference, pairs)), None)


def _side_by_side(recorded: Mapping, replayed: Mapping) -> list[tuple]:
    """(name, recorded value, replayed value) of all names that either side has."""
    return [(name, recorded.get(name, ABSENT), replayed.get(name, ABSENT)) for name in {**recorded, **replayed}]
