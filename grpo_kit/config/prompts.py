"""The user's prompts: records read from JSONL, and batches that are balanced over their categories."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from grpo_kit.config import KitError
from grpo_kit.config.seeds import derive_seed

MAX_LINE_BYTES = 1_000_000


class PromptError(KitError):
    """A prompt file that cannot be used; its text starts with file:line where there is a line."""


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
    bounded by the longest line allowed (1 MB). Raises `PromptError` with file:line at the first line that is broken.
    """
    path = Path(path)
    if "\0" in str(path):
        raise PromptError(f"{str(path)!r:.100}: no path, since it has a NUL. Name a JSONL file with one prompt a line")
    try:
        with path.open("rb") as file:
            prompts = [_parsed(line, f"{path}:{number}") for number, line in _lines(file, path)]
    except FileNotFoundError:
        raise PromptError(f"{path}: no such file. Name a JSONL file with one prompt a line") from None
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror}") from None
    if not prompts:
        raise PromptError(f'{path}: empty, allowed: one JSON object a line, such as {{"user_prompt": "a cat"}}')
    return prompts


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise PromptError(f"{path}:{number}: longer than {MAX_LINE_BYTES:,} bytes. Split it, or remove it")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def _parsed(line: bytes, where: str) -> Prompt:
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # a lone surrogate cannot be written again
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: not JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{where}: not UTF-8 text (byte {error.start}). Save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise PromptError(f"{where}: half a character (a lone surrogate such as \\ud800). Remove it") from None
    except RecursionError:
        raise PromptError(f"{where}: nested too deeply. Keep metadata flat") from None
    except ValueError as error:
        raise PromptError(f"{where}: {error}") from None
    if not isinstance(record, dict):
        raise PromptError(f'{where}: found {record!r:.60}, allowed: an object such as {{"user_prompt": "a cat"}}')
    known = {name: _text(record.pop(name), name, where) for name in ("category", "difficulty") if name in record}
    if "user_prompt" not in record:
        raise PromptError(f"{where}: user_prompt is missing; found the keys {sorted(record)!r:.100}")
    return Prompt(_text(record.pop("user_prompt"), "user_prompt", where), **known, metadata=record)


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise PromptError(f"{where}: {name}: found {value!r:.60}, allowed: text in quotation marks")
    if not value.strip() or "\0" in value:
        raise PromptError(f"{where}: {name}: found {value!r:.60}, allowed: text that is not empty and has no NUL")
    return value.strip()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.60} stands twice. Keep one of them")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"found {name}, allowed: finite numbers")


def balanced_batch(prompts: Sequence[Prompt], size: int, seed: int, iteration: int) -> list[Prompt]:
    """The prompts of one iteration, decided by (seed, iteration) alone, so that a resumed run sees the same ones.

    Iterations deal slots: every round of slots gives each category one, in a shuffled order, and a category deals its
    prompts epoch by epoch, each epoch shuffled anew. So after any number of iterations two categories differ by at most
    one prompt, and within a category all prompts are seen before one comes again. Only a prompt which is already in
    the batch makes way for another one, first of its category, then of any, as long as there is one.

    Difficulty is left to the shuffle: an epoch has each prompt once, so a category's difficulties come as often as its
    file has them. Between batches their mix varies; a baseline within each group takes that out.
    """
    if size < 1 or not prompts:
        raise PromptError(f"batch of {size} from {len(prompts)} prompts: allowed: at least 1 of each")
    categories: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        categories.setdefault(prompt.category, []).append(index)
    names = sorted(categories)
    chosen: list[int] = []
    for slot in range(iteration * size, (iteration + 1) * size):
        draw = slot // len(names)
        turn = _shuffled(range(len(names)), seed, "categories", draw)
        members = categories[names[turn[slot % len(names)]]]
        epoch, position = divmod(draw, len(members))
        order = _shuffled(members, seed, names[turn[slot % len(names)]], epoch)
        wanted = order[position:] + order[:position]
        unused = (index for index in [*wanted, *_rest(prompts, seed, slot)] if index not in chosen)
        chosen.append(next(unused, wanted[0]))
    return [prompts[index] for index in chosen]


def _rest(prompts: Sequence[Prompt], seed: int, slot: int) -> Iterator[int]:
    yield from _shuffled(range(len(prompts)), seed, "any", slot)


def _shuffled(items: Sequence[int] | range, seed: int, purpose: str, number: int) -> list[int]:
    result = list(items)
    random.Random(derive_seed(seed, "prompts", purpose, number)).shuffle(result)
    return result
