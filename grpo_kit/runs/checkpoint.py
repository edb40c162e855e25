"""Checkpoints that are either whole or not there: written aside, hashed, flushed, then renamed into place."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grpo_kit.config import KitError
from grpo_kit.runs.durable import flush, flush_tree, is_in_use, remove, replace
from grpo_kit.runs.iterations import checkpoints_of, iteration_name

logger = logging.getLogger(__name__)
POLICY = "policy"  # a folder as transformers (or peft) loads it
_OPTIMIZER, _MANIFEST = "optimizer.safetensors", "manifest.json"
_REWARDS = "rewards.safetensors"  # written only where rewards have state


class CheckpointError(KitError):
    """A checkpoint that cannot be written or trusted."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed iteration that verified: the folder with the policy, the optimizer's state, and the rewards'."""

    iteration: int
    policy: Path
    optimizer: dict[str, object]
    rewards: dict[str, torch.Tensor] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)  # the decisive ones, section.key → value


def save_checkpoint(
    folder: Path,
    iteration: int,
    save_policy: Callable[[Path], object],
    optimizer: Mapping[str, object],
    keep: int = 2,
    *,
    rewards: Mapping[str, torch.Tensor] | None = None,
    settings: Mapping[str, object] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Commit an iteration to `folder/iter_NNNNNN` and drop all but the newest `keep` that verify.

    Args:
        save_policy: writes the policy into the folder that it is given, as `Policy.save_pretrained` does.
        optimizer: its state dict, with states by index or by parameter name.
        rewards: their state dict.
        settings: the decisive ones, section.key → value, which a run that goes on from here must share.
        versions: of the libraries, as a record.
    """
    place = folder / iteration_name(iteration)
    aside = folder / f".writing-{place.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_policy(aside / POLICY)
    tensors, optimizer_settings = _flatten(optimizer)
    for name, content in ({_OPTIMIZER: tensors} | ({_REWARDS: rewards} if rewards else {})).items():
        save_file({key: value.detach().cpu().contiguous() for key, value in content.items()}, aside / name)
    manifest = {
        "iteration": iteration,
        "files": _listed(aside),
        "optimizer": optimizer_settings,
        "settings": dict(settings or {}),
        "versions": dict(versions or {}),
    }
    manifest["sha256"] = _digest(manifest)
    (aside / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    flush_tree(aside)
    if place.exists():
        _drop(place)  # it was found damaged, and is computed again
    replace(aside, place)
    flush(folder)
    keep_newest(folder, keep, iteration)
    return place


def keep_newest(folder: Path, keep: int, iteration: int) -> None:
    """Drop what is older than the newest `keep` sound checkpoints up to an iteration; a damaged one does not count.

    A later one does not count either: it was found damaged, or will be.
    """
    sound = 0
    for number, place in reversed(checkpoints_of(folder).items()):
        if number > iteration:
            continue
        if sound >= keep:
            try:
                _drop(place)
            except PermissionError as error:
                if not is_in_use(error):
                    raise
                logger.warning("checkpoint %s: another program has it open; it is left", place.name)
        else:
            sound += _verifies(place)


def _drop(place: Path) -> None:
    """Remove a checkpoint; it is renamed first: one of which a part is gone never looks committed."""
    aside = place.with_name(f".writing-dropped-{place.name}")
    shutil.rmtree(aside, ignore_errors=True)
    replace(place, aside)
    remove(aside)


def newest_checkpoint(
    folder: Path, up_to: int | None = None, settings: Mapping[str, object] | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, None where there is none; and why newer ones were skipped.

    Args:
        up_to: the last iteration that counts; None is the last that there is.
        settings: the run's; a checkpoint that was written under others is another run's.
    """
    skipped: list[str] = []
    for number, place in reversed(checkpoints_of(folder).items()):
        if up_to is not None and number > up_to:
            continue
        try:
            checkpoint = load_checkpoint(place)
            _require_same_run(checkpoint, settings or {}, place.name)
            return checkpoint, skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def load_latest(folder: Path, settings: Mapping[str, object] | None = None) -> Checkpoint | None:
    """As `newest_checkpoint`; the log says what was skipped and why.

    Raises:
        CheckpointError: there are checkpoints, and none verifies: starting afresh would write over the run.
    """
    checkpoint, skipped = newest_checkpoint(folder, settings=settings)
    for reason in skipped:
        logger.warning("skipped: %s", reason)
    if checkpoint is None and skipped:
        raise CheckpointError(
            f"{skipped[0]}; none of {len(skipped)} verifies. Restore one from a copy, or choose a new folder"
        )
    return checkpoint


def _require_same_run(checkpoint: Checkpoint, settings: Mapping[str, object], name: str) -> None:
    """Compare the settings that both have: one that only one side has was added by a newer kit."""
    for key, value in checkpoint.settings.items():
        if key in settings and settings[key] != value:
            raise CheckpointError(f"checkpoint {name}: another run's ({key}: {value!r}, here {settings[key]!r})")


def load_checkpoint(place: Path) -> Checkpoint:
    """Read one checkpoint after comparing every file with its manifest.

    Raises:
        CheckpointError: a file is missing, or differs from what was written.
    """
    try:
        manifest = _verified(place)
        optimizer = _unflatten(load_file(place / _OPTIMIZER), manifest["optimizer"])
        rewards = load_file(place / _REWARDS) if _REWARDS in manifest["files"] else {}
        return Checkpoint(manifest["iteration"], place / POLICY, optimizer, rewards, dict(manifest.get("settings", {})))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"checkpoint {place.name}: incomplete or damaged ({type(error).__name__}: {error})"
        ) from error


def sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _verified(place: Path) -> dict[str, object]:
    """A checkpoint's manifest, after every file that it lists was compared with it."""
    manifest = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
    if manifest.pop("sha256") != _digest(manifest):
        raise CheckpointError(f"checkpoint {place.name}: {_MANIFEST} is damaged (its sha256 is not its own)")
    for name, written in manifest["files"].items():
        file = place / name
        if file.stat().st_size != written["bytes"] or sha256(file) != written["sha256"]:
            raise CheckpointError(f"checkpoint {place.name}: {name} is damaged (its sha256 is not the manifest's)")
    if place.name != iteration_name(manifest["iteration"]):
        raise CheckpointError(
            f"checkpoint {place.name}: holds iteration {manifest['iteration']}; it was moved or swapped"
        )
    if not (place / POLICY).is_dir():
        raise CheckpointError(
            f"checkpoint {place.name}: has no {POLICY}/ folder; go on with the version of the kit that wrote it"
        )
    return manifest


def _verifies(place: Path) -> bool:
    try:
        return bool(_verified(place))
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _listed(folder: Path) -> dict[str, dict[str, object]]:
    """Relative path → size and hash of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files
    }


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _flatten(state: Mapping) -> tuple[dict[str, torch.Tensor], dict]:
    """An optimizer's state as named tensors, and the rest as plain JSON."""
    tensors = {
        f"{owner}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for owner, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, {"param_groups": state["param_groups"]}


def _unflatten(tensors: dict[str, torch.Tensor], settings: dict) -> dict[str, object]:
    state: dict[int | str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        owner, name = key.rsplit(".", 1)
        state.setdefault(int(owner) if owner.isdigit() else owner, {})[name] = value
    return {"state": state, "param_groups": settings["param_groups"]}
