"""The words of a text, in any script.

Where a script puts spaces between words, a word is a run of letters, digits and marks. Han, kana but for runs of
katakana, Thai and their like have no spaces: each letter with its marks is a word, as word boundaries are by default in
Unicode (UAX #29); a dictionary would find fewer. An emoji is a word.
"""

from collections.abc import Sequence

import regex

_UNSPACED = "".join(rf"\p{{Script={name}}}" for name in "Han Hiragana Bopomofo Thai Lao Khmer Myanmar Tibetan".split())
_LETTER = rf"[{_UNSPACED}][\p{{M}}\u200d]*"
_RUN = rf"(?:(?![{_UNSPACED}])[\w\p{{N}}])+"
_EMOJI = r"(?=\p{Emoji_Presentation}|\p{Emoji}\ufe0f)\X"
_PLAIN = regex.compile(f"{_LETTER}|{_RUN}|{_EMOJI}")
_COMPOUND = regex.compile(f"{_LETTER}|{_RUN}(?:['’-]{_RUN})*|{_EMOJI}")


def words(text: str, *, compounds: bool = False) -> list[str]:
    """A text's words in order, without case and punctuation.

    Args:
        compounds: "it's" and "red-hot" are one word each.
    """
    return (_COMPOUND if compounds else _PLAIN).findall(text.lower())


def phrase(some: Sequence[str]) -> str:
    """Words as a text again: no space between two of a script that has none."""
    return regex.sub(rf"(?<=[{_UNSPACED}]\p{{M}}*) (?=[{_UNSPACED}])", "", " ".join(some))
