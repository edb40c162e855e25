"""JSON as people write it into files: read strictly, and what is wrong said in one line with its place."""

import json
from pathlib import Path
from typing import Any

from grpo_kit.config.errors import ConfigError, printable, shown

_HINTS = {"'": ". Texts and keys stand in double quotes", "“": '. Write plain quotes: "'}
_HINTS |= dict.fromkeys(["{", "["], ". A record is one line, and one record a line")
_HINTS |= dict.fromkeys(["None", "True", "False"], ". JSON writes null, true, false")


def strict_json(content: bytes, path: Path, line: int | None = None) -> Any:
    """Read JSON in UTF-8 in which no key of an object stands twice.

    Args:
        path: the file, for the error.
        line: the number of the line that `content` is, where each line of the file is a value of its own.

    Raises:
        ConfigError: one line with the file, the line where it is known, and what is wrong.
    """
    where = str(path) if line is None else f"{path}:{line}"
    try:
        return json.loads(content.decode("utf-8").lstrip("\ufeff"), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        place, found = f"{path}:{line or error.lineno}", error.doc[error.pos : error.pos + 20].strip()
        hint = next((hint for start, hint in _HINTS.items() if found.startswith(start)), "")
        found = f", found {shown(found)}" if found else ""
        raise ConfigError(f"{place}: not JSON: {error.msg}{found} (column {error.colno}){hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text (byte {error.start}). Save the file as UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply, allowed: a few levels") from None
    except ValueError as error:  # a key that stands twice; an integer of thousands of digits
        raise ConfigError(f"{where}: {printable(str(error))}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in record if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} stands twice. Keep one of them")
    return record
