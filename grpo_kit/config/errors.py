"""Errors that a user can mend, and the pieces of which their one line is made."""

import difflib
import json
from collections.abc import Iterable


class KitError(ValueError):
    """A mistake that the user can mend; its text is one line: what, the value found, what is allowed, what to do."""


class ConfigError(KitError):
    """A setting, or a file that a setting names, that is unknown, missing, broken or impossible on this machine."""


def one_line(error: object, limit: int = 200) -> str:
    """An error's text (or any other) on one line of at most `limit` characters; its type where it has no text."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """`, did you mean X?` for the known name that is most like a misspelt one; "" where none is."""
    close = difflib.get_close_matches(name[:100], list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def shown(value: object) -> str:
    """A value as an error shows it: on one line, in 60 characters at most."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")


def printable(text: str) -> str:
    """`text` as one line that a terminal only shows: line ends and escape codes are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
