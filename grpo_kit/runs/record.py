"""Read back a run folder. Only files are read: no model, no torch, and a run that is still going on can be looked at.

What a run has not written yet is simply empty (no evaluation yet: an empty frame); what is there but damaged is an
error that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from PIL import Image

from grpo_kit.config import KitError

ImageKey = tuple[int, str, int]  # (prompt_id, variant, seed)


class RecordError(KitError):
    """A run folder holds something that cannot be read."""


@dataclass(frozen=True)
class RunRecord:
    """What a run left on disk: `metrics` has a row an iteration, `evaluation` a row (prompt, variant, seed)."""

    path: Path
    config: dict = field(repr=False)
    metrics: pd.DataFrame = field(repr=False)
    validations: list[dict] = field(repr=False)
    results: dict = field(repr=False)
    evaluation: pd.DataFrame = field(repr=False)
    sentinel: dict = field(default_factory=dict, repr=False)
    branch: dict = field(default_factory=dict, repr=False)  # where a branch comes from

    @property
    def iterations(self) -> int:
        """The last iteration logged; 0 before the first."""
        return int(self.metrics["iteration"].max()) if len(self.metrics) else 0

    @property
    def rollout_iterations(self) -> list[int]:
        """The iterations whose rollouts were kept."""
        return sorted(int(path.stem.split("_")[1]) for path in self.path.glob("rollouts/iter_*.parquet"))

    def rollout(self, iteration: int) -> pd.DataFrame:
        """Return one iteration's rollout, a row a sample.

        Raises:
            RecordError: that iteration's rollout was not kept.
        """
        path = self.path / "rollouts" / f"iter_{iteration:06d}.parquet"
        if not path.exists():
            kept = ", ".join(map(str, self.rollout_iterations)) or "none"
            raise RecordError(f"rollout of iteration {iteration}: not kept in this run, allowed: {kept}. Choose one.")
        return _read_parquet(path)

    def widest_group(self, iteration: int) -> pd.DataFrame:
        """Return the group of a kept rollout whose rewards differ most, best first: the one with most to learn from."""
        rollout = self.rollout(iteration)
        widest = rollout.groupby("group_id")["reward"].std().fillna(0.0).idxmax()
        group = rollout[rollout["group_id"] == widest]
        return group.sort_values("reward", ascending=False, kind="stable").reset_index(drop=True)

    def image(self, thumbnail: str) -> Image.Image:
        """Open a thumbnail named by a row of this run."""
        with Image.open(self.file(thumbnail)) as image:
            return image.convert("RGB")

    def file(self, name: str) -> Path:
        """Return the path of a file that a row names, which must lie inside the run folder."""
        path = (self.path / name.replace("\0", "")).resolve()
        if "\0" in name or not path.is_relative_to(self.path.resolve()):
            raise RecordError(
                f"{name!r}: leads out of the run folder. A run names only its own files; repair that row."
            )
        return path

    def evaluation_images(self) -> Mapping[ImageKey, Image.Image]:
        """Return the evaluation's pictures by (prompt_id, variant, seed), opened when asked for."""
        return _Thumbnails(self)


class _Thumbnails(Mapping[ImageKey, Image.Image]):
    """A mapping over the evaluation's thumbnails that opens one at a time."""

    def __init__(self, record: RunRecord) -> None:
        rows = record.evaluation
        self._record = record
        columns = (
            zip(rows["prompt_id"], rows["variant"], rows["seed"], rows["thumbnail"], strict=True) if len(rows) else ()
        )
        self._names = {(int(p), str(v), int(s)): name for p, v, s, name in columns if isinstance(name, str) and name}

    def __getitem__(self, key: ImageKey) -> Image.Image:
        return self._record.image(self._names[key])

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def __iter__(self) -> Iterator[ImageKey]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_run(run_dir: Path | str) -> RunRecord:
    """Read a run folder: config, metrics, validations, evaluation, sentinel; rollouts and pictures when asked for.

    Raises:
        RecordError: there is no such folder, or a file in it is damaged.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise RecordError(f"run folder {path}: not found. Give the folder of a run, or train one: grpo-kit train.")
    return RunRecord(
        path=path,
        config=_read_json(path / "config.json"),
        metrics=_read_metrics(path / "metrics.jsonl"),
        validations=[_read_json(file) for file in sorted(path.glob("validation_iter_*.json"))],
        results=_read_json(path / "final_results.json"),
        evaluation=_read_parquet(path / "evaluation" / "rows.parquet"),
        sentinel=_read_json(path / "sentinel.json"),
        branch=_read_json(path / "branch.json"),
    )


def _read_metrics(path: Path) -> pd.DataFrame:
    """Return a row an iteration. A last line without its newline is still being written: left out."""
    if not path.exists():
        return pd.DataFrame({"iteration": pd.Series(dtype="int64")})
    complete = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = []
    for number, line in enumerate(complete, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RecordError(f"{path}:{number}: not JSON ({error}). Restore that line or delete it.") from error
    frame = pd.DataFrame(rows)
    if frame.empty:
        return pd.DataFrame({"iteration": pd.Series(dtype="int64")})
    return frame.drop_duplicates("iteration", keep="last").sort_values("iteration").reset_index(drop=True)


def _read_json(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path}: not JSON ({error}). Restore the file or delete it.") from error


def _read_parquet(path: Path) -> pd.DataFrame:
    if not path.exists():
        return pd.DataFrame()
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: not a parquet file ({error}). Restore the file or delete it.") from error
