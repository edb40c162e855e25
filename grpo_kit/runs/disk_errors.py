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
    except (KitError, Timeout):
        raise
    except Exception as error:
        # a library in Rust leaves the system's number in its text alone
        in_text = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
        if number is None:
            raise
        mend = "make room" if number in _FULL else "allow writing into it" if number in _FORBIDDEN else "mend that"
        advice = f"{mend}, then give the same command again: it goes on from there"
        if number not in _FULL and last_commit(run_dir) is None:
            advice = "choose a folder that can be written to"
        what = f"run folder {run_dir}: {name and name + ': '}{os.strerror(number)}"
        raise RunError(f"{what} ({commit_status(run_dir)}); {advice}") from error


def commit_status(run_dir: Path) -> str:
    """What of a run is committed, as a part of an error: `iteration 12 is committed`."""
    last = last_commit(run_dir)
    return "nothing is committed yet" if last is None else f"iteration {last} is committed"


def last_commit(run_dir: Path) -> int | None:
    """The newest iteration that has a checkpoint; None where there is none, or the folder cannot be read."""
    with contextlib.suppress(OSError):
        return max(checkpoints_of(run_dir / "checkpoints"), default=None)
    return None
