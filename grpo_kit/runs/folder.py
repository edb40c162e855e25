"""A run is a folder: what is written where, and how it is opened again."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from grpo_kit.config import Config, KitError, load_config
from grpo_kit.config.contents import HELD_OUT
from grpo_kit.config.hardware import computing_machine, library_versions
from grpo_kit.runs.durable import flush, flush_tree, json_bytes, remove, replace, replace_file, without_nan
from grpo_kit.runs.iterations import checkpoints_of, files_of_iterations, iteration_of
from grpo_kit.runs.log_file import log_into
from grpo_kit.runs.own_rewards import Entries, changed_rewards, is_own, recorded_rewards
from grpo_kit.runs.record import metrics_lines, read_json, read_metrics, read_validations

if TYPE_CHECKING:
    import pandas as pd

    from grpo_kit.config.media import Medium

logger = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_REPLACED = ".replaced-best"  # the old best/ while the new one takes its place


class RunError(KitError):
    """A run folder that cannot be used."""


class RunFolder:
    """The writer of one run's files, all of them inside `path`. A file is whole or not there; a commit flushes all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self._config: Config | None = None
        self.contents: dict[str, str] = {}
        self._rewards: Entries | None = None
        self._unflushed: set[Path] = set()  # files, and folders whose entries changed, since the last commit

    @classmethod
    def open(
        cls,
        path: Path | str,
        config: Config,
        contents: Mapping[str, str] | None = None,
        rewards: Entries | None = None,
    ) -> RunFolder:
        """Create the folder, or find it again with the same settings (more iterations are fine); else a `KitError`.

        Args:
            contents: dotted key → digest of what decides the result and lies in files; see `config.contents`.
            rewards: what decides them (`Rewards.record`); None is not compared, and not written.
        """
        folder = cls(Path(path))
        folder._config, folder.contents, folder._rewards = config, dict(contents or {}), rewards
        with folder.file_errors(""):
            if not folder.path.is_dir():
                folder.path.mkdir(parents=True, exist_ok=True)
                flush(folder.path.parent)
            folder._require_same(config)
        return folder

    def _require_same(self, config: Config) -> str | None:
        """Refuse other settings, rewards or contents than the run's; a sentence where held-out prompts are others."""
        if not (self.path / "config.json").is_file():
            return None
        here, then = self.contents, read_json(self.path / "config.json").get("contents", {})
        other = {
            key: f"{key}: other content than when the run began (found {here[key]:.24}, recorded {then[key]:.24})"
            for key in here
            if then.get(key, here[key]) != here[key]
        }
        held_out = other.pop(HELD_OUT, None)  # which decide no weights
        if difference := changed_rewards(self.path, self._rewards or {}) or next(iter(other.values()), None):
            last = last_commit(self.path)
            branch = f"in a branch: grpo-kit replay {self.path} --iteration {last} --branch"
            advice = f"Put back what it was, or go on {branch if last else 'in a new folder'}"
            raise RunError(f"run folder {self.path}: {difference}. {advice}")
        moved = [key for key in here if then.get(key) == here[key]]  # the same, wherever it is
        if difference := first_difference(load_config(self.path).to_dict(), self.decisive(config), moved):
            advice = "continue with the run's own config, or choose a new folder"
            raise RunError(f"run folder {self.path}: {difference}; {advice}")
        return held_out

    def decisive(self, config: Config) -> dict[str, dict]:
        """A config's settings, without the names of rewards of the user's own, whose code is compared instead."""
        settings = config.to_dict()
        if is_own(self._rewards or {}) or is_own(recorded_rewards(self.path)):
            for name in ("weights", "monitors", "options"):
                del settings["reward_settings"][name]
        return settings

    def hold(self, stack: contextlib.ExitStack) -> None:
        """Be the folder's only writer until the stack is closed, or raise a `RunError`; write the config, open the log.

        The callback that undoes a step is on the stack before the step is made: wherever an interrupt comes, the folder
        is free once the stack is closed, even where a notebook keeps the error with all its frames.
        """
        self._lock(stack)
        held_out = None
        with self.file_errors(""):
            if self._config is not None:
                held_out = self._require_same(self._config)  # another process may have written it since
                self.write_config(self._config)
            self._tidy()
            log_into(self.path / "training.log", stack)
            if held_out:
                logger.warning("%s; best/ is chosen among the validations with the same prompts", held_out)

    def write_config(self, config: Config) -> None:
        """Write the settings; versions and machine, which decide on the last bits; digests of what lies in files."""
        made_by = {"versions": library_versions(), "machine": computing_machine(config.model_settings)}
        made_by |= {"contents": self.contents} if self.contents else {}
        made_by |= {} if self._rewards is None else {"rewards": dict(self._rewards)}
        self.write_json("config.json", config.to_dict() | made_by)

    def require_free(self) -> None:
        """Before much is loaded: a `RunError` where another process writes into the folder, or nobody can."""
        if self.path.is_dir():
            with contextlib.ExitStack() as stack:
                self._lock(stack)

    def _lock(self, stack: contextlib.ExitStack) -> None:
        lock = FileLock(self.path / ".lock", timeout=0)
        stack.callback(lock.release, force=True)
        try:
            with self.file_errors(".lock"):
                lock.acquire()
        except Timeout as error:
            advice = "wait for it, or choose a new folder"
            raise RunError(f"run folder {self.path}: another process writes into it; {advice}") from error

    def _tidy(self) -> None:
        """Remove what a crash left half written; a `best/` that was about to be replaced is the best again."""
        for folder in (self.path, self.checkpoints, self.path / "rollouts"):
            for left in folder.glob(".writing-*"):
                remove(left)
        replaced = self.path / _REPLACED
        if replaced.exists() and not self.best.exists():
            replace(replaced, self.best)
        remove(replaced)

    @contextlib.contextmanager
    def file_errors(self, name: str) -> Iterator[None]:
        """Make a `RunError` of whatever the disk refuses a library: which file (or ""), why, and what to do."""
        try:
            yield
        except (KitError, Timeout):
            raise
        except Exception as error:
            # a library in Rust leaves the system's number in its text alone
            in_text = re.search(r"\(os error (\d+)\)", str(error))
            number = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
            if number is None:
                raise
            mend = "make room" if number in _FULL else "allow writing into it" if number in _FORBIDDEN else "mend that"
            advice = f"{mend}, then give the same command again: it goes on from there"
            if number not in _FULL and last_commit(self.path) is None:
                advice = "choose a folder that can be written to"
            what = f"run folder {self.path}: {name and name + ': '}{os.strerror(number)}"
            raise RunError(f"{what} ({commit_status(self.path)}); {advice}") from error

    def commit(self, save: Callable[[], object]) -> None:
        """Flush what was written since the last commit, and only then `save` the checkpoint that counts on it."""
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

    def append_metrics(self, metrics: Mapping[str, float]) -> None:
        """One line a finished iteration."""
        line = json.dumps(without_nan(metrics), allow_nan=False) + "\n"
        self._unflushed.add(self.metrics_file)
        with self.file_errors("metrics.jsonl"), self.metrics_file.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line)

    def metrics(self) -> list[dict[str, float]]:
        """All lines so far; a last one without its end is still being written, or was cut by a crash: left out."""
        return read_metrics(self.path)

    def validations(self) -> list[dict]:
        """All validations so far, in order."""
        return read_validations(self.path)

    def forget_after(self, iteration: int) -> None:
        """Drop what was logged after the last committed iteration, which is computed again; warn of missing lines."""
        with self.file_errors("metrics.jsonl"):
            allowed, lines = range(iteration + 1), metrics_lines(self.path)
            kept = {number: line + b"\n" for line in lines if (number := _iteration(line)) in allowed}
            if self.metrics_file.is_file():
                replace_file(self.metrics_file, b"".join(kept.values()))
        missing = [number for number in range(1, iteration + 1) if number not in kept]
        if missing:
            logger.warning("metrics.jsonl: lines of %d committed iterations are missing or damaged", len(missing))
        with self.file_errors("files of uncommitted iterations"):
            for place in files_of_iterations(self.path):
                if iteration_of(place) > iteration:
                    place.unlink()
                    self._unflushed.add(place.parent)

    def write_json(self, name: str, data: dict) -> Path:
        """Write a JSON file whole or not at all."""
        return self._replace(name, json_bytes(data))

    def _replace(self, name: str, content: bytes) -> Path:
        place = self._inside(name)
        with self.file_errors(name):
            replace_file(place, content)
        self._unflushed.add(place.parent)
        return place

    def save_thumbnail(self, image: Medium | None, name: str) -> str | None:
        """Save a small JPEG, and beside it what is no picture; returns its path in the run, None where it is None."""
        if image is None:
            return None
        from grpo_kit.config.media import kind_of, save_medium, small, thumbnail

        place, kept = self._inside(f"thumbnails/{name}.jpg"), small(image)
        with self.file_errors(f"thumbnails/{name}.jpg"):
            place.parent.mkdir(parents=True, exist_ok=True)
            thumbnail(kept).save(place, "JPEG", quality=92, subsampling=0)
            if kind_of(kept) != "image":
                self._unflushed.add(save_medium(kept, place.with_suffix("")))
        self._unflushed |= {place, place.parent}
        return place.relative_to(self.path).as_posix()

    def save_table(self, name: str, table: pd.DataFrame) -> Path:
        """Write a parquet file whole or not at all."""
        content = io.BytesIO()
        table.to_parquet(content, index=False)
        return self._replace(name, content.getvalue())

    def save_best(self, save_pretrained: Callable[[Path], object]) -> None:
        """Replace `best/` by what `save_pretrained(folder)` writes, whole; a crash between leaves the old one."""
        aside, replaced = self.path / ".writing-best", self.path / _REPLACED
        with self.file_errors("best"):
            remove(aside)
            save_pretrained(aside)
            flush_tree(aside)
            if self.best.exists():
                replace(self.best, replaced)
            replace(aside, self.best)
            remove(replaced)


