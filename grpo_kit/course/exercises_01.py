"""Checks of the exercises of 01_prompts: how many pictures a claim needs, and what shared latent seeds save."""

import math
from collections.abc import Callable

import numpy as np

from grpo_kit.course.exercise import exercise, expect


@exercise("01.1", "How many pictures for ± 0.05?", minutes=5, difficulty=1)
def check_pictures_needed(pictures_needed: Callable) -> None:
    """`pictures_needed(deviation, half_width)` for several of both."""
    for s, h in ((0.21, 0.05), (0.13, 0.03), (0.4, 0.07), (0.5, 0.25)):
        n = (2 * s / h) ** 2
        wrong = {
            "rounded down: then two standard errors are a little too large": math.floor(n),
            "one too many where it comes out whole: round up, do not add 1": math.floor(n) + 1,
            "this is not a whole number": n,
            "the square is missing: the error falls with the root of n": math.ceil(2 * s / h),
            "that is for one standard error; asked are two": math.ceil((s / h) ** 2),
            "the square is of s and h together, 2 as well": math.ceil(2 * (s / h) ** 2),
            "`deviation` is s, not the variance s²": math.ceil(4 * s / h**2),
        }
        found = pictures_needed(s, h)
        expect(found, math.ceil(n), f"deviation {s}, half-width {h}", wrong=wrong, tolerance=1e-9)


@exercise("01.2", "What the same noise saves", minutes=10, difficulty=2)
def check_times_as_many(times_as_many: Callable) -> None:
    """`times_as_many(a, b)` for texts that share much luck, little, and that react in opposite ways."""
    for seed, shared in ((0, 3.0), (1, 0.5), (2, -1.0)):
        luck, *own = np.random.default_rng(seed).normal(size=(3, 12))
        a, b = luck + own[0], 0.3 + shared * luck + 0.5 * own[1]
        apart, paired = a.var(ddof=1) + b.var(ddof=1), (b - a).var(ddof=1)
        wrong = {
            "that is the ratio of the standard deviations; pictures go with its square": (apart / paired) ** 0.5,
            "upside down: above 1 the shared seeds save": paired / apart,
            "b's own variance is missing: the variances of both texts add up": a.var(ddof=1) / paired,
            "a's own variance is missing: the variances of both texts add up": b.var(ddof=1) / paired,
            "the standard deviations were added; variances add up": (a.std(ddof=1) + b.std(ddof=1)) ** 2 / paired,
            "that is the variance of a sum of both": (a + b).var(ddof=1) / paired,
        }
        given = f"12 pairs whose correlation is {np.corrcoef(a, b)[0, 1]:.2f}"
        expect(times_as_many(a.copy(), b.copy()), apart / paired, given, wrong=wrong)
