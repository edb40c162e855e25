"""What the disk refuses, in one line: which file, why, what of the run is committed, and what to do."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout

from grpo_kit.config import KitError
from grpo_kit.runs.iterations import checkpoints_of

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class RunError(KitError):
    """A run folder that cannot be used."""


@contextlib.contextmanager
def disk_errors(run_dir: Path, name: str) -> Iterator[None]:
    """Make one clear line of whatever the disk refuses, from the library that raised it.

    Args:
        name: of the file in the run that is written; "" for the folder itself.

    Raises:
        RunError: which file, why, what is committed, and what to do.
    """
    try:
        yield
    except KitError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number is None or isinstance(error, Timeout):
            raise
        what = f"run folder {run_dir}: {name and name + ': '}{os.strerror(number)}"
        raise RunError(f"{what} ({commit_status(run_dir)}); {_advice(run_dir, number)}") from error


def commit_status(run_dir: Path) -> str:
    """What of a run is committed, as a part of an error: `iteration 12 is committed`."""
    last = last_commit(run_dir)
    return "nothing is committed yet" if last is None else f"iteration {last} is committed"


def last_commit(run_dir: Path) -> int | None:
    """The newest iteration that has a checkpoint; None where there is none, or the folder cannot be read."""
    with contextlib.suppress(OSError):
        return max(checkpoints_of(run_dir / "checkpoints"), default=None)
    return None


def _error_number(error: BaseException) -> int | None:
    """The operating system's number of an error, also where a library in Rust has only left it in the text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _advice(run_dir: Path, number: int) -> str:
    if number not in _FULL and last_commit(run_dir) is None:
        return "choose a folder that can be written to"
    mend = "make room" if number in _FULL else "allow writing into it" if number in _FORBIDDEN else "mend that"
    return f"{mend}, then give the same command again: it goes on from there"
