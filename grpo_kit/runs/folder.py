"""A run is a folder: what is written where, and how it is opened again."""

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock, Timeout
from PIL import Image

from grpo_kit.config import Config, KitError, load_config
from grpo_kit.hardware import library_versions
from grpo_kit.rollout import Rollout

_THUMBNAIL = 192  # pixels of the longer side, at most


class RunError(KitError):
    """A run folder that cannot be used."""


class _OneLine(logging.Formatter):
    """A record is one line that a terminal only shows: line ends and escape codes in its text are written out."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class RunFolder:
    """The files of one run; every path below is inside `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"

    @classmethod
    def open(cls, path: Path | str, config: Config) -> "RunFolder":
        """Create the folder, or open it again with the same settings (more iterations are fine).

        Raises:
            RunError: it holds a run with other settings, or cannot be written to.
        """
        folder = cls(Path(path))
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder._agree_on(config)
        except OSError as error:
            raise RunError(f"run folder {path}: {error.strerror}; choose a folder that can be written to") from error
        return folder

    def _agree_on(self, config: Config) -> None:
        """Write the config of a new run; compare it in an old one."""
        place = self.path / "config.json"
        if place.is_file():
            difference = _first_difference(load_config(place).to_dict(), config.to_dict())
            if difference:
                raise RunError(
                    f"run folder {self.path}: {difference}; continue with the run's own config, or choose a new folder"
                )
        config.save(place, versions=library_versions())

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder as its only writer, with `training.log` open.

        Raises:
            RunError: another process writes into it.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise RunError(
                f"run folder {self.path}: another process writes into it; wait for it, or choose a new folder"
            ) from error
        file, screen = logging.FileHandler(self.path / "training.log", encoding="utf-8"), logging.StreamHandler()
        file.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
        screen.setFormatter(_OneLine("%(message)s"))
        screen.setLevel(logging.WARNING)
        root = logging.getLogger("grpo_kit")
        root.addHandler(file)
        root.addHandler(screen)
        root.propagate = False  # other libraries' handlers would print every line a second time
        try:
            yield
        finally:
            root.propagate = True
            root.removeHandler(screen)
            root.removeHandler(file)
            file.close()
            lock.release()

    def _inside(self, name: str) -> Path:
        """The place of a file of this run; a name that leads out of the folder is refused."""
        parts = Path(name).parts
        if "\0" in name or ".." in parts or Path(name).is_absolute() or not parts:
            raise RunError(f"file {name!r:.100}: leads out of the run folder; allowed: a path inside it")
        return self.path / name

    # --- metrics and validations --------------------------------------------------------------------------------------

    def append_metrics(self, metrics: dict[str, float]) -> None:
        """One line a finished iteration."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_without_nan(metrics), allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """All lines so far."""
        if not self.metrics_file.is_file():
            return []
        return [json.loads(line) for line in self.metrics_file.read_text(encoding="utf-8").splitlines()]

    def forget_after(self, iteration: int) -> None:
        """Drop what was logged after the last committed iteration: it is computed again."""
        if self.metrics_file.is_file():
            lines = self.metrics_file.read_bytes().splitlines(keepends=True)[:iteration]
            replace_file(self.metrics_file, b"".join(lines))
        for place in (*self.path.glob("validation_iter_*.json"), *self.path.glob("rollouts/iter_*.parquet")):
            if int(place.stem.rsplit("_", 1)[1]) > iteration:
                place.unlink()

    def write_json(self, name: str, data: dict) -> Path:
        """Write a JSON file whole or not at all."""
        place = self._inside(name)
        text = json.dumps(_without_nan(data), indent=2, ensure_ascii=False, allow_nan=False)
        replace_file(place, f"{text}\n".encode())
        return place

    def validations(self) -> list[dict]:
        """All validations so far, in order."""
        return [
            json.loads(place.read_text(encoding="utf-8")) for place in sorted(self.path.glob("validation_iter_*.json"))
        ]

    # --- rollouts and pictures ----------------------------------------------------------------------------------------

    def save_thumbnail(self, image: Image.Image | None, name: str) -> str | None:
        """Save a small JPEG; returns its path relative to the run, None where there is no picture."""
        if image is None:
            return None
        place = self._inside(f"thumbnails/{name}.jpg")
        place.parent.mkdir(exist_ok=True)
        small = image.copy()
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        small.save(place, quality=92, subsampling=0)
        return place.relative_to(self.path).as_posix()

    def save_rollout(
        self,
        iteration: int,
        rollout: Rollout,
        advantages: Sequence[float],
        token_texts: Sequence[Sequence[str]],
        logprobs: Mapping[str, torch.Tensor],
    ) -> Path:
        """One row a sample: texts, seeds, rewards, advantage, thumbnail, and its tokens with their log-probabilities.

        Args:
            token_texts: each row's tokens as text.
            logprobs: name → (N, T), a column each: under the policy that sampled, the reference, the updated policy.
        """
        rows = [
            self._rollout_row(iteration, rollout, row, float(advantage))
            | {"tokens": list(token_texts[row])}
            | {name: values[row][rollout.completion_mask[row]].tolist() for name, values in logprobs.items()}
            for row, advantage in enumerate(advantages)
        ]
        place = self.path / "rollouts" / f"iter_{iteration:06d}.parquet"
        place.parent.mkdir(exist_ok=True)
        pd.DataFrame(rows).to_parquet(place, index=False)
        return place

    def _rollout_row(self, iteration: int, rollout: Rollout, row: int, advantage: float) -> dict[str, object]:
        group = int(rollout.group_ids[row])
        prompt = rollout.prompts[group]
        return {
            "iteration": iteration,
            "group_id": group,
            "sample": row - int((rollout.group_ids == group).nonzero()[0]),
            "user_prompt": prompt.user_prompt,
            "category": prompt.category,
            "difficulty": prompt.difficulty,
            "enhanced_prompt": rollout.enhanced_prompts[row],
            "image_seed": int(rollout.image_seeds[row, 0]),
            "reward": float(rollout.rewards[row]),
            "advantage": advantage,
            **{f"reward/{name}": float(values[row]) for name, values in rollout.reward_parts.items()},
            "thumbnail": self.save_thumbnail(rollout.images[row][0], f"iter_{iteration:06d}_row_{row:03d}"),
            "completion_ids": rollout.completion_ids[row][rollout.completion_mask[row]].tolist(),
        }

    def save_best(self, save_pretrained) -> None:
        """Replace `best/` by what `save_pretrained(folder)` writes, whole."""
        aside = self.path / ".writing-best"
        shutil.rmtree(aside, ignore_errors=True)
        save_pretrained(aside)
        shutil.rmtree(self.best, ignore_errors=True)
        os.replace(aside, self.best)


def replace_file(place: Path, content: bytes) -> None:
    """Write a file aside and rename it into place."""
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f".writing-{place.name}")
    aside.write_bytes(content)
    os.replace(aside, place)


def _without_nan(data: object) -> object:
    """The same with null for every number that JSON does not have."""
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _first_difference(old: dict, new: dict) -> str | None:
    """The first setting, if any, in which two configs differ so that one cannot continue the other."""
    may_differ = {("training_settings", name) for name in ("num_iterations", "keep_checkpoints", "stop_on_divergence")}
    for section in new:
        if not isinstance(new[section], dict):
            continue
        for key, value in new[section].items():
            if section in ("evaluation_settings", "tracking_settings") or (section, key) in may_differ:
                continue
            if old.get(section, {}).get(key) != value:
                return f"{section}.{key}: found {old.get(section, {}).get(key)!r} in the run, {value!r} in the config"
    return None
