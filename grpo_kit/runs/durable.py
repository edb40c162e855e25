"""Files that outlive a power cut: flushed to the disk before anything says that they are there."""

import json
import math
import os
import shutil
from pathlib import Path


def flush(path: Path) -> None:
    """Let the disk have a file's content, or a folder's entries, before going on (fsync).

    Raises:
        OSError: the disk does not take it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush every file of a folder, and every folder in it after what it holds."""
    for path in sorted(folder.rglob("*"), reverse=True):
        flush(path)
    flush(folder)


def replace_file(place: Path, content: bytes) -> None:
    """Write a file aside, flush it, and rename it into place: there is the old content or the new one, never a part."""
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f".writing-{place.name}")
    aside.write_bytes(content)
    flush(aside)
    os.replace(aside, place)


def remove(place: Path) -> None:
    """Remove a file, or a folder with all that is in it, where there is one."""
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)


def json_bytes(data: object) -> bytes:
    """`data` as JSON in UTF-8 with a line end; null for every number that JSON does not have."""
    return (json.dumps(without_nan(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def without_nan(data: object) -> object:
    """The same with None in place of every number that is not finite."""
    if isinstance(data, dict):
        return {key: without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
