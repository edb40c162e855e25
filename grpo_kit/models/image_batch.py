"""How many images fit into memory at once, found by measuring one and two of them instead of by crashing."""

import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from grpo_kit.config.hardware import give_back_memory
from grpo_kit.config.hub import ModelError

MOST = 64  # images in one call; more would hardly be quicker
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # of Linux
_SHARE = 0.9  # of the free memory that is used: what comes next is never quite like what was measured


def largest_batch(measure: Callable[[int], int], free: int) -> int:
    """The most images, up to `MOST`, whose drawing should take no more than nine tenths of the free memory.

    Args:
        measure: draws so many images and says how many bytes that took beyond what was held before.
        free: bytes.

    Memory grows by the same amount with each image, so one and two of them say what more would take.

    Raises:
        ModelError: not even one image fits.
    """
    one, two = measure(1), measure(2)
    if one > free:
        raise ModelError(
            f"generation_settings.image_batch_size: found 'auto', but one image takes {one / 1e9:.2f} GB and "
            f"{free / 1e9:.2f} GB are free; lower height and width, set model_settings.vae_tiling, or free memory"
        )
    more = int(_SHARE * free - one) // max(two - one, 1)
    return max(1, min(1 + more, MOST))


def memory_of(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that `work` took on a device, at its peak, beyond what was held before.

    Raises:
        ModelError: on a device, or for the CPU on a system, that does not say.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    _require_cpu(device)
    return _resident_growth(work)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on the CPU no more than what the process's control group may still take."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch for later
        return torch.cuda.mem_get_info(device)[0] + idle
    _require_cpu(device)
    return min(psutil.virtual_memory().available, *_group_headroom(Path("/sys/fs/cgroup")))


def _require_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        raise _untold(device.type)


def _untold(who: str) -> ModelError:
    return ModelError(
        f"generation_settings.image_batch_size: found 'auto', but {who} does not say what a call took; set a number"
    )


def _group_headroom(group: Path) -> list[int]:
    """What a container (cgroup v2) may still take; nothing where there is no limit."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return [sys.maxsize]
    return [sys.maxsize] if limit == "max" else [max(int(limit) - int(used), 0)]


def _resident_growth(work: Callable[[], object]) -> int:
    """By how much the process grew during `work`, at its peak, as Linux keeps it."""
    give_back_memory()
    try:
        _RESET.write_text("5")  # the peak is now what it holds: proc(5)
    except OSError as error:
        raise _untold(f"the CPU of this system ({sys.platform})") from error
    before = _peak()
    work()
    return _peak() - before


def _peak() -> int:
    """Bytes of memory that this process held at most since its peak was reset."""
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)[1])
