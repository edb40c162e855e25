"""Painters who read some words as others: a world in which it pays to look at what a prompt gave.

Nothing but their pictures tells them apart. Which one draws depends on the latent's seed alone, so that the rewrites of
a group, and all turns of an episode, have the same one. Who does not look is right for one painter in k.
"""

import re
from collections.abc import Mapping, Sequence

from grpo_kit.config.seeds import derive_seed

Swaps = Mapping[str, str]
_ARTICLE = re.compile(r"\b(a|an)( [a-z])", re.IGNORECASE)


def painter_of(seed: int, painters: Sequence[Swaps]) -> int:
    """Which of the painters draws from a latent's seed."""
    return derive_seed(seed, "painter") % len(painters)


def as_read(text: str, swaps: Swaps) -> str:
    """A text as a painter reads it: whole words are swapped, and articles put right."""
    if not swaps:
        return text
    words = "|".join(sorted(map(re.escape, swaps), key=len, reverse=True))
    read = re.sub(rf"\b({words})\b", lambda found: swaps[found[0]], text)
    return _ARTICLE.sub(lambda found: ("an" if found[2][1].lower() in "aeiou" else "a") + found[2], read)
