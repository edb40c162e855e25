"""A run's log: the kit's messages go into a file, and its warnings onto the screen too, each on one line."""

import contextlib
import logging
import sys
from pathlib import Path

from grpo_kit.config import printable


class OneLineFormatter(logging.Formatter):
    """A record is one line that a terminal only shows: line ends and escape codes in its text are written out."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record's text without its traceback."""
        return printable(super().formatMessage(record))


class LogFile(logging.FileHandler):
    """A line which the disk refuses is missing in the file: the screen says so once, and the run goes on."""

    reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once on the screen what the disk refuses; any other error as logging does."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.reported:
            self.reported = True
            print(f"{self.baseFilename}: {error.strerror}; lines are missing in it", file=sys.stderr)

    def close(self) -> None:
        """Close the file, also where the disk does not take its last lines."""
        with contextlib.suppress(OSError):  # reported above: what could not be written cannot be flushed either
            super().close()


def log_from(level: str, stack: contextlib.ExitStack) -> None:
    """Let the kit's messages be logged from a level on, until the stack is closed."""
    root = logging.getLogger("grpo_kit")
    stack.callback(root.setLevel, root.level)
    root.setLevel(level)


def log_into(place: Path, stack: contextlib.ExitStack) -> None:
    """Write the kit's messages into a file, and its warnings onto the screen, until the stack is closed."""
    file, screen = LogFile(place, encoding="utf-8"), logging.StreamHandler()
    stack.callback(file.close)
    file.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(message)s"))
    screen.setFormatter(OneLineFormatter("%(message)s"))
    screen.setLevel(logging.WARNING)
    root = logging.getLogger("grpo_kit")
    for handler in (file, screen):
        stack.callback(root.removeHandler, handler)
        root.addHandler(handler)
    stack.callback(setattr, root, "propagate", root.propagate)
    root.propagate = False  # other libraries' handlers would print every line a second time
