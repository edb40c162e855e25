"""What a run writes down of its rewards, and whether those that would go on with it are the same.

config.json has them under `rewards`: name → weight, and where it comes from. One that the config names has that name as
`reward`; the user's own code its `function`, `file` and `sha256`, and named code `files`, all that it imports from its
folder. Code counts, not its place: a function that was passed from Python may be named in the config later.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_kit.config import KitError
from grpo_kit.runs.record import read_json

Entries = Mapping[str, Mapping[str, Any]]  # as `Rewards.record` gives them


def recorded_rewards(run_dir: Path) -> Entries:
    """A run's rewards; none where an older version of the kit wrote it, or nothing is written yet."""
    return read_json(run_dir / "config.json").get("rewards") or {}


def is_own(rewards: Entries) -> bool:
    """Whether any of them is code of the user's own, or was passed from Python."""
    return any("function" in entry for entry in rewards.values())


def changed_rewards(run_dir: Path, here: Entries) -> str | None:
    """Which reward's code has changed since a run was made, in words; a `KitError` where the rewards are others."""
    there = recorded_rewards(run_dir)
    same = there.keys() == here.keys() and all(map(_agree, there.values(), (here[name] for name in there)))
    if there and here and not same and (is_own(there) or is_own(here)):
        advice = "go on with the run's own config"
        if passed := [entry for entry in there.values() if "reward" not in entry]:
            place = f"{passed[0].get('file', 'path/to/file.py')}:{passed[0]['function'].rpartition('.')[2]}"
            advice = f"pass them again (kit.with_rewards), or name them in reward_settings.weights, such as {place}"
        raise KitError(f"run {run_dir}: its rewards are {in_words(there)}; found {in_words(here)}; {advice}")
    for name in there.keys() & here.keys():
        then, now = there[name], here[name]
        both = {"sha256", "files"} & then.keys() & now.keys()
        files = set(now.get("files", {}).items() if "files" in both else ())
        changed = sorted(file for file, digest in files if digest not in then["files"].values())
        if changed or ("sha256" in both and then["sha256"] != now["sha256"]):
            what = ", ".join(changed) or f"{now['function']} of {Path(now.get('file', 'the notebook')).name}"
            return f"reward {name!r}: its code has changed since the run was made ({what})"
    return None


def in_words(rewards: Entries) -> str:
    """Rewards as people read them: `1 · redness (my_rewards.py:redness), watched: gold`."""
    return rewarded(rewards) + (f", watched: {watched(rewards)}" if watched(rewards) else "")


def rewarded(rewards: Entries) -> str:
    """Those with a weight, in words."""
    weighed = {name: entry for name, entry in rewards.items() if entry["weight"] is not None}
    return ", ".join(f"{entry['weight']:g} · {_called(name, entry)}" for name, entry in weighed.items())


def watched(rewards: Entries) -> str:
    """Those without a weight, the monitors, in words."""
    return ", ".join(_called(name, entry) for name, entry in rewards.items() if entry["weight"] is None)


def _called(name: str, entry: Mapping[str, Any]) -> str:
    if "reward" in entry:
        place = Path(entry["reward"]).name
        return name if place == name else f"{name} ({place})"
    home = f" of {Path(entry['file']).name}" if "file" in entry else ""
    return f"{name} (the function {entry['function']}{home}, passed from Python)"


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two are the same reward with the same weight, be its code changed or not."""
    both = one.keys() & other.keys() & {"options", "combine", "shaping", "weight"}
    names = [entry["function"].rpartition(".")[2] if "function" in entry else entry["reward"] for entry in (one, other)]
    return names[0] == names[1] and all(one[key] == other[key] for key in both)
