"""Sizes of memory as people write them."""

import re

from grpo_kit.config import KitError


def bytes_of(text: str) -> float:
    """A size such as 24GB or 24GiB in bytes.

    Raises:
        KitError: it is no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM])(i?)B?", text.strip(), flags=re.IGNORECASE)
    if not found or not float(found[1]):
        raise KitError(f"--memory: found {text!r:.60}, allowed: a size such as 24GB, 15.6GiB or 500MB")
    kilo = 1024 if found[3] else 1000
    return float(found[1]) * kilo ** (3 if found[2].upper() == "G" else 2)
