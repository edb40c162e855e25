"""Files that outlive a power cut: flushed to the disk before anything says that they are there."""

import errno
import json
import math
import os
import shutil
import time
from pathlib import Path

_FOR_FSYNC = os.O_RDWR if os.name == "nt" else os.O_RDONLY  # Windows flushes only what is open for writing
_NO_FOLDERS = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)  # of file systems that flush no folders, such as SMB


def flush(path: Path) -> None:
    """Let the disk have a file's content, or a folder's entries, before going on (fsync)."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else _FOR_FSYNC)
    except PermissionError:  # Windows opens no folder
        if is_folder:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in _NO_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def is_in_use(error: OSError) -> bool:
    """Whether Windows refused something because a program has the file open: a reader, a virus scanner, a mapping."""
    return getattr(error, "winerror", None) in (5, 32, 33)  # access denied, sharing violation, lock violation


def replace(source: Path, target: Path) -> None:
    """`os.replace`; on Windows again for two seconds where another program, a virus scanner, has one of them open."""
    for wait in (0.01, 0.03, 0.1, 0.3, 0.6, 1.0):
        try:
            return os.replace(source, target)
        except PermissionError as error:
            if not is_in_use(error):
                raise
        time.sleep(wait)
    return os.replace(source, target)


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
    replace(aside, place)


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
