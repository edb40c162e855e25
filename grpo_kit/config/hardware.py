"""The machine: device and dtype with the reason why, memory, and the versions that a run is recorded with."""

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from grpo_kit.config.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from grpo_kit.config.settings import ModelSettings

LIBRARIES = (
    "grpo_kit torch torchvision transformers diffusers accelerate peft open_clip_torch safetensors numpy scipy pandas "
    "pyarrow pillow matplotlib pydantic papermill ipykernel ipywidgets wandb trl"
).split()


def choose_device(device: str = "auto", setting: str = "device") -> tuple["torch.device", str]:
    """The device to compute on and the reason: the first of CUDA, MPS and CPU for "auto", else the one named.

    A CUDA device comes with its number: a thread has a current device of its own, which is not the caller's. One that
    this machine does not have is a `ConfigError` that names the `setting`.
    """
    import torch

    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ConfigError(f"{setting}: found {device!r:.60}, allowed: auto, cpu, mps, cuda, cuda:N")
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    asked = device != "auto"
    chosen = torch.device(device if asked else "cuda" if has_cuda else "mps" if has_mps else "cpu")
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if has_cuda else 0
        if (chosen.index or 0) >= count:
            raise ConfigError(f"{setting}: found {device}, but this machine has {count} CUDA devices. Set auto or cpu")
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        properties = torch.cuda.get_device_properties(index)
        found = f"{properties.name} with {properties.total_memory / 2**30:.0f} GiB found"
        return torch.device("cuda", index), f"asked for; {found}" if asked else found
    if chosen.type == "mps" and not has_mps:
        raise ConfigError(f"{setting}: found mps, but this machine has no Apple GPU. Set auto or cpu")
    found = "Apple GPU found" if has_mps else "no CUDA or Apple GPU found"
    return chosen, "asked for" if asked else found


def placement(settings: "ModelSettings") -> dict[str, tuple["torch.device", str]]:
    """Where the policy, the generator and the reward models compute: the setting's name → device and reason."""
    names = ("device", "generator_device", "reward_device")
    return {name: choose_device(getattr(settings, name) or settings.device, name) for name in names}


def choose_dtype(device: "torch.device | str", dtype: str = "auto") -> tuple["torch.dtype", str]:
    """The floating-point type to compute in on `device`, and the reason."""
    import torch

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in types:
        return types[dtype], "asked for"
    if dtype != "auto":
        raise ConfigError(f"dtype: found {dtype!r:.60}, allowed: auto, {', '.join(types)}")
    kind = torch.device(device).type
    if kind == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.bfloat16, "this GPU computes bfloat16 natively"
    if kind == "cpu" and torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "this CPU has AMX, which makes bfloat16 fast"
    return torch.float32, {
        "cuda": "this GPU has no native bfloat16, and float16 overflows in training",
        "cpu": "bfloat16 halves the speed of a CPU without AMX",
    }.get(kind, "bfloat16 is not complete on Apple GPUs")


def give_back_memory() -> None:
    """Hand freed memory back to the system: on Linux the heap keeps it, which hides what the next work takes."""
    functions = {  # of glibc, tcmalloc and jemalloc, whichever are loaded
        "malloc_trim": (0,),
        "MallocExtension_ReleaseFreeMemory": (),
        "mallctl": (b"arena.4096.purge", None, None, None, 0),  # jemalloc's number for all arenas
    }
    loaded = ctypes.CDLL(None) if sys.platform == "linux" else None
    for function, arguments in functions.items():
        if hasattr(loaded, function):
            getattr(loaded, function)(*arguments)


def release(*objects: object) -> None:
    """Give accelerator memory back at the end of a notebook.

    Models that `objects` are or hold move to the CPU, since a notebook's own history may still refer to them.
    """
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    if on_gpu:
        for model in _models(objects, depth=8):
            model.to("cpu")
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def _models(things: Iterable[object], depth: int) -> "Iterator[torch.nn.Module]":
    """The models among the things and what they hold, `depth` levels down: kit, rewards, parts, a reward, its CLIP."""
    import torch

    for thing in things:
        if isinstance(thing, torch.nn.Module):
            yield thing
        elif depth and not isinstance(thing, type):
            held = thing if isinstance(thing, Mapping) else getattr(thing, "__dict__", {})
            yield from _models(list(held.values()), depth - 1)


def computing_machine(settings: "ModelSettings") -> dict[str, str]:
    """What decides how sums are rounded besides the versions: the kinds of device, where they differ, and threads."""
    import torch

    kinds = {}
    for setting, (device, _) in placement(settings).items():
        kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else kind
        kinds[setting] = f"{device.type} {kind}".strip()
    kept = {setting: kind for setting, kind in kinds.items() if setting == "device" or kind != kinds["device"]}
    return {**kept, "threads": str(torch.get_num_threads())}


@functools.cache  # each is read from a file, and every checkpoint has them
def library_versions() -> dict[str, str]:
    """Python's version and those of the libraries that a result depends on; what is not installed is left out."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
