"""A run is a folder: what is written where, and how it is opened again."""

import contextlib
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock, Timeout
from PIL import Image

from grpo_kit.config import Config, KitError, load_config, printable
from grpo_kit.config.hardware import computing_machine, library_versions
from grpo_kit.rollout import Rollout
from grpo_kit.runs.durable import error_number, flush, flush_tree, replace_file

logger = logging.getLogger(__name__)
_THUMBNAIL = 192  # pixels of the longer side, at most
_REPLACED = ".replaced-best"  # the old best/ while the new one takes its place
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class RunError(KitError):
    """A run folder that cannot be used."""


class _OneLine(logging.Formatter):
    """A record is one line that a terminal only shows: line ends and escape codes in its text are written out."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class _LogFile(logging.FileHandler):
    """A run's log. A line which the disk refuses is missing in it: the screen says so once, and the run goes on."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            print(f"{self.baseFilename}: {error.strerror}; lines are missing in it", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # told above: what could not be written cannot be flushed either
            super().close()


class RunFolder:
    """The files of one run; every path below is inside `path`. What is on disk is whole, and flushed at a commit."""

    def __init__(self, path: Path, config: Config | None = None) -> None:
        self.path = path
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self._config = config
        self._unflushed: set[Path] = set()  # files, and folders whose entries changed, since the last commit

    @classmethod
    def open(cls, path: Path | str, config: Config) -> "RunFolder":
        """Create the folder, or find it again with the same settings (more iterations are fine).

        Raises:
            RunError: it holds a run with other settings, or cannot be written to.
        """
        folder = cls(Path(path), config)
        with folder.file_errors(""):
            if not folder.path.is_dir():
                folder.path.mkdir(parents=True, exist_ok=True)
                flush(folder.path.parent)
            folder._agrees_with(config)
        return folder

    def _agrees_with(self, config: Config) -> None:
        if not (self.path / "config.json").is_file():
            return
        difference = first_difference(load_config(self.path / "config.json").to_dict(), config.to_dict())
        if difference:
            raise RunError(
                f"run folder {self.path}: {difference}; continue with the run's own config, or choose a new folder"
            )

    def hold(self, stack: contextlib.ExitStack) -> None:
        """Be the folder's only writer until the stack is closed: config written, a crash's leftovers gone, log open.

        What undoes a thing is on the stack before the thing is done: wherever an interrupt comes, the folder is free
        once the stack is closed, though a notebook keeps the error with all its frames.

        Raises:
            RunError: another process writes into it, or nobody can.
        """
        self._lock(stack)
        with self.file_errors(""):
            if self._config is not None:
                self._agrees_with(self._config)  # another process may have written it since
                self.write_config(self._config)
            self._tidy()
            _log_into(self.path / "training.log", stack)

    def write_config(self, config: Config) -> None:
        """Write the settings, with what beside them decides on the last bits."""
        self.write_json("config.json", config.to_dict() | _made_by(config))

    def require_free(self) -> None:
        """See that no other process writes into the folder now, before much is loaded.

        Raises:
            RunError: one does, or nobody can write into it.
        """
        if self.path.is_dir():
            with contextlib.ExitStack() as stack:
                self._lock(stack)

    def _lock(self, stack: contextlib.ExitStack) -> None:
        """Hold the lock until the stack is closed."""
        lock = FileLock(self.path / ".lock", timeout=0)
        stack.callback(lock.release, force=True)
        try:
            with self.file_errors(".lock"):
                lock.acquire()
        except Timeout as error:
            raise RunError(
                f"run folder {self.path}: another process writes into it; wait for it, or choose a new folder"
            ) from error

    def _tidy(self) -> None:
        """Remove what a crash left half written; a `best/` that was about to be replaced is the best again."""
        for folder in (self.path, self.checkpoints, self.path / "rollouts"):
            for left in folder.glob(".writing-*"):
                _remove(left)
        replaced = self.path / _REPLACED
        if replaced.exists() and not self.best.exists():
            os.replace(replaced, self.best)
        _remove(replaced)

    @contextmanager
    def file_errors(self, name: str) -> Iterator[None]:
        """Make one clear line of whatever the disk refuses, from the library that raised it.

        Raises:
            RunError: which file, why, what is committed, and what to do.
        """
        try:
            yield
        except KitError:
            raise
        except Exception as error:
            number = error_number(error)
            if number is None or isinstance(error, Timeout):
                raise
            what = f"run folder {self.path}: {name and name + ': '}{os.strerror(number)}"
            raise RunError(f"{what} ({self._told()}); {self._advice(number)}") from error

    def _committed(self) -> list[int]:
        """The iterations that have a checkpoint, as far as the folder can be read."""
        with contextlib.suppress(OSError):
            return sorted(int(place.name.removeprefix("iter_")) for place in self.checkpoints.glob("iter_[0-9]*"))
        return []

    def _told(self) -> str:
        committed = self._committed()
        return f"iteration {committed[-1]} is committed" if committed else "nothing is committed yet"

    def _advice(self, number: int) -> str:
        if number not in _FULL and not self._committed():
            return "choose a folder that can be written to"
        mend = "make room" if number in _FULL else "allow writing into it" if number in _FORBIDDEN else "mend that"
        return f"{mend}, then give the same command again: it goes on from there"

    def commit(self, save: Callable[[], object]) -> None:
        """Flush what was written since the last commit, and only then `save` the checkpoint that vouches for it.

        Raises:
            RunError: the disk does not take it; the commit before is as it was.
        """
        with self.file_errors("checkpoints"):
            for path in sorted(self._unflushed, reverse=True):  # a file before its folder
                flush(path)
            flush(self.path)
            self._unflushed.clear()
            save()

    def _inside(self, name: str) -> Path:
        """The place of a file of this run; a name that leads out of the folder is refused."""
        parts = Path(name).parts
        if "\0" in name or ".." in parts or Path(name).is_absolute() or not parts:
            raise RunError(f"file {name!r:.100}: leads out of the run folder; allowed: a path inside it")
        return self.path / name

    # --- metrics and validations --------------------------------------------------------------------------------------

    def append_metrics(self, metrics: dict[str, float]) -> None:
        """One line a finished iteration."""
        line = json.dumps(_without_nan(metrics), allow_nan=False) + "\n"
        self._unflushed.add(self.metrics_file)
        with self.file_errors("metrics.jsonl"), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(line)

    def metrics(self) -> list[dict[str, float]]:
        """All lines so far; a last one without its end is still being written, or was cut by a crash: left out."""
        return [json.loads(line) for line in self._metrics_lines()]

    def _metrics_lines(self) -> list[bytes]:
        if not self.metrics_file.is_file():
            return []
        return [line + b"\n" for line in self.metrics_file.read_bytes().split(b"\n")[:-1]]

    def forget_after(self, iteration: int) -> None:
        """Drop what was logged after the last committed iteration: it is computed again.

        A line is kept if it is an earlier iteration's; what is missing among these is a warning, since the run goes on.
        """
        with self.file_errors("metrics.jsonl"):
            kept = {
                number: line for line in self._metrics_lines() if (number := _iteration(line)) in range(iteration + 1)
            }
            if self.metrics_file.is_file():
                replace_file(self.metrics_file, b"".join(kept.values()))
        missing = [number for number in range(1, iteration + 1) if number not in kept]
        if missing:
            logger.warning("metrics.jsonl: lines of %d committed iterations are missing or damaged", len(missing))
        with self.file_errors("files of uncommitted iterations"):
            for place in self._dated_files():
                if int(re.search(r"\d{6,}", place.name)[0]) > iteration:
                    place.unlink()
                    self._unflushed.add(place.parent)

    def _dated_files(self) -> list[Path]:
        """The files that carry an iteration in their names."""
        number = "[0-9]" * 6 + "*"
        names = ("validation_iter_{}.json", "rollouts/iter_{}.parquet", "thumbnails/iter_{}_row_*.jpg")
        patterns = [name.format(number) for name in (*names, "thumbnails/validation_{}_*.jpg")]
        return [place for pattern in patterns for place in self.path.glob(pattern)]

    def write_json(self, name: str, data: dict) -> Path:
        """Write a JSON file whole or not at all."""
        text = json.dumps(_without_nan(data), indent=2, ensure_ascii=False, allow_nan=False)
        return self._replace(name, f"{text}\n".encode())

    def _replace(self, name: str, content: bytes) -> Path:
        place = self._inside(name)
        with self.file_errors(name):
            replace_file(place, content)
        self._unflushed.add(place.parent)
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
        place, content = self._inside(f"thumbnails/{name}.jpg"), io.BytesIO()
        small = image.copy()
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        small.save(content, "JPEG", quality=92, subsampling=0)
        with self.file_errors(f"thumbnails/{name}.jpg"):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content.getvalue())
        self._unflushed |= {place, place.parent}
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
        return self.save_table(f"rollouts/iter_{iteration:06d}.parquet", pd.DataFrame(rows))

    def save_table(self, name: str, table: pd.DataFrame) -> Path:
        """Write a parquet file whole or not at all."""
        content = io.BytesIO()
        table.to_parquet(content, index=False)
        return self._replace(name, content.getvalue())

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

    def save_best(self, save_pretrained: Callable[[Path], object]) -> None:
        """Replace `best/` by what `save_pretrained(folder)` writes, whole; a crash between leaves the old one.

        Raises:
            RunError: the disk does not take it; the old one is as it was.
        """
        aside, replaced = self.path / ".writing-best", self.path / _REPLACED
        with self.file_errors("best"):
            _remove(aside)
            save_pretrained(aside)
            flush_tree(aside)
            if self.best.exists():
                os.replace(self.best, replaced)
            os.replace(aside, self.best)
            _remove(replaced)


