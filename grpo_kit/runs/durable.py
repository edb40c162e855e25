"""Files that outlive a power cut: flushed to the disk before anything says that they are there."""

import os
import re
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


def error_number(error: BaseException) -> int | None:
    """The operating system's number of an error, also where a library in Rust has only left it in the text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
