"""What the policy that looks can do, measured on held-out scenes: the figures on its card."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from grpo_kit.models.conversation import KEEP, Conversation, Turn
from grpo_kit.models.policy import Policy
from grpo_kit.shapeworld.captions import describe, keeps_request, parse
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import Scene, random_scenes
from tools.shapeworld.captions import leave_open
from tools.shapeworld.edits import REDRAW
from tools.shapeworld.eyes import PAINTERS, SKILFUL, Look, drawn_from, edited, sample_look
from tools.shapeworld.rewrites import sample_rewrite

GREY = Image.new("RGB", (32, 32), (127, 127, 127))


def answers(policy: Policy, asked: Sequence[Conversation], seed: int | None = None) -> list[str]:
    """The policy's answer to each conversation: greedy, or sampled by a seed."""
    return policy.sample(asked, 1, seed=seed or 0, greedy=seed is None).texts


def second_turn(look: Look, picture: Image.Image) -> Conversation:
    """What the policy reads before its second answer, with this picture for the one that its first gave."""
    return Conversation(look.prompt, turns=(Turn(look.rewrite, picture),))


def reading(policy: Policy, count: int = 400, seed: int = 50) -> dict[str, float]:
    """Share of held-out pictures for which the greedy rewrite states all that is meant, with the picture and blind."""
    rng, shares = random.Random(seed), {}
    for task in ("redraw", "edit"):
        scenes = random_scenes(count, seed, held_out=True, style="clean")
        meant = [(REDRAW, scene) if task == "redraw" else edited(scene, rng) for scene in scenes]
        pictures = [render(scene, rng) for scene in scenes]
        for name, seen in ((task, pictures), (f"{task}, grey picture", [GREY] * count)):
            asked = [Conversation(words, (one,)) for (words, _), one in zip(meant, seen, strict=True)]
            written = answers(policy, asked)
            shares[name] = _share(_states(one, target) for one, (_, target) in zip(written, meant, strict=True))
    return shares


def looking(policy: Policy, count: int = 400, seed: int = 60) -> dict[str, float]:
    """Share of second answers that state all that the painter needs, by what the policy was shown.

    The first rewrites are in the generator's words, so the picture tells which painter drew it; only the cases count
    in which the painter swaps something of the request, and the first picture is wrong for it.
    """
    looks = [look for look in _looks(count, seed) if look.needed != look.request]
    own = [render(look.shown, random.Random(i)) for i, look in enumerate(looks)]
    arms = {"own picture": own, "another's": own[1:] + own[:1], "grey": [GREY] * len(own)}
    shares = {}
    for name, pictures in arms.items():
        written = answers(policy, list(map(second_turn, looks, pictures)))
        shares[name] = _share(_states(one, look.needed) for one, look in zip(written, looks, strict=True))
    return shares


def keeping(policy: Policy, count: int = 600, seed: int = 70) -> dict[str, float]:
    """Share of "keep it" among sampled second answers, where the picture was right and where it was wrong."""
    rng = random.Random(seed)
    looks = [sample_look(scene, rng) for scene in random_scenes(count, seed, held_out=True)]
    written = answers(policy, [second_turn(look, render(look.shown, rng)) for look in looks], seed=seed)
    kept = {
        right: [w == KEEP for w, look in zip(written, looks, strict=True) if look.is_right is right]
        for right in (True, False)
    }
    others = [parse(one) is not None for one in written if one != KEEP]
    return {"right": _share(kept[True]), "wrong": _share(kept[False]), "grammatical otherwise": _share(others)}


def _looks(count: int, seed: int) -> list[Look]:
    """Held-out second turns after a rewrite in the generator's words that any painter draws as it understands it."""
    rng, looks = random.Random(seed), []
    for scene in random_scenes(count, seed, held_out=True):
        request, painter = leave_open(scene, 0.4, rng), rng.choice(PAINTERS)
        rewrite = sample_rewrite(request, rng, SKILFUL)
        prompt = describe(request, rng.choice((0.0, 0.5, 1.0)), rng)
        looks.append(Look(request, prompt, rewrite, drawn_from(rewrite, painter, rng), painter))
    return looks


def _states(written: str, meant: Scene) -> bool:
    scene = parse(written)
    return scene is not None and keeps_request(replace(meant, style=None), scene)


def _share(found) -> float:
    return float(np.mean(list(found)))
