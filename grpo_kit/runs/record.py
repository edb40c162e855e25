"""Read a run folder. Only files are read: no model, no torch, and a run that is still going on can be looked at.

What a run has not written yet is empty; what is there but damaged is an error that names the file.
"""

from __future__ import annotations

import json
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo_kit.config import KitError, printable
from grpo_kit.config.display import Shown
from grpo_kit.runs.iterations import iteration_name, rollouts_of, validations_of

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    from grpo_kit.config.media import Medium

BRANCH_FILE = "branch.json"  # where a branch comes from


class ImageKey(NamedTuple):
    """Which picture of an evaluation: the prompt's place, the variant, and the number of the latent seed."""

    prompt_id: int
    variant: str
    seed: int


class RecordError(KitError):
    """A run folder holds something that cannot be read."""


@dataclass(frozen=True, repr=False)
class Origin(Shown):
    """Where a branch comes from, as `branch.json` says it: nothing in it is a path of this machine."""

    parent: str  # the run's name
    iteration: int  # the last one that both have
    settings: dict[str, list[Any]]  # dotted key → [the parent's value, the branch's], in the order of the config
    best_from_parent: bool  # whether the parent had chosen its best/ by then
    differs: str | None = None  # how the state that was computed again differs from the parent's record, if it does


@dataclass(frozen=True, repr=False)
class RunRecord(Shown):
    """What a run left on disk. Tables are made when they are asked for, which is when pandas is loaded."""

    path: Path
    config: dict = field(repr=False)
    lines: list[dict] = field(repr=False)  # of metrics.jsonl
    validations: list[dict] = field(repr=False)
    results: dict = field(repr=False)
    sentinel: dict = field(default_factory=dict, repr=False)  # sentinel.json: what reward hacking showed
    branch: dict = field(default_factory=dict, repr=False)  # branch.json: where a branch comes from

    def _shown(self) -> dict[str, object]:
        counts = {"iterations": self.iterations, "validations": len(self.validations)}
        return {"path": self.path, **counts, "evaluated": bool(self.results)}

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A row an iteration; of an iteration that was logged twice the later one."""
        import pandas as pd

        if not self.lines:
            return pd.DataFrame({"iteration": pd.Series(dtype="int64")})
        frame = pd.DataFrame(self.lines).drop_duplicates("iteration", keep="last")
        return frame.sort_values("iteration").reset_index(drop=True)

    @cached_property
    def evaluation(self) -> pd.DataFrame:
        """A row for each (prompt, variant, seed) of the final evaluation; empty where there was none."""
        return _read_parquet(self.path / "evaluation" / "rows.parquet")

    @property
    def iterations(self) -> int:
        """The last iteration logged; 0 before the first."""
        return max((int(line["iteration"]) for line in self.lines), default=0)

    @property
    def rollout_iterations(self) -> list[int]:
        """The iterations whose rollouts were kept."""
        return list(rollouts_of(self.path))

    def rollout(self, iteration: int) -> pd.DataFrame:
        """One iteration's rollout, a row a sample; a `RecordError` where it was not kept."""
        path = self.path / "rollouts" / f"{iteration_name(iteration)}.parquet"
        if not path.exists():
            kept = ", ".join(map(str, self.rollout_iterations)) or "none"
            raise RecordError(f"rollout of iteration {iteration}: not kept in this run, allowed: {kept}. Choose one.")
        return _read_parquet(path)

    def widest_group(self, iteration: int) -> pd.DataFrame:
        """The group of a kept rollout whose rewards differ most, best first: the one with most to learn from."""
        rollout = self.rollout(iteration)
        widest = rollout.groupby("group_id")["reward"].std().fillna(0.0).idxmax()
        group = rollout[rollout["group_id"] == widest]
        return group.sort_values("reward", ascending=False, kind="stable").reset_index(drop=True)

    def branch_text(self) -> str:
        """From which iteration on a branch is on its own, and what it changed there."""
        changes = [
            f"{key.split('.')[-1]} {printable(str(old)[:40])} → {printable(str(new)[:40])}"
            for key, (old, new) in self.branch.get("settings", {}).items()
        ]
        return f"after iteration {self.branch.get('iteration')}: {', '.join(changes) or 'nothing changed'}"

    def file(self, name: str) -> Path:
        """Return the path of a file that a row names, which must lie inside the run folder."""
        path = (self.path / name.replace("\0", "")).resolve()
        if "\0" in name or not path.is_relative_to(self.path.resolve()):
            raise RecordError(f"{name!r}: leads out of the run folder. A run names only its own files; mend that row.")
        return path

    def image(self, thumbnail: str) -> Image.Image:
        """Open a thumbnail named by a row of this run."""
        from PIL import Image

        with Image.open(self.file(thumbnail)) as image:
            return image.convert("RGB")

    def medium(self, thumbnail: str) -> Medium:
        """Open what a thumbnail of this run stands for: the film, sound or views beside it, or the picture itself."""
        from grpo_kit.config.media import open_medium

        place = file_beside(self.file(thumbnail))
        return self.image(thumbnail) if place is None else open_medium(place)

    def evaluation_images(self) -> Mapping[ImageKey, Medium]:
        """Return the evaluation's media by (prompt_id, variant, seed), opened when asked for."""
        columns = ["prompt_id", "variant", "seed", "thumbnail"]
        rows = self.evaluation[columns].itertuples(index=False) if len(self.evaluation) else ()
        names = {(int(p), str(v), int(s)): name for p, v, s, name in rows if isinstance(name, str) and name}
        return _Thumbnails(self, names)


