"""Grids: several runs of the notebooks that differ in their parameters, all checked before the first one starts.

A planned trial is a plain value, and `run_trial` a plain function of it, so that it may run on another machine.
"""

import itertools
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from grpo_kit.config import ConfigError, KitError, load_config
from grpo_kit.config.strict import read_strictly
from grpo_kit.runs.durable import json_bytes, replace_file
from grpo_kit.runs.notebooks import Executed, Planned, execute_in_turn, plan, write_profile
from grpo_kit.runs.record import read_json

RECORD = "trial.json"  # in a trial's folder: what it is, and how it ended
ORDER = "grid.json"  # in a grid's folder: the names of its trials
DONE = "done"  # in the record of a trial that is not run again
UNASKED = 24  # more trials than this need --yes
MOST = 10_000
NAME_LENGTH = 100  # characters of a trial's folder name


class GridError(KitError):
    """A grid that cannot be read, or that does not fit the folder which it would run in."""


@dataclass(frozen=True)
class Trial:
    """One combination: its name, which is its folder's, and its values; a key with a dot is a setting."""

    name: str
    values: Mapping[str, object]


@dataclass(frozen=True)
class PlannedTrial:
    """A trial with its folder and its notebooks, everything checked."""

    name: str
    folder: Path
    values: Mapping[str, object]
    settings: Mapping[str, object]  # those of the values that are settings of the profile
    profile: str
    notebooks: tuple[Planned, ...]


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended: each notebook that ran, and what stopped it, if anything did."""

    name: str
    folder: Path
    ran: tuple[Executed, ...]
    error: str | None = None

    @property
    def minutes(self) -> float:
        """What its notebooks took together."""
        return sum(notebook.minutes for notebook in self.ran)


def read_grid(path: Path) -> list[Trial]:
    """The trials of a grid file, YAML or JSON; a `GridError` where it is none.

    A mapping from names to values, or to lists of values, stands for every combination; a list of such mappings for
    the combinations of each. `seeds` is a short word for the values of `seed`. A name is a notebook's parameter, or
    with a dot a setting, such as `training_settings.beta`.
    """
    try:
        return grid_trials(read_strictly(Path(path).expanduser(), as_yaml=True))
    except ConfigError as error:
        raise GridError(f"grid {error}") from None


def grid_trials(grid: Mapping[str, object] | Sequence[Mapping[str, object]]) -> list[Trial]:
    """The trials of a grid, as `read_grid` describes it, each with a name of its own; else a `GridError`."""
    grids = [grid] if isinstance(grid, Mapping) else grid
    if not isinstance(grids, Sequence) or isinstance(grids, str) or not all(isinstance(g, Mapping) for g in grids):
        raise GridError(f"grid: found {type(grid).__name__}, allowed: names with lists of values, or a list of such")
    axes = [_axes(one) for one in grids if one]
    count = sum(math.prod(map(len, one.values())) for one in axes)
    if not 0 < count <= MOST:
        raise GridError(f"grid: found {count} trials, allowed: 1 to {MOST}. Give names with lists of values")
    combinations = [dict(zip(one, chosen, strict=True)) for one in axes for chosen in itertools.product(*one.values())]
    counts = Counter(map(_sorted_json, combinations))
    if twice := [values for values in combinations if counts[_sorted_json(values)] > 1]:
        raise GridError(f"grid: the trial {_label(twice[0])!r:.80} stands twice. Leave one out")
    return [Trial(name, values) for name, values in zip(_names(combinations), combinations, strict=True)]


def _axes(grid: Mapping[object, object]) -> dict[str, list[object]]:
    """The parameters and settings of a mapping, each with the list of its values."""
    if "seeds" in grid and "seed" in grid:
        raise GridError("grid: found both seeds and seed. Give one of them")
    axes = {}
    for name, given in grid.items():
        if not isinstance(name, str) or not name:
            raise GridError(f"grid: found the name {name!r:.60}, allowed: text. Put quotes around it")
        values = list(given) if isinstance(given, list | tuple) else [given]
        wrong = [repr(value) for value in values if not isinstance(value, bool | int | float | str)]
        if wrong or not values:
            allowed = "allowed: numbers, texts, true, false, or a list of them"
            raise GridError(f"grid: {name!r:.60}: found {(wrong or ['no value'])[0]:.60}, {allowed}")
        axes["seed" if name == "seeds" else name] = values
    return axes


def _sorted_json(values: Mapping[str, object]) -> str:
    return json.dumps(dict(values), sort_keys=True)


def _label(values: Mapping[str, object]) -> str:
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}
    return ",".join(f"{name.split('.')[-1]}={text}" for name, text in texts.items())


def _names(combinations: Sequence[Mapping[str, object]]) -> list[str]:
    """A folder name for each trial, such as `group_size=8,seed=1`; with a checksum where that alone would not do."""
    labels = [_label(values) for values in combinations]
    safe = [re.sub(r"[^A-Za-z0-9._=,+-]", "_", label).lstrip(".-") for label in labels]
    counts = Counter(name.lower() for name in safe)  # some file systems know no capital letters
    names = []
    for name, label, values in zip(safe, labels, combinations, strict=True):
        if name != label or counts[name.lower()] > 1 or len(name) > NAME_LENGTH:
            checksum = zlib.crc32(_sorted_json(values).encode())
            name = f"{name[: NAME_LENGTH - 9] or 'trial'}-{checksum:08x}"
        names.append(name)
    return names


def plan_trials(
    trials: Sequence[Trial],
    notebooks: Sequence[Path],
    profile: str,
    folder: Path,
    parameters: Mapping[str, object] | None = None,
    settings: Mapping[str, object] | None = None,
) -> list[PlannedTrial]:
    """Check every trial against the notebooks, the profile and what its folder holds, or raise a `KitError`.

    Args:
        folder: where the trials go, a folder each.
        parameters: the same in all trials; `settings` likewise, by dotted key.
    """
    common, planned = {**(parameters or {}), **(settings or {})}, []
    for trial in trials:
        if twice := sorted(trial.values.keys() & common.keys()):
            raise GridError(f"{twice[0]}: given for all trials and in the grid. Give it in one place")
        values, place = {**common, **trial.values}, Path(folder).resolve() / trial.name
        own = {name: value for name, value in values.items() if "." not in name}
        changed = {name: value for name, value in values.items() if "." in name}
        checked = plan(notebooks, profile, place, own, changed)
        planned.append(PlannedTrial(trial.name, place, values, changed, profile, tuple(checked)))
        there = read_json(place / RECORD)
        if other := [key for key, value in _identity(planned[-1]).items() if there and there.get(key) != value]:
            raise GridError(f"{place}: holds another trial ({other[0]} differs). Choose another --name or --run-dir")
    return planned


def _identity(trial: PlannedTrial) -> dict[str, object]:
    """What makes a trial the same one when a grid is started again."""
    return {
        "values": json.loads(json.dumps(dict(trial.values))),
        "config": load_config(trial.profile, trial.settings).to_dict(),
        "notebooks": [notebook.name for notebook in trial.notebooks],
    }


def run_trials(trials: Sequence[PlannedTrial], minutes_per_cell: float = 60.0) -> Iterator[TrialResult]:
    """Run one trial after the other; a failed one ends itself, not the others."""
    for trial in trials:
        yield run_trial(trial, minutes_per_cell)


def run_trial(
    trial: PlannedTrial, minutes_per_cell: float = 60.0, starting: Callable[[Planned], object] = lambda notebook: None
) -> TrialResult:
    """As `execute_in_turn` for a trial's notebooks; a trial that was finished before is left as it is."""
    if (before := finished(trial)) is not None:
        return before
    write_profile(trial.folder, trial.profile, trial.settings)
    _write_record(trial, "started", ())
    ran = execute_in_turn(trial.notebooks, trial.folder, minutes_per_cell, starting)
    error = f"{ran[-1].name}: {ran[-1].error}" if ran[-1].error else None
    _write_record(trial, "failed" if error else DONE, ran)
    return TrialResult(trial.name, trial.folder, tuple(ran), error)


