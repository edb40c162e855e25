"""The user's prompts: read from files of several forms, and batches that are balanced over their categories."""

import functools
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_kit.config.display import LINE, Shown, cut, line, table
from grpo_kit.config.errors import ConfigError, one_line, shown
from grpo_kit.config.prompt_files import MAX_LINE_BYTES as MAX_LINE_BYTES
from grpo_kit.config.prompt_files import read_records
from grpo_kit.config.seeds import derive_seed

if TYPE_CHECKING:
    import numpy as np

_SHOWN = 10  # prompts of a list in a notebook
TEXTS = ("user_prompt", "category", "difficulty")
_FORMS = "a JSONL, JSON, CSV or parquet file, or a folder of `datasets`"
_ONE_BY_ONE = 2048  # of a longer list many swaps are found together


@dataclass(frozen=True, repr=False)
class Prompt(Shown):
    """What a user asks for, and where it belongs."""

    user_prompt: str
    category: str = "basic"
    difficulty: str = "medium"
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)

    def __repr__(self) -> str:
        parts = [f"{name}={getattr(self, name)!r}" for name in TEXTS]
        whole = f"Prompt({', '.join(parts)}, metadata={self.metadata!r})"
        most = (90, 35, 35)  # characters of each, where it would be too long
        cutting = ", ".join(cut(part, limit) for part, limit in zip(parts, most, strict=True))
        return whole if len(whole) <= LINE else f"Prompt({cutting}, {len(self.metadata)} metadata)"


class Prompts(list[Prompt]):
    """A list of prompts that shows itself by its size and its first ones."""

    def __getitem__(self, place: Any) -> Any:
        """One of them, or some of them as such a list again."""
        found = super().__getitem__(place)
        return Prompts(found) if isinstance(place, slice) else found

    def __repr__(self) -> str:
        first = {"first": f"{self[0].user_prompt[:LINE]!r}"} if self else {}
        return line("Prompts", {"count": len(self), "categories": len({one.category for one in self}), **first})

    def _repr_html_(self) -> str:
        rows = [(one.user_prompt, one.category, one.difficulty, one.metadata or "") for one in self[:_SHOWN]]
        left = f"and {len(self) - _SHOWN:,} more" if len(self) > _SHOWN else ""
        return table(f"{len(self):,} prompts", rows, (*TEXTS, "metadata"), left)


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts: `{"user_prompt": "a cat", "category": "basic", "difficulty": "easy"}` a line, or a table of those.

    Read are JSONL, a JSON array of such objects, CSV with a header, parquet, arrow, and a folder that `save_to_disk` of
    `datasets` wrote. Further keys are kept as metadata; a category or difficulty of null is the default; blank lines,
    byte-order marks, UTF-16 and Windows line ends are fine. A line of JSONL may have 1 MB. Raises `ConfigError` with
    file:line, or file and row, at the first prompt that is broken.
    """
    path = Path(path)
    if "\0" in str(path):
        raise ConfigError(f"{shown(str(path))}: found a NUL in the path. Name {_FORMS}")
    try:
        prompts = [_prompt(record, where) for where, record in read_records(path)]
    except OSError as error:
        why = error.strerror or one_line(error)
        raise ConfigError(f"{path}: cannot be read: {why}. Name {_FORMS}") from None
    if not prompts:
        raise ConfigError(f'{path}: empty, allowed: one JSON object a line, such as {{"user_prompt": "a cat"}}')
    return Prompts(prompts)


def _prompt(record: object, where: str) -> Prompt:
    if not isinstance(record, dict) or "user_prompt" not in record:
        example = 'an object with user_prompt, such as {"user_prompt": "a cat"}'
        raise ConfigError(f"{where}: found {shown(record)}, allowed: {example}")
    try:  # whether it can be written again
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, TypeError, RecursionError):
        allowed = "finite numbers, whole characters (no lone surrogate such as \\ud800), a few levels, no bytes"
        raise ConfigError(f"{where}: found a value that JSON cannot hold, allowed: {allowed}") from None
    given = {name: record.pop(name) for name in TEXTS if name in record}
    texts = {name: _text(value, name, where) for name, value in given.items() if value is not None or name == TEXTS[0]}
    return Prompt(**texts, metadata=record)


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ConfigError(f"{where}: {name}: found {shown(value)}, allowed: text, not empty, without NUL characters")
    return value.strip() if name == TEXTS[0] else sys.intern(value.strip())  # one text for all prompts that have it


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
    names, categories = _by_category(prompts)
    chosen: list[int] = []
    for place in range(iteration * size, (iteration + 1) * size):
        round_number, turn = divmod(place, len(names))
        name = names[next(_shuffled(len(names), seed, "categories", round_number, turn))]
        members = categories[name]
        epoch, position = divmod(round_number, len(members))
        preferred = (members[index] for index in _shuffled(len(members), seed, name, epoch, position))
        any_other = _shuffled(len(prompts), seed, "any", place, swaps_of=_swaps)  # used once, if at all: not kept
        others = itertools.chain(preferred, any_other)
        first = next(others)
        chosen.append(next((index for index in itertools.chain([first], others) if index not in chosen), first))
    return [prompts[index] for index in chosen]


_grouped: tuple[Sequence[Prompt], tuple[list[str], dict[str, list[int]]]] = ((), ([], {}))


def _by_category(prompts: Sequence[Prompt]) -> tuple[list[str], dict[str, list[int]]]:
    """The categories in order, and the places of each one's prompts; kept until other prompts come."""
    global _grouped
    if _grouped[0] != prompts:  # quick, since most often they are the same objects
        categories: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            categories.setdefault(prompt.category, []).append(index)
        _grouped = type(prompts)(prompts), (sorted(categories), categories)
    return _grouped[1]


