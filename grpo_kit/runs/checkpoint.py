"""Checkpoints that are either whole or not there: written aside, hashed, flushed, then renamed into place."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grpo_kit.config import KitError

logger = logging.getLogger(__name__)
_POLICY, _OPTIMIZER, _MANIFEST = "policy.safetensors", "optimizer.safetensors", "manifest.json"
_REWARDS = "rewards.safetensors"  # written only where rewards have state


class CheckpointError(KitError):
    """A checkpoint that cannot be written or trusted."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed iteration: the trained tensors, the optimizer's state, and the rewards' where they have any."""

    iteration: int
    policy: dict[str, torch.Tensor]
    optimizer: dict[str, object]
    rewards: dict[str, torch.Tensor] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)  # of the run that wrote it, name → value


def save_checkpoint(
    folder: Path,
    iteration: int,
    policy: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    keep: int = 2,
    rewards: Mapping[str, torch.Tensor] | None = None,
    settings: Mapping[str, object] | None = None,
) -> Path:
    """Commit an iteration to `folder/iter_NNNNNN` and drop all but the newest `keep`.

    Args:
        rewards: their state, where they have any.
        settings: what a run must have in common with the one that wrote this, name → value.
    """
    place = folder / f"iter_{iteration:06d}"
    aside = folder / f".writing-{place.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors, optimizer_settings = _flatten(optimizer.state_dict())
    contents = {_POLICY: policy, _OPTIMIZER: tensors} | ({_REWARDS: rewards} if rewards else {})
    for name, content in contents.items():
        save_file({key: value.detach().cpu().contiguous() for key, value in content.items()}, aside / name)
    files = {name: {"bytes": (aside / name).stat().st_size, "sha256": sha256(aside / name)} for name in contents}
    manifest = {
        "iteration": iteration,
        "files": files,
        "optimizer": optimizer_settings,
        "settings": dict(settings or {}),
    }
    manifest["sha256"] = _digest(manifest)
    (aside / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for file in (*aside.iterdir(), aside):
        _flush(file)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(aside, place)
    _flush(folder)
    for old in _committed(folder)[:-keep]:
        shutil.rmtree(old)
    return place


def load_latest(folder: Path, settings: Mapping[str, object] | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies, None where none does; the log says what was skipped and why.

    Args:
        settings: the run's; a checkpoint that was written under others is another run's.
    """
    for place in reversed(_committed(folder)):
        try:
            checkpoint = load_checkpoint(place)
            _require_same_run(checkpoint, settings or {}, place.name)
            return checkpoint
        except CheckpointError as error:
            logger.warning("skipped: %s", error)
    return None


def _require_same_run(checkpoint: Checkpoint, settings: Mapping[str, object], name: str) -> None:
    """A setting that only one side has is none that differs: a newer kit may have added it."""
    for key, value in checkpoint.settings.items():
        if key in settings and settings[key] != value:
            raise CheckpointError(f"checkpoint {name}: another run's ({key}: {value!r}, here {settings[key]!r})")


def load_checkpoint(place: Path) -> Checkpoint:
    """Read one checkpoint after comparing every file with its manifest.

    Raises:
        CheckpointError: a file is missing, or differs from what was written.
    """
    try:
        manifest = json.loads((place / _MANIFEST).read_text())
        if manifest.pop("sha256") != _digest(manifest):
            raise CheckpointError(f"checkpoint {place.name}: {_MANIFEST} is damaged (its sha256 is not its own)")
        for name, written in manifest["files"].items():
            file = place / name
            if file.stat().st_size != written["bytes"] or sha256(file) != written["sha256"]:
                raise CheckpointError(f"checkpoint {place.name}: {name} is damaged (its sha256 is not the manifest's)")
        if place.name != f"iter_{manifest['iteration']:06d}":
            raise CheckpointError(
                f"checkpoint {place.name}: holds iteration {manifest['iteration']}; it was moved or swapped"
            )
        optimizer = _unflatten(load_file(place / _OPTIMIZER), manifest["optimizer"])
        rewards = load_file(place / _REWARDS) if _REWARDS in manifest["files"] else {}
        policy, settings = load_file(place / _POLICY), dict(manifest.get("settings", {}))
        return Checkpoint(manifest["iteration"], policy, optimizer, rewards, settings)
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


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _committed(folder: Path) -> list[Path]:
    return sorted(folder.glob("iter_*"))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flatten(state: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """An optimizer's state as named tensors, and the rest as plain JSON."""
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, {"param_groups": state["param_groups"]}


def _unflatten(tensors: dict[str, torch.Tensor], settings: dict) -> dict[str, object]:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": settings["param_groups"]}
