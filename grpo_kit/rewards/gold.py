"""What a program can check in the embedded worlds: a medium against its prompt (gold), and a rewrite's text.

The medium says which world's grammar counts: that of pictures, films or tones; for words alone, any in which both are.
They are monitors: logged beside the reward, never part of it. A row whose metadata has a `target`, the caption of the
picture that is meant, is judged by that; any other by the user's prompt.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_kit.config.media import Kind, Medium, kind_of
from grpo_kit.rewards.media import ALL
from grpo_kit.rewards.protocol import Images, Texts, text_of
from grpo_kit.shapeworld import captions, moving, tones, verify
from grpo_kit.shapeworld.captions import keeps_request

Fields = Sequence[Mapping[str, Any]]  # N, the metadata of each row
_WORLDS = {"image": captions, "video": moving, "sound": tones}  # each has `parse` and `oracle_caption`
_CHECKS = {"image": verify.check, "video": moving.check, "sound": tones.check}


def gold(images: Images, prompts: Texts, enhanced_prompts: Texts, metadata: Fields | None = None) -> list[float]:
    """Share of what the user asked for that the medium shows, in [0, 1]; NaN for a prompt outside the grammar."""
    rows = zip(images, prompts, metadata or [{}] * len(prompts), strict=True)
    found = [checked_attributes(*row) for row in rows]
    return [sum(one.values()) / len(one) if one else math.nan for one in found]


def keeps_objects(
    images: Images, prompts: Texts, enhanced_prompts: Texts, metadata: Fields | None = None
) -> list[float]:
    """1 where a rewrite still states everything that the user asked for, else 0."""
    rows = zip(prompts, enhanced_prompts, metadata or [{}] * len(prompts), strict=True)
    return [float(_keeps(_meant(prompt, fields), rewrite)) for prompt, rewrite, fields in rows]


def grammatical(images: Images, prompts: Texts, enhanced_prompts: Texts) -> list[float]:
    """1 where a rewrite is a sentence of a world's grammar, else 0."""
    return [float(any(world.parse(rewrite) for world in _WORLDS.values())) for rewrite in enhanced_prompts]


grammatical.media = keeps_objects.media = ALL
gold.media = ("image", "video", "sound")


def best_prompt(prompt: str, metadata: Mapping[str, Any] | None = None, medium: Kind = "image") -> str | None:
    """The oracle's rewrite of a user's prompt for a generator of a medium; None for one outside its grammar."""
    world = _WORLDS.get(medium)
    request = world and world.parse(_meant(prompt, metadata))
    return world.oracle_caption(request) if request else None


def checked_attributes(image: Medium, prompt: str, metadata: Mapping[str, Any] | None = None) -> dict[str, bool]:
    """attribute → whether the medium shows it as the prompt asks; empty for a prompt outside the grammar."""
    kind = kind_of(image)
    request = kind in _WORLDS and _WORLDS[kind].parse(_meant(prompt, metadata))
    return _CHECKS[kind](image, request) if request else {}


def _meant(prompt: str, metadata: Mapping[str, Any] | None) -> str:
    return text_of(metadata or {}, "target") or prompt


def _keeps(prompt: str, rewrite: str) -> bool:
    """Whether there is a grammar in which the rewrite states all that the prompt does."""
    read = ((world.parse(prompt), world.parse(rewrite)) for world in _WORLDS.values())
    return any(asked and written and keeps_request(asked, written) for asked, written in read)
