"""What a command finds around it: a terminal that lacks characters, and variables that a container left behind."""

import codecs
import contextlib
import os
import sys

# variables which libraries take literally when they are empty: HF_HOME="" is the working folder, WANDB_MODE="" an error
_EMPTY_IS_UNSET = (
    "ACCELERATE_ CUDA_HOME HF_ HUGGINGFACE_ JUPYTER LOCAL_ MASTER_ MKL_ MPL OMP_ PYTORCH_ RANK TORCH TRANSFORMERS_ "
    "WANDB_ WORLD_SIZE XDG_"
).split()
_ALIKE = {"→": "->", "≥": ">=", "≤": "<="} | dict(zip("−–—×·“”’", '---x*""\'', strict=True))


def prepare() -> None:
    """Let this command print whatever its terminal's encoding, and drop what others set for programs of theirs."""
    codecs.register_error("alike", _alike)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # there is none, or one of somebody's own
            if not stream.encoding.lower().startswith("utf"):
                stream.reconfigure(errors="alike")
    for name, value in list(os.environ.items()):
        is_empty = not value.strip() and name.startswith(tuple(_EMPTY_IS_UNSET))
        if is_empty or (name == "MPLBACKEND" and value.startswith("module://")):  # a notebook's, whose cell calls us
            del os.environ[name]


def _alike(error: UnicodeError) -> tuple[str, int]:
    """What a terminal shows for characters that it lacks: those that look alike, letters without accents, else "?"."""
    import unicodedata  # here, since `prepare` may not take long

    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    plain = (unicodedata.normalize("NFKD", one).encode("ascii", "ignore").decode() for one in lacking)
    return "".join(_ALIKE.get(one) or letters or "?" for one, letters in zip(lacking, plain, strict=True)), error.end


def world_size() -> int:
    """How many processes a launcher started, 1 where there was none; a `KitError` where WORLD_SIZE cannot be its."""
    from grpo_kit.config import KitError  # here, since `prepare` may not take long

    text = os.environ.get("WORLD_SIZE") or "1"
    mend = "Something else left it behind. Unset it; several processes are started by grpo-kit train --launch N"
    if not text.isdecimal():
        raise KitError(f"WORLD_SIZE: found {text!r:.40}, allowed: a number, set by a launcher. {mend}")
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if int(text) > 1 and missing:
        raise KitError(f"WORLD_SIZE: found {text} without {', '.join(missing)}, which a launcher sets. {mend}")
    return int(text)
