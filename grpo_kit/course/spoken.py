"""What a check says, in the language of the notebook: Korean where it runs in a folder `ko`, as the Korean ones do."""

import json
import re
from functools import cache
from pathlib import Path

from grpo_kit.config.paths import PROJECT_ROOT


def spoken(sentence: str, language: str | None = None) -> str:
    """Return the sentence in that language, by default that of the folder; parts that are not known stay English."""
    if len(sentence) > 2000 or (language or Path.cwd().name) != "ko":  # a longer one holds what somebody's code said
        return sentence
    found = ((pattern.fullmatch(sentence), korean) for pattern, korean in _sentences())
    match, korean = next((pair for pair in found if pair[0]), (None, sentence))
    return korean.format(*(spoken(part, "ko") for part in match.groups())) if match else sentence


@cache
def _sentences() -> list[tuple[re.Pattern, str]]:
    """English sentences with holes as patterns, with the Korean ones; what says most by itself comes first."""
    texts = json.loads((PROJECT_ROOT / "data" / "course" / "ko.json").read_text(encoding="utf-8"))
    pairs = sorted(texts.items(), key=lambda pair: -len(pair[0].replace("{}", "")))
    return [(re.compile("(.+?)".join(map(re.escape, one.split("{}"))), re.DOTALL), other) for one, other in pairs]
