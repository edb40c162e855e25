"""How many images fit into memory at once, found by measuring what one and two of them take.

`accelerate.utils.find_executable_batch_size` waits for memory to run out: it cannot keep to a stated amount
(`image_memory_gb`), and on a CPU the system ends the process.
"""

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
_SHARE = 0.9  # of the free memory that is used; the measurement is not exact
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # Linux; see proc(5)


def largest_batch(measure: Callable[[int], int], free: int) -> int:
    """The most images, up to `MOST`, that should take no more than 90 % of the free bytes; `ModelError` if none fits.

    Args:
        measure: draws so many images and returns the bytes that this took. They grow linearly with the images.
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
    """Bytes that `work` took on a device, at its peak, beyond what was held before; `ModelError` if none can say."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise _no_figure(device.type)
    give_back_memory()
    try:
        _RESET.write_text("5")  # the process's peak becomes what it holds now
    except OSError as error:
        raise _no_figure(f"the CPU of this system ({sys.platform})") from error
    before = _peak_of_process()
    work()
    return _peak_of_process() - before


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on the CPU no more than a container's limit leaves."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        raise _no_figure(device.type)
    return min(psutil.virtual_memory().available, _container_headroom(Path("/sys/fs/cgroup")))


def _no_figure(device: str) -> ModelError:
    return ModelError(
        f"generation_settings.image_batch_size: found 'auto', but {device} does not say what a call took; set a number"
    )


def _container_headroom(group: Path) -> int:
    """Bytes that the limit of a container (cgroup v2) leaves; `sys.maxsize` without a limit."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return sys.maxsize
    return sys.maxsize if limit == "max" else max(int(limit) - int(used), 0)


def _peak_of_process() -> int:
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)[1])
