"""Checks of the exercises of 03_generator: one step along the path from noise to data, and what guidance does to it."""

from collections.abc import Callable

import numpy as np

from grpo_kit.course.exercise import exercise, expect


@exercise("03.1", "One Euler step", minutes=5, difficulty=1)
def check_euler_step(euler_step: Callable) -> None:
    """`euler_step(x, believed, level, following)` for numbers, and for an array like latents."""
    rng = np.random.default_rng(31)
    numbers = [(1.4, -1.0, 1.0, 0.75), (0.2, 1.0, 0.5, 0.0)]
    for x, believed, level, following in [*numbers, (rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), 0.6, 0.35)]:
        way, step = x - believed, following - level
        right = x + step * way / level
        wrong = {
            "the sign is turned: the levels fall, so following - level is negative": x - step * way / level,
            "that is the whole way, to where the model believes the path ends": believed,
            "the way is not divided by the level: the velocity is the way for a whole level": x + step * way,
            "that is the change; the step is added to x": step * way / level,
        }
        expect(euler_step(x, believed, level, following), right, f"levels {level} → {following}, x {x}", wrong=wrong)


@exercise("03.2", "Guidance overshoots", minutes=10, difficulty=3)
def check_guided_end(guided_end: Callable) -> None:
    """`guided_end(x, level, prompt, empty, guidance)`: where a single guided step to level 0 ends."""
    for x, level, prompt, empty, guidance in (
        (0.7, 1.0, 1.0, 0.2, 1.0),
        (0.7, 1.0, 1.0, 0.2, 4.0),
        (-1.3, 0.4, -0.5, 0.1, 2.5),
        (0.9, 0.8, 0.6, -0.6, 0.0),
    ):
        right = empty + guidance * (prompt - empty)
        cut_off = np.clip(right, min(prompt, empty), max(prompt, empty))
        wrong = {
            "the difference is added to the empty prompt's prediction, not to the prompt's": right + prompt - empty,
            "prompt and empty are exchanged": prompt + guidance * (empty - prompt),
            "guidance multiplies the difference of both predictions, not the prompt's own": guidance * prompt,
            "guidance above 1 is not cut off: the step goes past what the prompt predicts": cut_off,
            "the velocity is (x - believed end) / level, and the step goes back by level": x - level * (x - right),
            "that is the guided velocity; the step still has to be made": (x - right) / level,
        }
        given = f"x {x}, level {level}, prompt {prompt}, empty {empty}, guidance {guidance}"
        expect(guided_end(x, level, prompt, empty, guidance), right, given, wrong=wrong)
