"""YAML as people write settings into files: read strictly, and the line on which a setting stands."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from grpo_kit.config.errors import ConfigError, printable

SUFFIXES = (".yaml", ".yml")
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


class UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice: the second would silently replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping of the file as a dict."""
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, count in counts.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r:.40} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Settings(UniqueKeys):
    """Values by the core schema of YAML 1.2."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012, since PyYAML copies it into a subclass


for _tag, (_pattern, _first) in _CORE.items():
    _Settings.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def strict_yaml(content: bytes, path: Path) -> Any:
    """Read YAML 1.2 in UTF-8 in which no key of a mapping stands twice.

    Raises:
        ConfigError: one line with the file, the line where it is known, and what is wrong.
    """
    try:
        return yaml.load(content.decode("utf-8-sig"), _Settings)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). Save the file as UTF-8") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        place = getattr(error, "problem_mark", None)
        where = f"{path}:{place.line + 1}" if place is not None else str(path)
        what = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"{where}: not YAML as settings have it: {printable(str(what)):.150}") from None


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
