"""The user's prompts: records read from JSONL, and batches that are balanced over their categories."""

import codecs
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from grpo_kit.config.errors import ConfigError, shown
from grpo_kit.config.seeds import derive_seed
from grpo_kit.config.strict_json import strict_json

MAX_LINE_BYTES = 1_000_000
TEXTS = ("user_prompt", "category", "difficulty")


@dataclass(frozen=True)
class Prompt:
    """What a user asks for, and where it belongs."""

    user_prompt: str
    category: str = "basic"
    difficulty: str = "medium"
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts from JSONL: `{"user_prompt": "a cat", "category": "basic", "difficulty": "easy"}` a line.

    Further keys are kept as metadata; blank lines, a byte-order mark and Windows line ends are fine. Memory stays
    bounded by the longest line allowed (1 MB). Raises `ConfigError` with file:line at the first line that is broken.
    """
    path = Path(path)
    if "\0" in str(path):
        raise ConfigError(f"{shown(str(path))}: found a NUL in the path. Name a JSONL file with one prompt a line")
    try:
        with path.open("rb") as file:
            prompts = [_parsed(line, path, number) for number, line in _lines(file, path)]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}. Name a JSONL file, one prompt a line") from None
    if not prompts:
        raise ConfigError(f'{path}: empty, allowed: one JSON object a line, such as {{"user_prompt": "a cat"}}')
    return prompts


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    for number in itertools.count(1):
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise ConfigError(f"{path}:{number}: longer than {MAX_LINE_BYTES:,} bytes. Split it, or remove it")
        if line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip():
            yield number, line


def _parsed(line: bytes, path: Path, number: int) -> Prompt:
    where = f"{path}:{number}"
    record = strict_json(line, path, number)
    if not isinstance(record, dict) or "user_prompt" not in record:
        example = 'an object with user_prompt, such as {"user_prompt": "a cat"}'
        raise ConfigError(f"{where}: found {shown(record)}, allowed: {example}")
    try:  # whether it can be written again
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError):
        allowed = "finite numbers, whole characters (no lone surrogate such as \\ud800), a few levels"
        raise ConfigError(f"{where}: found a value that JSON cannot hold, allowed: {allowed}") from None
    texts = {name: _text(record.pop(name), name, where) for name in TEXTS if name in record}
    return Prompt(**texts, metadata=record)


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ConfigError(f"{where}: {name}: found {shown(value)}, allowed: text, not empty, without NUL characters")
    return value.strip()


def balanced_batch(prompts: Sequence[Prompt], size: int, seed: int, iteration: int) -> list[Prompt]:
    """The prompts of one iteration, decided by (seed, iteration) alone, so that a resumed run sees the same ones.

    An iteration takes the next `size` places of one endless sequence. Its places go round the categories, in a new
    random order each round; a category gives its prompts epoch by epoch, each epoch in a new random order. So after any
    number of iterations two categories differ by at most one prompt, and within a category every prompt is used before
    one comes again. A prompt that is in the batch already is replaced by another one, first of its category, then of
    any, as long as there is one.

    Difficulty is not balanced: an epoch has each prompt once, so a category's difficulties come as often as its file
    has them. Between batches their mix varies; the baseline within each group cancels that.
    """
    if size < 1 or not prompts:
        raise ConfigError(f"batch of {size} from {len(prompts)} prompts: allowed: at least 1 of each")
    categories: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        categories.setdefault(prompt.category, []).append(index)
    names = sorted(categories)
    chosen: list[int] = []
    for place in range(iteration * size, (iteration + 1) * size):
        round_number, turn = divmod(place, len(names))
        name = names[_shuffled(range(len(names)), seed, "categories", round_number)[turn]]
        epoch, position = divmod(round_number, len(categories[name]))
        order = _shuffled(categories[name], seed, name, epoch)
        preferred = order[position:] + order[:position]
        others = itertools.chain(preferred, _any_order(prompts, seed, place))
        chosen.append(next((index for index in others if index not in chosen), preferred[0]))
    return [prompts[index] for index in chosen]


def _any_order(prompts: Sequence[Prompt], seed: int, place: int) -> Iterator[int]:
    yield from _shuffled(range(len(prompts)), seed, "any", place)  # only where the category has no other prompt


def _shuffled(items: Sequence[int], seed: int, purpose: str, number: int) -> list[int]:
    result = list(items)
    random.Random(derive_seed(seed, "prompts", purpose, number)).shuffle(result)
    return result
