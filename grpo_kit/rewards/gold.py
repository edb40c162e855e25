"""What a program can check in the embedded world: an image against its prompt (gold), and a rewrite's text.

They are monitors: logged beside the reward, never part of it. A row whose metadata has a `target`, the caption of the
picture that is meant, is judged by that; any other by the user's prompt.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from grpo_kit.rewards.protocol import Images, Texts, text_of
from grpo_kit.shapeworld.captions import keeps_request, oracle_caption, parse
from grpo_kit.shapeworld.scene import Scene
from grpo_kit.shapeworld.verify import check, gold_score

Fields = Sequence[Mapping[str, Any]]  # N, the metadata of each row


def gold(images: Images, prompts: Texts, enhanced_prompts: Texts, metadata: Fields | None = None) -> list[float]:
    """Share of what the user asked for that the image shows, in [0, 1]; NaN for a prompt outside the grammar."""
    pairs = zip(images, _requests(prompts, metadata), strict=True)
    return [math.nan if request is None else gold_score(image, request) for image, request in pairs]


def keeps_objects(
    images: Images, prompts: Texts, enhanced_prompts: Texts, metadata: Fields | None = None
) -> list[float]:
    """1 where a rewrite still states everything that the user asked for, else 0."""
    rewrites = zip(_requests(prompts, metadata), map(parse, enhanced_prompts), strict=True)
    return [float(bool(asked and written and keeps_request(asked, written))) for asked, written in rewrites]


def grammatical(images: Images, prompts: Texts, enhanced_prompts: Texts) -> list[float]:
    """1 where a rewrite is a sentence of the world's grammar, else 0."""
    return [float(parse(rewrite) is not None) for rewrite in enhanced_prompts]


def best_prompt(prompt: str, metadata: Mapping[str, Any] | None = None) -> str | None:
    """The oracle's rewrite of a user's prompt; None for a prompt outside the grammar."""
    request = _request(prompt, metadata)
    return None if request is None else oracle_caption(request)


def checked_attributes(image: Image.Image, prompt: str, metadata: Mapping[str, Any] | None = None) -> dict[str, bool]:
    """attribute → whether the image shows it as the prompt asks; empty for a prompt outside the grammar."""
    request = _request(prompt, metadata)
    return {} if request is None else check(image, request)


def _request(prompt: str, metadata: Mapping[str, Any] | None) -> Scene | None:
    return parse(text_of(metadata or {}, "target") or prompt)


def _requests(prompts: Texts, metadata: Fields | None) -> list[Scene | None]:
    return [_request(*row) for row in zip(prompts, metadata or [{}] * len(prompts), strict=True)]