class _Thumbnails(UserDict):
    """Names of a run's thumbnails by a key, each of which is opened when it is asked for."""

    def __init__(self, record: RunRecord, names: Mapping[ImageKey, str]) -> None:
        self._record = record
        super().__init__(names)

    def __getitem__(self, key: ImageKey) -> Medium:
        return self._record.medium(self.data[key])


def file_beside(thumbnail: Path) -> Path | None:
    """The file of the medium that a thumbnail stands for; None where it is a picture, and the thumbnail is all."""
    places = (thumbnail.with_suffix(suffix) for suffix in (".webp", ".wav"))
    return next(filter(Path.is_file, places), None)


def read_run(run_dir: Path | str) -> RunRecord:
    """Read a run folder: config, metrics, validations, results; a `RecordError` where it is damaged or not there."""
    path = Path(run_dir)
    if not path.is_dir():
        raise RecordError(f"run folder {path}: not found. Give the folder of a run, or train one: grpo-kit train.")
    return RunRecord(
        path=path,
        config=read_json(path / "config.json"),
        lines=read_metrics(path),
        validations=read_validations(path),
        results=read_json(path / "final_results.json"),
        sentinel=read_json(path / "sentinel.json"),
        branch=read_json(path / BRANCH_FILE),
    )


def metrics_lines(run_dir: Path) -> list[bytes]:
    """The lines of metrics.jsonl but for a last one without an end, which was cut or is being written."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says, a dict a line, null is None; a `RecordError` where a line is not JSON."""
    rows, place = [], run_dir / "metrics.jsonl"
    for number, line in enumerate(metrics_lines(run_dir), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RecordError(f"{place}:{number}: not JSON ({error}). Restore that line or delete it.") from error
    return rows


def read_validations(run_dir: Path) -> list[dict]:
    """The contents of all validation_iter_N.json, in order; a `RecordError` where one is damaged."""
    return [read_json(path) for path in validations_of(run_dir).values()]


def read_json(path: Path) -> dict:
    """An object from a JSON file; empty where there is no file; a `RecordError` where it is damaged."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path}: not JSON ({error}). Restore the file or delete it.") from error
    if not isinstance(data, dict):
        raise RecordError(f"{path}: found {type(data).__name__}, allowed: an object. Restore the file or delete it.")
    return data


def _read_parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    if not path.exists():
        return pd.DataFrame()
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: not a parquet file ({error}). Restore the file or delete it.") from error


def read_origin(run_dir: Path) -> Origin | None:
    """Where a run comes from, None where it is no branch; a `KitError` where `branch.json` is damaged."""
    place = run_dir / BRANCH_FILE
    try:
        return Origin(**read_json(place)) if place.is_file() else None
    except (RecordError, TypeError) as error:
        advice = "Restore the file, or make the branch again"
        raise KitError(f"{place}: no record of a branch ({error}). {advice}") from error


def first_own_validation(run_dir: Path) -> int:
    """The first iteration validated with a policy that `best/` can hold: 0, or the first that is a branch's own."""
    origin = read_origin(run_dir)
    return 0 if origin is None or origin.best_from_parent else origin.iteration + 1


def refuse_branch_without_checkpoint(run_dir: Path) -> None:
    """A `KitError` where a run is a branch: it cannot begin at iteration 0, for its first ones are its parent's."""
    origin = read_origin(run_dir)
    if origin is not None:
        what = f"run {run_dir}: no checkpoint is whole, and a branch of {origin.parent} cannot begin at iteration 0"
        again = f"grpo-kit replay {origin.parent} --iteration {origin.iteration} --branch"
        raise KitError(f"{what}. Branch again: {again}")
