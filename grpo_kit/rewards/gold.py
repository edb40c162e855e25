"""What a program can check in the embedded world: an image against its prompt (gold), and a rewrite's text.

They are monitors: logged beside the reward, never part of it.
"""

import math

from PIL import Image

from grpo_kit.rewards.protocol import Images, Texts
from grpo_kit.shapeworld.captions import keeps_request, oracle_caption, parse
from grpo_kit.shapeworld.verify import check, gold_score


def gold(images: Images, prompts: Texts, enhanced_prompts: Texts) -> list[float]:
    """Share of what the user asked for that the image shows, in [0, 1]; NaN for a prompt outside the grammar."""
    requests = [parse(prompt) for prompt in prompts]
    pairs = zip(images, requests, strict=True)
    return [math.nan if request is None else gold_score(image, request) for image, request in pairs]


def keeps_objects(images: Images, prompts: Texts, enhanced_prompts: Texts) -> list[float]:
    """1 where a rewrite still states everything that the user asked for, else 0."""
    rewrites = [(parse(prompt), parse(rewrite)) for prompt, rewrite in zip(prompts, enhanced_prompts, strict=True)]
    return [float(bool(asked and written and keeps_request(asked, written))) for asked, written in rewrites]


def grammatical(images: Images, prompts: Texts, enhanced_prompts: Texts) -> list[float]:
    """1 where a rewrite is a sentence of the world's grammar, else 0."""
    return [float(parse(rewrite) is not None) for rewrite in enhanced_prompts]


def best_prompt(prompt: str) -> str | None:
    """The oracle's rewrite of a user's prompt; None for a prompt outside the grammar."""
    request = parse(prompt)
    return None if request is None else oracle_caption(request)


def checked_attributes(image: Image.Image, prompt: str) -> dict[str, bool]:
    """attribute → whether the image shows it as the prompt asks; empty for a prompt outside the grammar."""
    request = parse(prompt)
    return {} if request is None else check(image, request)
