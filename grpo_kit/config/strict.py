"""JSON and YAML as people write them into files: read strictly, and what is wrong said in one line with its place."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from grpo_kit.config.errors import ConfigError, printable, shown

_HINTS = {"'": ". Texts and keys stand in double quotes", "“": '. Write plain quotes: "'}
_HINTS |= dict.fromkeys(["{", "["], ". A record is one line, and one record a line")
_HINTS |= dict.fromkeys(["None", "True", "False"], ". JSON writes null, true, false")
# The core schema of YAML 1.2, by which `no` and `2026-01-01` are texts and `1e-4` is a number. YAML 1.1, which PyYAML
# reads by itself, has these as false, a date and a text. The letters are those that such a value may begin with.
_CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}


def strict_json(content: bytes, path: Path, line: int | None = None) -> Any:
    """Read JSON in UTF-8 in which no key of an object stands twice; a `ConfigError` says what is wrong, and where.

    `line` is the number of the line that `content` is, where each line of the file `path` is a value of its own.
    """
    where = str(path) if line is None else f"{path}:{line}"
    text = _text(content, where)
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        place, found = f"{path}:{line or error.lineno}", error.doc[error.pos : error.pos + 20].strip()
        hint = next((hint for start, hint in _HINTS.items() if found.startswith(start)), "")
        found = f", found {shown(found)}" if found else ""
        raise ConfigError(f"{place}: not JSON: {error.msg}{found} (column {error.colno}){hint}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply, allowed: a few levels") from None
    except ValueError as error:  # a key that stands twice; an integer of thousands of digits
        raise ConfigError(f"{where}: {printable(str(error))}") from None


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text (byte {error.start}). Save the file as UTF-8") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"the key {shown(_twice([key for key, _ in pairs]))} stands twice. Keep one of them")
    return record


def _twice(keys: Sequence[str]) -> str | None:
    return next((key for key, count in Counter(keys).items() if count > 1), None)


class _Loader(yaml.SafeLoader):
    """Values by the core schema of YAML 1.2; a key that stands twice, which would replace the first, is an error."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012, since PyYAML copies it into a subclass

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping of the file as a dict."""
        twice = _twice([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r:.40} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _tag, (_pattern, _first) in _CORE.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def read_strictly(path: Path, as_yaml: bool) -> Any:
    """What a YAML or JSON file holds; a `ConfigError` as `strict_json` raises it, also where it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not as_yaml:
        return strict_json(content, path)
    text = _text(content, str(path))
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        place = getattr(error, "problem_mark", None)
        where = f"{path}:{place.line + 1}" if place is not None else str(path)
        what = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"{where}: not YAML: {printable(str(what)):.150}") from None


def line_of(content: bytes, keys: Sequence[str]) -> int | None:
    """The line of a file, YAML or JSON, on which the setting at these keys stands; None where that is not known."""
    try:  # JSON is YAML, but for tabs
        node, line = yaml.compose(content.decode("utf-8-sig").replace("\t", " "), yaml.SafeLoader), None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    for name in keys:
        found = [pair for pair in getattr(node, "value", ()) if isinstance(pair, tuple) and pair[0].value == name]
        if not found:
            return None
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return line
