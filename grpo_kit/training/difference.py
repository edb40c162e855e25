"""What was recorded beside what was computed again: numbers, tables, tensors and files, bit for bit."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ABSENT = "–"


@dataclass(frozen=True)
class Comparison:
    """One thing, as it was recorded and as it was computed again: numbers in full, what is larger as a short digest."""

    part: str  # of the replay
    what: str
    recorded: str
    replayed: str
    difference: str | None = None  # where it is first different, None where nothing is

    @property
    def equal(self) -> bool:
        """Whether every bit agrees."""
        return self.difference is None


def unreadable(part: str, what: str, reason: object) -> Comparison:
    """A record that cannot be read, which is a difference too."""
    text = " ".join(str(reason).split())[:200]
    return Comparison(part, what, "unreadable", ABSENT, f"{what}: {text}")


def together(comparisons: Sequence[Comparison], what: str) -> Comparison:
    """Several comparisons of one part as one."""
    sides = ([one.recorded.encode() for one in comparisons], [one.replayed.encode() for one in comparisons])
    differs = next((one.difference for one in comparisons if not one.equal), None)
    digests = [_digest(*side) for side in sides]
    return Comparison(comparisons[0].part, f"{what}: all {len(comparisons)}", *digests, differs)


# --- a line of metrics.jsonl ------------------------------------------------------------------------------------------


class Digits(str):
    """A number as its file has it: `json.loads(line, parse_float=Digits)` rounds nothing."""

    __repr__ = str.__str__


def is_seconds(name: str) -> bool:
    """Whether a metric is a time, which no two runs have in common."""
    return name == "step_time" or name.startswith("time/")


def compare_metrics(part: str, place: str, recorded: Mapping, replayed: Mapping) -> list[Comparison]:
    """Each number of a line of metrics.jsonl, but for its seconds; one that only one side has is a difference."""
    names = [name for name in {**recorded, **replayed} if not is_seconds(name)]
    found = []
    for name in names:
        values = [_number(side[name]) if name in side else ABSENT for side in (recorded, replayed)]
        differs = f"{place}, {name}: recorded {values[0]}, replayed {values[1]}"
        found.append(Comparison(part, f"metrics: {name}", *values, None if values[0] == values[1] else differs))
    return found


def _number(value: object) -> str:
    """A value as metrics.jsonl has it: every digit, and null for what is no number."""
    return "null" if value is None or (isinstance(value, float) and not math.isfinite(value)) else repr(value)


# --- the table of a rollout -------------------------------------------------------------------------------------------


def compare_tables(part: str, place: str, recorded: pd.DataFrame, replayed: pd.DataFrame) -> list[Comparison]:
    """Each column, cell by cell; a column that only one side has is a difference."""
    found = []
    for name in {**dict.fromkeys(recorded), **dict.fromkeys(replayed)}:
        cells = [[_cell(v) for v in table[name]] if name in table else None for table in (recorded, replayed)]
        digests = [ABSENT if column is None else _digest(repr(column).encode()) for column in cells]
        found.append(Comparison(part, f"rollout: {name}", *digests, _first_cell(f"{place}, {name}", *cells)))
    return found


def _cell(value: object) -> object:
    """A cell as plain values whose `repr` is equal only where every bit is."""
    if isinstance(value, np.ndarray | list):
        return [_cell(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def _first_cell(place: str, recorded: list | None, replayed: list | None) -> str | None:
    if recorded is None or replayed is None:
        return f"{place}: only {'recorded' if replayed is None else 'replayed'}"
    if len(recorded) != len(replayed):
        return f"{place}: recorded {len(recorded)} rows, replayed {len(replayed)}"
    for row, pair in enumerate(zip(recorded, replayed, strict=True)):
        if repr(pair[0]) == repr(pair[1]):
            continue
        where, pair = _first_element(*pair)
        return f"{place}, row {row}{where}: recorded {pair[0]!r:.80}, replayed {pair[1]!r:.80}"
    return None


def _first_element(recorded: object, replayed: object) -> tuple[str, tuple[object, object]]:
    """Within a row: the place of the first element that differs, and both of its values."""
    if isinstance(recorded, list) and isinstance(replayed, list) and len(recorded) == len(replayed):
        pairs = enumerate(zip(recorded, replayed, strict=True))
        place, pair = next((place, pair) for place, pair in pairs if repr(pair[0]) != repr(pair[1]))
        return f"[{place}]", pair
    return "", (recorded, replayed)


# --- tensors ----------------------------------------------------------------------------------------------------------


def compare_tensors(
    part: str, what: str, recorded: Mapping[str, torch.Tensor], replayed: Mapping[str, torch.Tensor]
) -> Comparison:
    """All tensors of one thing, byte by byte: dtype, shape, NaN and the sign of zero count."""
    counts = f"{what} ({len(replayed)} tensor{'' if len(replayed) == 1 else 's'})"
    raws = [[one for name in sorted(side) for one in _raw(name, side[name])] for side in (recorded, replayed)]
    digests = [_digest(*raw) for raw in raws]
    return Comparison(part, counts, *digests, _first_tensor(what, recorded, replayed))


def _raw(name: str, tensor: torch.Tensor) -> tuple[bytes, bytes]:
    return f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), _bytes(tensor).numpy().tobytes()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _first_tensor(what: str, recorded: Mapping[str, torch.Tensor], replayed: Mapping[str, torch.Tensor]) -> str | None:
    for name in {**recorded, **replayed}:
        if name not in recorded or name not in replayed:
            return f"{what}, {name}: only {'recorded' if name in recorded else 'replayed'}"
        old, new = recorded[name], replayed[name]
        if old.dtype != new.dtype or old.shape != new.shape:
            kinds = [f"{one.dtype} {tuple(one.shape)}" for one in (old, new)]
            return f"{what}, {name}: recorded {kinds[0]}, replayed {kinds[1]}"
        unequal = _bytes(old) != _bytes(new)
        if unequal.any():
            place = int(unequal.nonzero()[0]) // old.element_size()
            values = [one.reshape(-1)[place].item() for one in (old, new)]
            return f"{what}, {name}[{place}]: recorded {values[0]!r}, replayed {values[1]!r}"
    return None


# --- files ------------------------------------------------------------------------------------------------------------


def compare_files(part: str, what: str, names: list[str], recorded: Path, replayed: Path) -> Comparison:
    """Files of two folders, byte by byte."""
    old, new = ([_content(folder / name) for name in names] for folder in (recorded, replayed))
    first = next((place for place in range(len(names)) if old[place] != new[place]), None)
    differs = None
    if first is not None:
        differs = f"{names[first]}: {'missing' if old[first] is None else 'other bytes than it gives now'}"
    return Comparison(part, what, *(_digest(*(content or b"" for content in side)) for side in (old, new)), differs)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def compare_settings(part: str, what: str, recorded: object, replayed: object) -> Comparison:
    """Plain values, as JSON."""
    old, new = (json.dumps(value, sort_keys=True) for value in (recorded, replayed))
    differs = None if old == new else f"{what}: recorded {old:.200}, replayed {new:.200}"
    return Comparison(part, what, _digest(old.encode()), _digest(new.encode()), differs)


def _digest(*contents: bytes) -> str:
    """The first digits of a sha256 over contents and their lengths."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:12]
