"""How the embedded policy rewrites before GRPO: sometimes well, often idly, sometimes harmfully, now and then wrongly.

The policy is trained on these rewrites, so its samples differ and GRPO has something to choose from.
"""

import random
from dataclasses import dataclass, replace

from grpo_kit.shapeworld.captions import GOOD_WORDS, HARMFUL_WORDS, IDLE_WORDS, describe
from grpo_kit.shapeworld.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene


@dataclass(frozen=True)
class RewriteMix:
    """Probabilities of what a rewrite does; the defaults leave the initial policy about as good as no rewrite."""

    wrong_thing: float = 0.14
    wrong_count: float = 0.06
    fill: float = 0.3  # for each attribute that the request leaves open
    no_style: float = 0.3
    harmful_style: float = 0.55  # of the rewrites that name a style
    idle: float = 0.25
    user_words: tuple[tuple[float, float], ...] = ((0.0, 0.25), (0.5, 0.4), (1.0, 0.35))  # (share kept, probability)


def sample_rewrite(request: Scene, rng: random.Random, mix: RewriteMix = RewriteMix()) -> str:
    """One rewrite of a request, in the grammar of `captions`."""
    scene = _fill(_mistake(request, rng, mix), rng, mix)
    shares, weights = zip(*mix.user_words, strict=True)
    clauses = [describe(scene, rng.choices(shares, weights)[0], rng)]
    if rng.random() >= mix.no_style:
        words = HARMFUL_WORDS if rng.random() < mix.harmful_style else GOOD_WORDS
        clauses += rng.sample(words, rng.choice((1, 1, 2)))
    if rng.random() < mix.idle:
        clauses.append(rng.choice(IDLE_WORDS))
    return ", ".join(clauses)


def _mistake(scene: Scene, rng: random.Random, mix: RewriteMix) -> Scene:
    if rng.random() < mix.wrong_thing:
        values = {"colour": tuple(COLOURS), "shape": SHAPES}
        name = rng.choice(tuple(values))
        scene = replace(scene, **{name: rng.choice([v for v in values[name] if v != getattr(scene, name)])})
    if scene.kind != "pair" and rng.random() < mix.wrong_count:
        count = rng.choice([n for n in (1, 2, 3) if n != scene.count])
        scene = replace(scene, count=count, **({} if count == 1 else {"size": None, "place": None}))
    return scene


def _fill(scene: Scene, rng: random.Random, mix: RewriteMix) -> Scene:
    openings = {"background": tuple(BACKGROUNDS)}
    if scene.kind == "single":
        openings |= {"size": SIZES, "place": PLACES}
    chosen = {
        name: rng.choice(values)
        for name, values in openings.items()
        if getattr(scene, name) is None and rng.random() < mix.fill
    }
    return replace(scene, **chosen)
