"""Say what runs on this machine: one finding a line, and for each problem what to do about it."""

import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from grpo_kit.config import Config, KitError, hardware, one_line
from grpo_kit.config.hub import how_to_restore
from grpo_kit.config.prompts import load_prompts
from grpo_kit.runs.checkpoint import sha256
from grpo_kit.runs.surroundings import world_size

WEIGHTS = ("*.safetensors", "*.bin")
NEEDED = "torch torchvision transformers diffusers peft open_clip_torch papermill ipykernel ipywidgets".split()


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; where it is not `ok`, `text` says what to do."""

    name: str
    ok: bool
    text: str

    def __str__(self) -> str:
        return f"{'OK     ' if self.ok else 'PROBLEM'}  {self.name:<13} {self.text}"


def check_machine(config: Config) -> Iterator[Finding]:
    """Look at everything that a run with `config` needs, from the quick things to the loading of the models."""
    models = config.model_settings
    yield Finding("python", True, f"{platform.python_version()}, {os.cpu_count()} CPU cores")
    yield _found("libraries", _libraries)
    yield _found("device", lambda: _device(config))
    files = [
        _found("policy", lambda: weights_text(models.vlm_model)),
        _found("generator", lambda: weights_text(models.sd_model)),
        _found("reward model", lambda: _reward_model(models.clip_model)),
    ]
    yield from files
    yield _found("train prompts", lambda: _prompts(config.training_settings.train_prompts))
    yield _found("val prompts", lambda: _prompts(config.evaluation_settings.val_prompts))
    if all(finding.ok for finding in files):
        yield _found("models load", lambda: _load(config))
    yield _found("kernel", _kernel)
    yield _found("wandb", lambda: _wandb(config.tracking_settings.wandb))


def _found(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, look())
    except KitError as problem:
        return Finding(name, False, str(problem))
    except Exception as problem:  # a check reports whatever goes wrong
        return Finding(name, False, f"{type(problem).__name__}: {one_line(problem, 300)}")


def _libraries() -> str:
    versions = hardware.library_versions()
    if missing := [name for name in NEEDED if name not in versions]:
        raise KitError(f"missing: {', '.join(missing)}. Install them: pip install {' '.join(missing)}")
    return ", ".join(f"{name} {versions[name]}" for name in NEEDED)


def _device(config: Config) -> str:
    world_size()  # of a launcher that is not there
    placed = hardware.placement(config.model_settings)
    device, why = placed["device"]
    dtype, reason = hardware.choose_dtype(device, config.model_settings.dtype)
    text = f"{device} ({why}), {str(dtype).removeprefix('torch.')} ({reason})"
    for part in ("generator", "reward"):
        other, why = placed[f"{part}_device"]
        text += "" if other == device else f"; {part} on {other} ({why})"
    return text


def weights_text(where: str) -> str:
    """What stands at a model's place: a folder whose weight files fit its card, or a hub id whose files are cached.

    A `KitError` where a file is missing or damaged, or the model is not on this machine.
    """
    folder = Path(where)
    if not folder.is_absolute():
        return _cached(where)
    restore = how_to_restore(folder).capitalize()
    if not folder.exists():
        raise KitError(f"{folder}: no such folder. {restore}")
    weights = [folder] if folder.is_file() else sorted(file for pattern in WEIGHTS for file in folder.rglob(pattern))
    card = folder / "card.json"
    sums = json.loads(card.read_text(encoding="utf-8")).get("sha256", {}) if card.exists() else {}
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise KitError(f"{path}: missing. {restore}")
        if (found := sha256(path)) != expected:
            raise KitError(f"{path}: damaged: sha256 {found[:12]}…, its card says {expected[:12]}…. {restore}")
    if not weights:
        raise KitError(f"{folder}: no weight file ({', '.join(WEIGHTS)}). {restore}")
    size = sum(file.stat().st_size for file in weights) / 1e6
    compared = f"{len(sums)} files match their card" if sums else "no card to compare with"
    return f"{where}: {size:.1f} MB of weights, {compared}"


def _reward_model(where: str) -> str:
    if Path(where).is_absolute() or (where.count("/") == 1 and not where.startswith("hf-hub:")):
        return weights_text(where)
    return f"{where}: open_clip keeps its weights in its own cache, and fetches them at first use"


def _cached(where: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(where, name), str) for name in ("model_index.json", "config.json")):
        return f"{where}: in the hub cache"
    needs = "needs network and, where it is gated, the licence accepted on its page and a login (hf auth login)"
    raise KitError(f"{where}: not on this machine. It is fetched at first use: {needs}; offline take --profile tiny")


def _prompts(path: str) -> str:
    prompts = load_prompts(path)
    return f"{path}: {len(prompts)} prompts, {len({prompt.category for prompt in prompts})} categories"


def _load(config: Config) -> str:
    from grpo_kit.experiment import load_experiment

    start = time.monotonic()
    load_experiment(config)
    return f"all of them, in {time.monotonic() - start:.1f} s"


def _kernel() -> str:
    from jupyter_client.kernelspec import KernelSpecManager

    manager, mend = KernelSpecManager(), f"{sys.executable} -m ipykernel install --sys-prefix"
    if "python3" not in manager.find_kernel_specs():
        raise KitError(f"no Jupyter kernel named python3. Install it: {mend}")
    found = manager.get_kernel_spec("python3")
    program, own = Path(found.argv[0] if found.argv else "nothing"), Path(sys.executable)
    is_own = (program.parent.resolve(), program.resolve()) == (own.parent.resolve(), own.resolve())
    if not is_own and not re.fullmatch(r"python[\d.]*(\.exe)?", str(program)):  # Jupyter puts its own in its place
        used = f"JupyterLab and VS Code would use it (grpo-kit run takes {sys.executable})"
        what = f"python3, in {found.resource_dir}, is {program}, not this Python"
        raise KitError(f"{what}: {used}. Choose another kernel there, or make it this one: {mend}")
    return f"python3 (ipykernel {importlib.metadata.version('ipykernel')}): this Python"


def _wandb(mode: str) -> str:
    if mode == "disabled":
        return "disabled: the run folder keeps everything"
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    if mode == "online" and not wandb.login(prompt=False, verify=False):  # looks for a key, contacts no server
        raise KitError("online, but no key here. Log in (wandb login), or set tracking_settings.wandb=offline")
    return f"{mode} (wandb {wandb.__version__})"
