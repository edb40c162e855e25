"""What a program can check in the embedded worlds: a medium against its prompt (gold), and a rewrite's text.

Whose grammar a text is in says which world it is of: pictures, films or tones.
They are monitors: logged beside the reward, never part of it. A row whose metadata has a `target`, the caption of the
picture that is meant, is judged by that; any other by the user's prompt.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_kit.config.media import Medium
from grpo_kit.rewards.media import ALL
from grpo_kit.rewards.protocol import Images, Texts, text_of
from grpo_kit.shapeworld import captions, moving, tones, verify
from grpo_kit.shapeworld.captions import keeps_request
from grpo_kit.shapeworld.scene import Scene

Fields = Sequence[Mapping[str, Any]]  # N, the metadata of each row
Request = Scene | moving.Film | tones.Tone
_ORACLES = {
    Scene: captions.oracle_caption,
    moving.Film: moving.oracle_caption,
    tones.Tone: tones.oracle_caption,
}
_CHECKS = {Scene: verify.check, moving.Film: moving.check, tones.Tone: tones.check}


def gold(images: Images, prompts: Texts, enhanced_prompts: Texts, metadata: Fields | None = None) -> list[float]:
    """Share of what the user asked for that the medium shows, in [0, 1]; NaN for a prompt outside the grammar."""
    found = [_checked(*pair) for pair in zip(images, _requests(prompts, metadata), strict=True)]
    return [sum(one.values()) / len(one) if one else math.nan for one in found]


def keeps_objects(
    images: Images, prompts: Texts, enhanced_prompts: Texts, metadata: Fields | None = None
) -> list[float]:
    """1 where a rewrite still states everything that the user asked for, else 0."""
    rewrites = zip(_requests(prompts, metadata), map(_parse, enhanced_prompts), strict=True)
    return [
        float(type(asked) is type(written) and asked is not None and keeps_request(asked, written))
        for asked, written in rewrites
    ]


def grammatical(images: Images, prompts: Texts, enhanced_prompts: Texts) -> list[float]:
    """1 where a rewrite is a sentence of a world's grammar, else 0."""
    return [float(_parse(rewrite) is not None) for rewrite in enhanced_prompts]


grammatical.media = keeps_objects.media = ALL
gold.media = ("image", "video", "sound")


def best_prompt(prompt: str, metadata: Mapping[str, Any] | None = None) -> str | None:
    """The oracle's rewrite of a user's prompt; None for a prompt outside the grammar."""
    request = _request(prompt, metadata)
    return None if request is None else _ORACLES[type(request)](request)


def checked_attributes(image: Medium, prompt: str, metadata: Mapping[str, Any] | None = None) -> dict[str, bool]:
    """attribute → whether the medium shows it as the prompt asks; empty for a prompt outside the grammar."""
    return _checked(image, _request(prompt, metadata))


def _checked(medium: Medium, request: Request | None) -> dict[str, bool]:
    return {} if request is None else _CHECKS[type(request)](medium, request)


def _parse(text: str) -> Request | None:
    return captions.parse(text) or moving.parse(text) or tones.parse(text)


def _request(prompt: str, metadata: Mapping[str, Any] | None) -> Request | None:
    return _parse(text_of(metadata or {}, "target") or prompt)


def _requests(prompts: Texts, metadata: Fields | None) -> list[Request | None]:
    return [_request(*row) for row in zip(prompts, metadata or [{}] * len(prompts), strict=True)]
