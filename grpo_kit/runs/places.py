"""Where runs are: a new run's folder, and the folders that a path or a name in reports/ means."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from grpo_kit.config import KitError, working_folder
from grpo_kit.runs.grid import trial_folders
from grpo_kit.runs.surroundings import world_size


def dated_report(what: str) -> Path:
    """A path in reports/ that is named after what it is and the time."""
    return working_folder() / "reports" / f"{what}-{time.strftime('%Y%m%d-%H%M%S')}"


def new_run_folder(profile: str, run_dir: Path | None, name: str) -> Path:
    """The folder of a new run: the one asked for, or one in reports/, named as asked or after profile and time.

    A `KitError` where both are given, the name could lead out of reports/, or several processes have no common one.
    """
    if run_dir is not None and name:
        raise KitError("--run-dir and --name: both given. Give one of them")
    if run_dir is not None:
        return run_dir.expanduser().resolve()
    if not name and world_size() > 1:
        raise KitError("--run-dir: not given, but several processes have to agree on one. Give --run-dir or --name")
    if not name:
        return dated_report(profile)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise KitError(f"run name {name!r:.60}: allowed: up to 100 letters, digits, '.', '_', '-', the first no sign")
    if name.endswith(".") or re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        raise KitError(f"run name {name!r:.60}: Windows has no such folder. Choose another name")
    return working_folder() / "reports" / name


def existing_runs(texts: Sequence[str]) -> list[Path]:
    """The folders of runs, each given as for `existing_run`; of a grid, those of its trials."""
    found = []
    for text in texts:
        grids = map(trial_folders, _folders(text))
        found += next(filter(None, grids), None) or [existing_run(text)]
    return found


def existing_run(text: str) -> Path:
    """The folder of a run given by path or by its name in reports/; else a `KitError` that names the newest there."""
    for folder in _folders(text):
        if any((folder / f"{name}.json").is_file() for name in ("config", "final_results", "adapter_config")):
            return folder
    runs = sorted(path.parent.name for path in (working_folder() / "reports").glob("*/config.json"))
    known = ", ".join(runs[-5:]) or "none yet. Make one: grpo-kit run"
    raise KitError(f"run {text!r:.100}: no run folder (one with a config.json); runs in reports/: {known}")


def _folders(text: str) -> list[Path]:
    """The folders that a path, or a name below reports/, can mean."""
    reports = (working_folder() / "reports").resolve()
    try:
        below = (reports / text).resolve()
        places = [Path(text).expanduser().resolve(), *([below] if below.is_relative_to(reports) else [])]
        return [place for place in places if place.is_dir()]
    except (OSError, ValueError, RuntimeError):  # too long, a NUL inside, no such user's home
        return []
