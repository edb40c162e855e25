"""What the embedded models can do, measured on held-out scenes: the figures on their cards."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from grpo_kit.models.generator import Generator
from grpo_kit.models.policy import Policy
from grpo_kit.rewards.clip import ClipSimilarity
from grpo_kit.shapeworld.captions import describe, keeps_request, oracle_caption, parse
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import STYLES, Scene, random_scenes
from grpo_kit.shapeworld.verify import check
from tools.shapeworld.captions import leave_open
from tools.shapeworld.pictures import change_one


def obedience(generator: Generator, scenes: Sequence[Scene]) -> dict[str, float]:
    """`attribute_rates` of pictures drawn from complete scenes' own best captions."""
    images = generator.generate_images([oracle_caption(scene) for scene in scenes], range(len(scenes)))
    return attribute_rates(images, scenes)


def attribute_rates(images: Sequence[Image.Image | None], scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of pictures on which each stated attribute holds, and "everything"; a blank picture shows nothing."""
    held: dict[str, list[bool]] = defaultdict(list)
    for image, scene in zip(images, scenes, strict=True):
        result = check(image or Image.new("RGB", (32, 32)), scene)
        for name, holds in result.items():
            held[name].append(holds)
        held["everything"].append(all(result.values()))
    return {name: float(np.mean(values)) for name, values in held.items()}


def verifier_accuracy(count: int = 2000, seed: int = 20) -> dict[str, dict[str, float]]:
    """How often the verifier reads each attribute right, by style of rendering; "clean" counts as right when denied."""
    rng = random.Random(seed)
    table = {}
    for style in STYLES:
        scenes = random_scenes(count, seed, style=style)
        rates = attribute_rates([render(scene, rng) for scene in scenes], scenes)
        if style != "clean":
            rates["clean"] = 1 - rates["clean"]
            del rates["everything"]
        table[style] = rates
    return table


def discernment(clip: ClipSimilarity, count: int = 1000, seed: int = 30) -> dict[str, float]:
    """Of the reward model, on held-out scenes.

    "caption_among_100": share of pictures whose own caption scores highest among 100. The others: share of pairs in
    which a picture of the scene scores above one that is wrong in that attribute (or spoiled), against the same prompt,
    which states everything but the style; half of the prompts are in each dialect.
    """
    rng = random.Random(seed)
    scenes = random_scenes(count, seed, held_out=True, style="clean")
    texts = [describe(scene, rng.choice(("generator", "user"))) for scene in scenes]
    right = [render(scene, rng) for scene in scenes]
    own = clip(right, texts, texts)
    result = {"caption_among_100": _own_caption_first(clip, scenes, right, texts)}
    for attribute in ("colour", "shape", "count", "size", "place", "background", "style"):
        rows = [i for i, scene in enumerate(scenes) if _can_change(scene, attribute)]
        wrong = [render(change_one(scenes[i], rng, attribute), rng) for i in rows]
        scores = clip(wrong, [texts[i] for i in rows], texts)
        result["spoiled" if attribute == "style" else attribute] = float((own[rows] > scores).float().mean())
    return result


def _can_change(scene: Scene, attribute: str) -> bool:
    return getattr(scene, attribute) is not None and not (attribute == "count" and scene.kind == "pair")


def _own_caption_first(
    clip: ClipSimilarity, scenes: Sequence[Scene], images: Sequence[Image.Image], texts: Sequence[str]
) -> float:
    """Share of pictures whose best caption among 100 is of their scene (two dialects may describe the same one)."""
    pictures, captions = clip.encode_images(images), clip.encode_texts(texts)
    hits = []
    for start in range(0, len(texts) - 99, 100):
        block = slice(start, start + 100)
        best = (pictures[block] @ captions[block].T).argmax(dim=1).tolist()
        hits += [scenes[start + b] == scenes[start + i] for i, b in enumerate(best)]
    return float(np.mean(hits))


def manners(policy: Policy, count: int = 200, seed: int = 40) -> dict[str, float]:
    """Of the initial policy: share of sampled rewrites that end, are grammatical, and keep the request."""
    rng = random.Random(seed)
    requests = [replace(leave_open(scene, 0.4, rng)) for scene in random_scenes(count, seed, held_out=True)]
    prompts = [describe(request, 0.5, rng) for request in requests]
    sampled = policy.sample(prompts, 4, seed=seed)
    read = [parse(text) for text in sampled.texts]
    kept = [rewrite is not None and keeps_request(requests[i // 4], rewrite) for i, rewrite in enumerate(read)]
    ends = torch.tensor(policy.eos_token_ids)
    return {
        "ends": float((torch.isin(sampled.ids, ends) & sampled.mask).any(dim=1).float().mean()),
        "grammatical": float(np.mean([rewrite is not None for rewrite in read])),
        "keeps_request": float(np.mean(kept)),
        "mean_tokens": float(sampled.mask.sum(dim=1).float().mean()),
    }