def _remove(place: Path) -> None:
    """Remove a file, or a folder with all that is in it, where there is one."""
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)


def _made_by(config: Config) -> dict[str, object]:
    """What beside the settings decides on a run's last bits."""
    return {"versions": library_versions(), "machine": computing_machine(config.model_settings)}


def _log_into(place: Path, stack: contextlib.ExitStack) -> None:
    """The kit's messages into a file, and its warnings onto the screen, until the stack is closed."""
    file, screen = _LogFile(place, encoding="utf-8"), logging.StreamHandler()
    stack.callback(file.close)
    file.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    screen.setFormatter(_OneLine("%(message)s"))
    screen.setLevel(logging.WARNING)
    root = logging.getLogger("grpo_kit")
    for handler in (file, screen):
        stack.callback(root.removeHandler, handler)
        root.addHandler(handler)
    stack.callback(setattr, root, "propagate", True)
    root.propagate = False  # other libraries' handlers would print every line a second time


def _iteration(line: bytes) -> int | None:
    """The iteration that a line of metrics is about; None where it says none."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return None


def _without_nan(data: object) -> object:
    """The same with null for every number that JSON does not have."""
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def course(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings that fix what a run computes, section.key → value: one that differs makes another run.

    Args:
        settings: a config's `to_dict()`.
    """
    may_differ = {f"training_settings.{name}" for name in ("num_iterations", "keep_checkpoints", "stop_on_divergence")}
    judged = {"evaluation_settings", "tracking_settings"}
    flat = {
        f"{section}.{key}": value
        for section, values in settings.items()
        if section.endswith("_settings") and section not in judged
        for key, value in values.items()
    }
    return {name: value for name, value in flat.items() if name not in may_differ}


def first_difference(old: dict, new: dict) -> str | None:
    """The first setting, if any, in which two configs differ so that one cannot continue the other."""
    there = course(old)
    for name, value in course(new).items():
        if there.get(name) != value:
            return f"{name}: found {there.get(name)!r} in the run, {value!r} in the config"
    return None