def finished(trial: PlannedTrial) -> TrialResult | None:
    """The result of a trial that was finished before; a failed or stopped one is not, and runs again."""
    there = read_json(trial.folder / RECORD)
    if there.get("status") != DONE:
        return None
    ran = tuple(Executed(**{**entry, "path": trial.folder / entry["path"]}) for entry in there["ran"])
    return TrialResult(trial.name, trial.folder, ran)


def write_order(folder: Path, trials: Sequence[PlannedTrial]) -> None:
    """Note in a grid's folder in which order its trials stand; those of an earlier, smaller grid keep their place."""
    earlier = [path.name for path in trial_folders(folder)]
    names = [*earlier, *(trial.name for trial in trials if trial.name not in earlier)]
    replace_file(Path(folder) / ORDER, json_bytes({"trials": names}))


def trial_folders(folder: Path) -> list[Path]:
    """The folders of a grid's trials in its order; none where the folder holds no grid."""
    found = {path.parent.name: path.parent for path in sorted(Path(folder).glob(f"*/{RECORD}"))}
    order = read_json(Path(folder) / ORDER).get("trials", [])
    return [found[name] for name in dict.fromkeys([*order, *found]) if name in found]


def _write_record(trial: PlannedTrial, status: str, ran: Sequence[Executed]) -> None:
    entries = [{**asdict(one), "path": one.path.relative_to(trial.folder).as_posix()} for one in ran]
    replace_file(trial.folder / RECORD, json_bytes({**_identity(trial), "status": status, "ran": entries}))
