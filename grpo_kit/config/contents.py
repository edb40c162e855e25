"""What decides a run's result and lies in files, by content: with other content it is another run.

Paths do not count: a file that was moved is the same, one that was edited in place is not.
"""

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from grpo_kit.config.errors import ConfigError
from grpo_kit.config.paths import OWN_REWARDS, PROMPT_PATHS, change_paths
from grpo_kit.config.pictures import Picture
from grpo_kit.config.prompts import Prompt, load_prompts
from grpo_kit.config.settings import Config

HELD_OUT = PROMPT_PATHS[1]
_IGNORED = re.compile(r"(^|/)(\.|__pycache__|README\.md$)")  # into the card an evaluation writes its results
_BLOCKS, _BLOCK = 64, 1 << 16  # a file of at most 4 MiB is read whole; of a larger one so many blocks, evenly spaced


def content_digest(path: Path) -> str:
    """sha256 of what a file, or a folder with all below it, holds; seconds at most, however large the weights are.

    Of each file count its name inside the folder, its size and its bytes: all of them up to 4 MiB, of a larger file 64
    blocks of 64 KiB from its start to its end. Hidden files and model cards do not count.
    """
    total, files = hashlib.sha256(), [path] if path.is_file() else filter(Path.is_file, path.rglob("*"))
    for name in sorted("" if file == path else file.relative_to(path).as_posix() for file in files):
        if _IGNORED.search(name):
            continue
        size, content = (path / name).stat().st_size, hashlib.sha256()
        step = max(size - _BLOCK, 0) / (_BLOCKS - 1)
        with (path / name).open("rb") as stream:
            for number in range(_BLOCKS if step else 1):
                stream.seek(round(number * step))
                content.update(stream.read(_BLOCK))
        total.update(f"{name}\0{size}\0".encode() + content.digest())
    return total.hexdigest()


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """How many prompts, and the sha256 of all that they say and show, in their order; not of the file's form."""
    digest, shown = hashlib.sha256(), functools.cache(_picture_digest)
    for prompt in prompts:
        row = (prompt.user_prompt, prompt.category, prompt.difficulty, sorted(prompt.metadata.items()))
        row += tuple(map(shown, prompt.images))
        digest.update(repr(row).encode("utf-8", "backslashreplace"))
    return f"{len(prompts)} prompts, {digest.hexdigest()}"


def pictures_digest(prompt: Prompt) -> str:
    """The sha256 of each picture of a prompt; "" where it has none."""
    return " ".join(map(_picture_digest, prompt.images))


def _picture_digest(picture: Picture) -> str:
    try:
        return hashlib.sha256(picture if isinstance(picture, bytes) else picture.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{picture}: cannot be read: {error.strerror}. A prompt names this picture") from None


def decisive_contents(
    config: Config, train_prompts: Sequence[Prompt] | None = None, val_prompts: Sequence[Prompt] | None = None
) -> dict[str, str]:
    """Dotted key → digest of the prompts, and of each file or folder on this machine that models and rewards are from.

    Prompts that are None are those that the config names; a `ConfigError` where one of the files cannot be read.
    """
    found, settings = {}, config.model_dump()

    def note(key: str, value: str) -> str:
        try:
            if key not in (*PROMPT_PATHS, OWN_REWARDS) and Path(value).is_absolute() and Path(value).exists():
                found[key] = found.get(key, "") + content_digest(Path(value))  # of a list, all
        except OSError as error:
            raise ConfigError(f"{key}: {error.filename} cannot be read: {error.strerror}. Allow reading it") from None
        return value

    change_paths(settings, note)
    named = (config.training_settings.train_prompts, config.evaluation_settings.val_prompts)
    for key, path, prompts in zip(PROMPT_PATHS, named, (train_prompts, val_prompts), strict=True):
        found[key] = prompts_digest(load_prompts(path) if prompts is None else prompts)
    return found
