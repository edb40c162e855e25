"""A new run that has another one's history up to an iteration, and goes on from there with other settings."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from grpo_kit.config import Config, KitError, load_config
from grpo_kit.config.prompts import load_prompts
from grpo_kit.experiment import Experiment
from grpo_kit.rewards.loading import check_reward_settings
from grpo_kit.runs.durable import flush, flush_tree
from grpo_kit.runs.durable import replace as replace_folder
from grpo_kit.runs.folder import RunError, RunFolder
from grpo_kit.runs.iterations import files_of_iterations, iteration_of
from grpo_kit.runs.record import BRANCH_FILE, Origin, metrics_lines
from grpo_kit.training.loop import best_iteration, commit, make_optimizer
from grpo_kit.training.restore import own_experiment, require_iteration, restore_after

logger = logging.getLogger(__name__)
# what the weights and the optimizer's state at the branch's start belong to
FIXED = tuple(f"model_settings.{name}" for name in ("vlm_model", "policy_adapter", "lora", "base_8bit", "dtype"))


def branch(
    run_dir: Path | str,
    iteration: int,
    new_dir: Path | str,
    changes: Mapping[str, object] | None = None,
    *,
    kit: Experiment | None = None,
    progress: bool = True,
) -> Origin:
    """Make a new run folder that goes on from an iteration of a run, with some settings changed from there on.

    It has the run's metrics, validations, rollouts and pictures up to the iteration, and a checkpoint of it: the run's
    own, or one that is computed again from the newest before. `grpo-kit train --run-dir NEW` goes on from there; with
    nothing changed it ends where the run ends, bit for bit.

    Args:
        changes: dotted keys, as `load_config` takes them.
        kit: the run's own experiment, fresh from loading, for a run with rewards of your own. None loads it.

    Raises:
        KitError: no such iteration, a setting that cannot change, or a folder that is in use.
    """
    run, new = RunFolder(Path(run_dir)), Path(new_dir)
    require_iteration(run.path, iteration)
    old = load_config(run.path)
    config = load_config(old, changes)
    settings = changed_settings(old, config)
    _require_possible(old, config, settings, iteration)
    if new.exists() and (not new.is_dir() or any(new.iterdir())):
        raise RunError(f"run folder {new}: not empty, and a branch is a new run. Name another folder")
    kit = own_experiment(run.path, kit)
    optimizer = make_optimizer(kit, old)
    _, skipped, computed = restore_after(kit, optimizer, run.path, iteration, progress=progress)
    for reason in skipped:
        logger.warning("skipped: %s", reason)
    differs = next((one.difference for one in computed if not one.equal), None)
    best = best_iteration(kit, run)
    has_best = best is not None and best <= iteration and run.best.is_dir()
    origin = Origin(run.path.resolve().name, iteration, settings, has_best, differs)
    _write(_with_settings(kit, config, settings), optimizer, run, new, origin)
    return origin


def changed_settings(old: Config, new: Config) -> dict[str, list]:
    """Dotted key → [old value, new value] of each setting that differs; of a path outside the project its name."""
    before, after = old.to_dict(), new.to_dict()
    return {
        f"{section}.{key}": [_without_folder(before[section][key]), _without_folder(value)]
        for section, values in after.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if before[section][key] != value
    }


def _without_folder(value: object) -> object:
    """A value in which no text is a path of this machine."""
    if isinstance(value, dict):
        return {_without_folder(key): _without_folder(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folder(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _require_possible(old: Config, new: Config, settings: Mapping[str, list], iteration: int) -> None:
    """Refuse, before anything is loaded, settings with which the branch could not go on."""
    if fixed := [key for key in FIXED if key in settings]:
        then, now = settings[fixed[0]]
        raise KitError(
            f"{fixed[0]}: found {now!r:.100}, allowed in a branch: the run's own ({then!r:.100}), which its weights "
            "belong to. Leave it, or train a new run"
        )
    if (found := new.training_settings.num_iterations) <= iteration:
        raise KitError(
            f"training_settings.num_iterations: found {found}, allowed in a branch at iteration {iteration}: more than "
            "that. Set it with -o"
        )
    if old.reward_settings != new.reward_settings:
        check_reward_settings(new)
    for prompts in (new.training_settings.train_prompts, new.evaluation_settings.val_prompts):
        load_prompts(prompts)


def _with_settings(kit: Experiment, config: Config, settings: Mapping[str, list]) -> Experiment:
    """The experiment under the branch's settings; rewards that these no longer normalise lose their statistics."""
    before, after = (
        {name for name, shaping in one.reward_settings.shaping.items() if shaping.normalize == "running"}
        for one in (kit.config, config)
    )
    shaping = {name: kind for name, kind in kit.rewards.shaping.items() if name not in before - after}
    changed: dict[str, object] = {"config": config, "rewards": replace(kit.rewards, shaping=shaping)}
    if "training_settings.train_prompts" in settings:
        changed["train_prompts"] = load_prompts(config.training_settings.train_prompts)
    if "evaluation_settings.val_prompts" in settings:
        changed["val_prompts"] = load_prompts(config.evaluation_settings.val_prompts)
    return replace(kit, **changed)


def _write(kit: Experiment, optimizer: torch.optim.Optimizer, run: RunFolder, new: Path, origin: Origin) -> None:
    """Write the branch aside and rename it into place, so that a half-made one is never trained on."""
    aside = new.with_name(f".writing-{new.name}")
    shutil.rmtree(aside, ignore_errors=True)
    # rewards that the branch changes are written down by its first iteration
    has_others = any(key.startswith("reward_settings.") for key in origin.settings)
    folder = RunFolder.open(aside, kit.config, kit.contents(), None if has_others else kit.rewards.record())
    folder.write_config(kit.config)
    folder.metrics_file.write_bytes(b"".join(line + b"\n" for line in metrics_lines(run.path)[: origin.iteration]))
    for place in files_of_iterations(run.path):
        if iteration_of(place) <= origin.iteration:
            copied = aside / place.relative_to(run.path)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(place, copied)
    if origin.best_from_parent:
        shutil.copytree(run.best, folder.best)
    commit(kit, _with_own_rates(kit, optimizer), folder, origin.iteration)
    folder.write_json(BRANCH_FILE, asdict(origin))
    flush_tree(aside)
    if new.is_dir():
        new.rmdir()
    replace_folder(aside, new)
    flush(new.parent)


def _with_own_rates(kit: Experiment, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer with the state of the old one and the new settings' learning rate and weight decay."""
    own = make_optimizer(kit, kit.config)
    own.load_state_dict({"state": optimizer.state_dict()["state"], "param_groups": own.state_dict()["param_groups"]})
    return own