def _swaps(count: int, seed: int) -> "np.ndarray":
    """For each place i the place up to i with which `random.Random(seed).shuffle` swaps it.

    For the last of n places it takes n.bit_length() bits, and again while that number is n or more. Here many draws are
    looked at together: which of them are taken is found by repetition, which ends soon, since few depend on others.
    """
    import numpy as np

    words = random.Random(seed).getstate()[1]
    generator = np.random.MT19937()
    generator.state = {"bit_generator": "MT19937", "state": {"key": np.array(words[:-1], np.uint32), "pos": words[-1]}}
    swaps, left, raw = np.zeros(count, np.int32), count, np.empty(0, np.uint64)
    while left > _ONE_BY_ONE:
        bits = left.bit_length()
        together = 2 ** (bits - 4)
        raw = np.append(raw, generator.random_raw(max(0, together - len(raw))))
        draws = (raw[:together] >> np.uint64(32 - bits)).astype(np.int32)
        taken = draws < left
        while ((now := draws + np.cumsum(taken, dtype=np.int32) - taken < left) != taken).any():
            taken = now
        places = taken.nonzero()[0][: left - 2 ** (bits - 1) + 1]  # after these a number takes fewer bits
        swaps[left - len(places) : left] = draws[places[::-1]]
        left -= len(places)
        raw = raw[places[-1] + 1 if left < 2 ** (bits - 1) else together :]
    rest = itertools.chain(raw.tolist(), generator.random_raw(2 * left).tolist(), iter(generator.random_raw, None))
    for size in range(left, 1, -1):
        shift = 32 - size.bit_length()
        while (draw := next(rest) >> shift) >= size:
            pass
        swaps[size - 1] = draw
    return swaps


_kept_swaps = functools.lru_cache(maxsize=64)(_swaps)


def _shuffled(
    count: int, seed: int, purpose: str, number: int, start: int = 0, swaps_of: Callable = _kept_swaps
) -> Iterator[int]:
    """What `random.shuffle` makes of range(count), from place `start` on and round; found as far as it is asked for."""
    swaps = swaps_of(count, derive_seed(seed, "prompts", purpose, number))
    for place in range(start, start + count):
        item, i = int(swaps[place % count]), place % count + 1
        while len(later := (swaps[i:] == item).nonzero()[0]):  # back through the swaps (i, swaps[i])
            item = i + int(later[0])
            i = item + 1
        yield item
