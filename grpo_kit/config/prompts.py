"""The user's prompts: read from files of several forms, and batches that are balanced over their categories."""

import functools
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_kit.config.display import LINE, Html, Shown, cut, line, picture, table
from grpo_kit.config.errors import ConfigError, one_line, shown
from grpo_kit.config.pictures import Picture, open_picture, take_pictures
from grpo_kit.config.prompt_files import read_records
from grpo_kit.config.seeds import derive_seed

if TYPE_CHECKING:
    from PIL import Image

_SHOWN = 10  # prompts of a list in a notebook
TEXTS = ("user_prompt", "category", "difficulty")
_MANY = 10_000  # prompts; to shuffle more would take longer than an iteration of a small run may
_FORMS = "a JSONL, JSON, CSV or parquet file, or a folder of `datasets`"


@dataclass(frozen=True, repr=False)
class Prompt(Shown):
    """What a user asks for, and where it belongs."""

    user_prompt: str
    category: str = "basic"
    difficulty: str = "medium"
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)
    images: tuple[Picture, ...] = ()  # files, or their content

    def __post_init__(self) -> None:
        if self.images:  # whoever makes one by hand writes a list of names
            found = tuple(Path(one) if isinstance(one, str) else one for one in self.images)
            object.__setattr__(self, "images", found)

    def __repr__(self) -> str:
        parts = [f"{name}={getattr(self, name)!r}" for name in (*TEXTS, "metadata")]
        if self.images:
            names = (f"{len(one):,} bytes" if isinstance(one, bytes) else one.name for one in self.images)
            parts.append(f"images=({', '.join(names)})")
        whole = f"Prompt({', '.join(parts)})"
        return whole if len(whole) <= LINE else f"Prompt({', '.join(cut(part, 176 // len(parts)) for part in parts)})"

    def _shown(self) -> dict[str, object]:
        texts = {name: getattr(self, name) for name in (*TEXTS, "metadata")}
        return texts | ({"images": self._thumbnails()} if self.images else {})

    def _thumbnails(self) -> Html:
        try:
            return Html(" ".join(map(picture, self.pictures())))
        except ConfigError:  # a file that is gone
            return picture(None)

    def pictures(self) -> list["Image.Image"]:
        """Its pictures, opened: in RGB, upright, over white. A `ConfigError` where one is gone or broken by now."""
        return [open_picture(one, f"prompt {self.user_prompt[:40]!r}: image") for one in self.images]


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
        first = self[:_SHOWN]
        rows = [(one.user_prompt, one.category, one.difficulty, one.metadata or "") for one in first]
        header = (*TEXTS, "metadata")
        if any(one.images for one in first):
            header = (*header, "images")
            rows = [(*row, one._thumbnails() if one.images else "") for row, one in zip(rows, first, strict=True)]
        left = f"and {len(self) - _SHOWN:,} more" if len(self) > _SHOWN else ""
        return table(f"{len(self):,} prompts", rows, header, left)


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts: `{"user_prompt": "a cat", "category": "basic", "difficulty": "easy"}` a line, or a table of those.

    Read are JSONL, a JSON array of such objects, CSV with a header, parquet, arrow, and a folder that `save_to_disk` of
    `datasets` wrote. Further keys are kept as metadata; a category or difficulty of null is the default. `image` is a
    picture and `images` a list of them: paths that count from the file's folder, in tables also bytes. Raises
    `ConfigError` with file:line, or file and row, at the first prompt that is broken, or whose picture is.
    """
    path, known = Path(path), {}
    if "\0" in str(path):
        raise ConfigError(f"{shown(str(path))}: found a NUL in the path. Name {_FORMS}")
    try:
        folder = (path if path.is_dir() else path.parent).absolute()
        prompts = [_prompt(record, where, folder, known) for where, record in read_records(path)]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or one_line(error)}. Name {_FORMS}") from None
    if not prompts:
        raise ConfigError(f'{path}: empty, allowed: one JSON object a line, such as {{"user_prompt": "a cat"}}')
    return Prompts(prompts)


def _prompt(record: object, where: str, folder: Path, known: dict[Picture, Picture]) -> Prompt:
    if not isinstance(record, dict) or "user_prompt" not in record:
        example = 'an object with user_prompt, such as {"user_prompt": "a cat"}'
        raise ConfigError(f"{where}: found {shown(record)}, allowed: {example}")
    images = take_pictures(record, folder, where, known)
    try:  # whether it can be written again
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, TypeError, RecursionError):
        allowed = "finite numbers, whole characters (no lone surrogate such as \\ud800), a few levels, no bytes"
        raise ConfigError(f"{where}: found a value that JSON cannot hold, allowed: {allowed}") from None
    given = {name: record.pop(name) for name in TEXTS if name in record}
    texts = {name: _text(value, name, where) for name, value in given.items() if value is not None or name == TEXTS[0]}
    return Prompt(**texts, metadata=record, images=images)


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ConfigError(f"{where}: {name}: found {shown(value)}, allowed: text, not empty, without NUL characters")
    return value.strip() if name == TEXTS[0] else sys.intern(value.strip())  # one text for all prompts that have it


def without_control_tokens(prompt: str, tokenizer: Any) -> str:
    """A prompt with the text of every added token of a tokenizer broken by a space: it is read as ordinary text."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    for token in sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True):
        prompt = prompt.replace(token, f"{token[:1]} {token[1:]}" if len(token) > 1 else " ")
    return prompt


