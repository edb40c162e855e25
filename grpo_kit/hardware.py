"""The machine: device and dtype with the reason why, seeds, memory, and the versions that a run is recorded with."""

import gc
import hashlib
import importlib.metadata
import platform
import random
import re
import resource
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from grpo_kit.config import KitError

if TYPE_CHECKING:
    import torch

LIBRARIES = (
    "grpo_kit torch torchvision transformers diffusers accelerate peft open_clip_torch safetensors numpy scipy pandas "
    "pyarrow pillow matplotlib pydantic papermill ipykernel ipywidgets wandb trl"
).split()


class HardwareError(KitError):
    """A device or dtype that this machine does not have."""


def choose_device(device: str = "auto") -> tuple["torch.device", str]:
    """The device to compute on and the reason: the first of CUDA, MPS and CPU for "auto", else the one named."""
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device()), _cuda_reason(torch.cuda.current_device())
        if torch.backends.mps.is_available():
            return torch.device("mps"), "Apple GPU found"
        return torch.device("cpu"), "no CUDA or Apple GPU found"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise HardwareError(f"device: found {device!r:.60}, allowed: auto, cpu, mps, cuda, cuda:N")
    chosen = torch.device(device)
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise HardwareError(f"device: found {device}, but this machine has {count} CUDA devices. Set auto or cpu")
        return chosen, f"asked for; {_cuda_reason(chosen.index or 0)}"
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise HardwareError("device: found mps, but this machine has no Apple GPU. Set auto or cpu")
    return chosen, "asked for"


def _cuda_reason(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name} with {properties.total_memory / 2**30:.0f} GiB found"


def choose_dtype(device: "torch.device | str", dtype: str = "auto") -> tuple["torch.dtype", str]:
    """The floating-point type to compute in on `device`, and the reason."""
    import torch

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in types:
        return types[dtype], "asked for"
    if dtype != "auto":
        raise HardwareError(f"dtype: found {dtype!r:.60}, allowed: auto, {', '.join(types)}")
    kind = torch.device(device).type
    if kind == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return torch.bfloat16, "this GPU computes bfloat16 natively"
        return torch.float32, "this GPU has no native bfloat16, and float16 overflows in training"
    if kind == "cpu" and torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "this CPU has AMX, which makes bfloat16 fast"
    if kind == "cpu":
        return torch.float32, "bfloat16 halves the speed of a CPU without AMX"
    return torch.float32, "bfloat16 is not complete on Apple GPUs"


def derive_seed(*parts: str | int) -> int:
    """A seed of 63 bits from the parts that name a random stream: (run seed, iteration, prompt, sample, purpose).

    Different parts give unrelated streams, the same parts give the same seed on every machine.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch, for code that draws from them."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def peak_memory_mb() -> float:
    """The most memory that this process held, in MB: on the CUDA device where one is in use, else on the host."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def release(*objects: object) -> None:
    """Give accelerator memory back at the end of a notebook.

    Models among `objects`, or held by them as attributes, move to the CPU, since a notebook's own history may still
    refer to them; then unused memory goes back to the device.
    """
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    if on_gpu:
        for thing in _held(objects, depth=2):
            if isinstance(thing, torch.nn.Module):
                thing.to("cpu")
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def _held(things: Iterable[object], depth: int) -> Iterator[object]:
    """The things and what they hold as attributes, `depth` levels down: a kit holds its policy, that its model."""
    for thing in things:
        yield thing
        if depth:
            yield from _held(list(getattr(thing, "__dict__", {}).values()), depth - 1)


def computing_machine(device: str = "auto") -> dict[str, str]:
    """What decides how sums are rounded besides the versions: the device that `device` means here, and the threads."""
    import torch

    chosen, _ = choose_device(device)
    kind = torch.backends.cpu.get_cpu_capability() if chosen.type == "cpu" else ""
    kind = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else kind
    return {"device": f"{chosen.type} {kind}".strip(), "threads": str(torch.get_num_threads())}


def library_versions() -> dict[str, str]:
    """Python's version and those of the libraries that a result depends on; what is not installed is left out."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
