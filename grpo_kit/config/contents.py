"""What decides a run's result and lies in files, by content: with other content it is another run.

Paths do not count: a file that was moved is the same, one that was edited in place is not.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from grpo_kit.config.errors import ConfigError
from grpo_kit.config.paths import MODEL_PATHS, PROMPT_PATHS, REWARD_PATHS
from grpo_kit.config.prompts import Prompt, load_prompts
from grpo_kit.config.settings import Config

TRAINED_ON, HELD_OUT = PROMPT_PATHS
_BLOCKS, _BLOCK = 64, 1 << 16  # a file of at most 4 MiB is read whole; of a larger one so many blocks, evenly spaced
_CARD = "README.md"  # an evaluation writes its results into it


def content_digest(path: Path) -> str:
    """sha256 of what a file, or a folder with all below it, holds; seconds at most, however large the weights are.

    Of each file count its name inside the folder, its size and its bytes: all of them up to 4 MiB, of a larger file 64
    blocks of 64 KiB from its start to its end. Hidden files and model cards do not count.
    """
    total = hashlib.sha256()
    for name, file in [("", path)] if path.is_file() else _files(path):
        total.update(f"{name}\0{file.stat().st_size}\0".encode())
        total.update(_sampled(file))
    return total.hexdigest()


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Name inside the folder → file, sorted."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        kept = [Path(place, name) for name in files if not name.startswith(".") and name != _CARD]
        found += [(file.relative_to(folder).as_posix(), file) for file in kept if file.is_file()]
    return sorted(found)


def _sampled(file: Path) -> bytes:
    step = max(file.stat().st_size - _BLOCK, 0) / (_BLOCKS - 1)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for number in range(_BLOCKS if step else 1):
            stream.seek(round(number * step))
            digest.update(stream.read(_BLOCK))
    return digest.digest()


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """How many prompts, and the sha256 of all that they say, in their order; not of the file's form."""
    digest, count = hashlib.sha256(), 0
    for prompt in prompts:
        count += 1
        row = (prompt.user_prompt, prompt.category, prompt.difficulty, sorted(prompt.metadata.items()))
        digest.update(repr(row).encode("utf-8", "backslashreplace"))
    return f"{count} prompts, {digest.hexdigest()}"


def file_contents(config: Config) -> dict[str, str]:
    """Dotted key → digest of each file or folder on this machine that a setting of models or rewards names.

    Raises:
        ConfigError: one of them cannot be read.
    """
    found, settings = {}, config.model_dump()
    for key in MODEL_PATHS + REWARD_PATHS:
        value: object = settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        try:
            if isinstance(value, str) and Path(value).is_absolute() and Path(value).exists():
                found[key] = content_digest(Path(value))
        except OSError as error:
            raise ConfigError(f"{key}: {error.filename} cannot be read: {error.strerror}. Allow reading it") from None
    return found


def config_contents(config: Config) -> dict[str, str]:
    """What `Experiment.contents` will be of an experiment that is loaded as its config says."""
    files = {TRAINED_ON: config.training_settings.train_prompts, HELD_OUT: config.evaluation_settings.val_prompts}
    return file_contents(config) | {key: prompts_digest(load_prompts(path)) for key, path in files.items()}