def balanced_batch(prompts: Sequence[Prompt], size: int, seed: int, iteration: int) -> list[Prompt]:
    """The prompts of one iteration, decided by (seed, iteration) alone, so that a resumed run sees the same ones.

    An iteration takes the next `size` places of one endless sequence. Its places go round the categories, in a new
    random order each round; a category gives its prompts epoch by epoch, each epoch in a new random order. So after any
    number of iterations two categories differ by at most one prompt, and within a category every prompt is used before
    one comes again. A prompt that is in the batch already is replaced by another one, first of its category, then of
    any, as long as there is one.

    Difficulty is not balanced: an epoch has each prompt once. Between batches the mix of difficulties varies; the
    baseline within each group cancels that.
    """
    if size < 1 or not prompts:
        raise ConfigError(f"batch of {size} from {len(prompts)} prompts: allowed: at least 1 of each")
    categories = _by_category(prompts)
    names, chosen = list(categories), []
    for place in range(iteration * size, (iteration + 1) * size):
        round_number, turn = divmod(place, len(names))
        name = names[_kept_order(len(names), seed, "categories", round_number)[turn]]
        members = categories[name]
        epoch, position = divmod(round_number, len(members))
        order = _kept_order(len(members), seed, name, epoch)
        own = (members[order[(position + step) % len(order)]] for step in range(len(order)))
        index = next((index for index in own if index not in chosen), None)
        if index is None:  # all of its category are in the batch
            others = _some_order(len(prompts), len(chosen) + 1, seed, place)
            index = next((index for index in others if index not in chosen), members[order[position]])
        chosen.append(index)
    return [prompts[index] for index in chosen]


_grouped: tuple[Sequence[Prompt], dict[str, list[int]]] = ((), {})


def _by_category(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Category, in order → the places of its prompts; kept until other prompts come."""
    global _grouped
    if _grouped[0] != prompts:  # quick, since most often they are the same objects
        categories: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            categories.setdefault(prompt.category, []).append(index)
        _grouped = type(prompts)(prompts), dict(sorted(categories.items()))
    return _grouped[1]


def _order(count: int, seed: int, purpose: str, number: int) -> list[int]:
    """The numbers below `count`, shuffled."""
    order = list(range(count))
    random.Random(derive_seed(seed, "prompts", purpose, number)).shuffle(order)
    return order


def _some_order(count: int, most: int, seed: int, place: int) -> list[int]:
    """The numbers below `count`, shuffled; of very many the first `most`."""
    if count <= _MANY:
        return _order(count, seed, "any", place)
    return random.Random(derive_seed(seed, "prompts", "any", place)).sample(range(count), min(most, count))


_kept_order = functools.lru_cache(maxsize=256)(_order)
