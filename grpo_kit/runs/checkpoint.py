"""Checkpoints that are either whole or not there: written aside, hashed, flushed, then renamed into place."""

import contextlib
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
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)  # what a damaged file leads to


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
        optimizer: its state dict, with states by index or by parameter name; `rewards` likewise.
        settings: the decisive ones, section.key → value, which a run that goes on from here must share.
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
        "files": {
            file.relative_to(aside).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(path for path in aside.rglob("*") if path.is_file())
        },
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
    keep_newest(folder, keep - 1, iteration - 1)  # beside this one, whose files were just hashed
    return place


def keep_newest(folder: Path, keep: int, iteration: int) -> None:
    """Drop what is older than the newest `keep` sound checkpoints up to an iteration; later ones were found damaged."""
    sound = 0
    for place in [place for number, place in reversed(checkpoints_of(folder).items()) if number <= iteration]:
        if sound >= keep:
            try:
                _drop(place)
            except PermissionError as error:
                if not is_in_use(error):
                    raise
                logger.warning("checkpoint %s: another program has it open; it is left", place.name)
        else:
            with contextlib.suppress(*_DAMAGE):
                _verified(place)
                sound += 1


def _drop(place: Path) -> None:
    """Remove a checkpoint; it is renamed first: one of which a part is gone never looks committed."""
    aside = place.with_name(f".writing-dropped-{place.name}")
    shutil.rmtree(aside, ignore_errors=True)
    replace(place, aside)
    remove(aside)


def newest_checkpoint(
    folder: Path, up_to: int | None = None, settings: Mapping[str, object] | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint up to an iteration that verifies and has the run's settings; why newer were skipped."""
    skipped: list[str] = []
    for number, place in reversed(checkpoints_of(folder).items()):
        if up_to is not None and number > up_to:
            continue
        try:
            checkpoint = load_checkpoint(place)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        own, found = settings or {}, checkpoint.settings  # one that only one side has was added by a newer kit
        if not (other := [key for key in found if own.get(key, found[key]) != found[key]]):
            return checkpoint, skipped
        values = f"{other[0]}: {found[other[0]]!r}, here {own[other[0]]!r}"
        skipped.append(f"checkpoint {place.name}: another run's ({values})")
    return None, skipped


def load_latest(folder: Path, settings: Mapping[str, object] | None = None) -> Checkpoint | None:
    """As `newest_checkpoint`, with a warning of each skipped one; a `CheckpointError` where none of them verifies."""
    checkpoint, skipped = newest_checkpoint(folder, settings=settings)
    for reason in skipped:
        logger.warning("skipped: %s", reason)
    if checkpoint is None and skipped:
        raise CheckpointError(f"{skipped[0]}; none of {len(skipped)} verifies. Restore a copy, or choose a new folder")
    return checkpoint


def load_checkpoint(place: Path) -> Checkpoint:
    """Read one checkpoint; a `CheckpointError` where a file is missing, or differs from what its manifest says."""
    try:
        manifest = _verified(place)
        optimizer = _unflatten(load_file(place / _OPTIMIZER), manifest["optimizer"])
        rewards = load_file(place / _REWARDS) if _REWARDS in manifest["files"] else {}
        return Checkpoint(manifest["iteration"], place / POLICY, optimizer, rewards, dict(manifest.get("settings", {})))
    except CheckpointError:
        raise
    except _DAMAGE as error:
        what = f"incomplete or damaged ({type(error).__name__}: {error})"
        raise CheckpointError(f"checkpoint {place.name}: {what}") from error


def sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _verified(place: Path) -> dict[str, object]:
    """A checkpoint's manifest, after every file that it lists was compared with it."""
    manifest, name = json.loads((place / _MANIFEST).read_text(encoding="utf-8")), f"checkpoint {place.name}"
    if manifest.pop("sha256") != _digest(manifest):
        raise CheckpointError(f"{name}: {_MANIFEST} is damaged (its sha256 is not its own)")
    for inside, written in manifest["files"].items():
        file = place / inside
        if file.stat().st_size != written["bytes"] or sha256(file) != written["sha256"]:
            raise CheckpointError(f"{name}: {inside} is damaged (its sha256 is not the manifest's)")
    if place.name != iteration_name(manifest["iteration"]):
        raise CheckpointError(f"{name}: holds iteration {manifest['iteration']}; it was moved or swapped")
    if not (place / POLICY).is_dir():
        raise CheckpointError(f"{name}: has no {POLICY}/ folder; go on with the version of the kit that wrote it")
    return manifest


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _flatten(state: Mapping) -> tuple[dict[str, torch.Tensor], dict]:
    """An optimizer's state as named tensors, and the rest as plain JSON."""
    tensors = {
        f"{owner}.{name}": torch.as_tensor(value)
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