def commit_status(run_dir: Path) -> str:
    """What of a run is committed, as a part of an error: `iteration 12 is committed`."""
    last = last_commit(run_dir)
    return "nothing is committed yet" if last is None else f"iteration {last} is committed"


def last_commit(run_dir: Path) -> int | None:
    """The newest iteration that has a checkpoint; None where there is none, or the folder cannot be read."""
    with contextlib.suppress(OSError):
        return max(checkpoints_of(run_dir / "checkpoints"), default=None)
    return None


def _iteration(line: bytes) -> int | None:
    """The iteration that a line of metrics is about; None where it says none."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return None


def decisive_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Those of a config's `to_dict()` that decide what a run computes, section.key → value."""
    training = settings.get("training_settings", {})
    may_differ = {"save_minutes", "keep_checkpoints", "stop_on_divergence"}
    schedule = training.get("lr_scheduler_type", "constant")
    if schedule in ("constant", "constant_with_warmup", "inverse_sqrt") and not training.get("warmup_ratio"):
        may_differ.add("num_iterations")  # no learning rate depends on it
    return {
        f"{section}.{key}": value
        for section, values in settings.items()
        if section.endswith("_settings") and section not in ("evaluation_settings", "tracking_settings")
        for key, value in values.items()
        if section != "training_settings" or key not in may_differ
    }


def first_difference(old: dict, new: dict, except_for: Collection[str] = ()) -> str | None:
    """The first setting, if any, in which two configs differ so that one cannot continue the other."""
    there = decisive_settings(old)
    for name, value in decisive_settings(new).items():
        if there.get(name) != value and name not in except_for:
            because = ", on which its learning rates depend" if name == "training_settings.num_iterations" else ""
            return f"{name}: found {there.get(name)!r} in the run{because}, {value!r} in the config"
    return None
