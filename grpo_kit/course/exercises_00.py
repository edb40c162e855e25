"""The exercises of notebook 00: advantages by hand, and an order of rewrites before the reward gives one."""

from collections.abc import Callable
from typing import Any

import numpy as np

from grpo_kit.course.exercise import WrongAnswer, exercise, expect


@exercise("00.1", "Four advantages, and a group that agrees", minutes=5, difficulty=1)
def four_advantages(advantages: Callable) -> None:
    """`advantages(rewards)`: the rewards of one group → as many advantages."""
    drawn = np.random.default_rng(1).uniform(-1, 1, 6).round(2).tolist()
    for rewards in ([0.8, 0.6, 0.4, 0.2], [0.1, 0.9], [-0.3, 0.3, 0.0, 0.0, 0.5], drawn, [0.7] * 4, [0.0, 0.0]):
        centred, deviation = np.array(rewards) - np.mean(rewards), float(np.std(rewards, ddof=1))
        wrong = {
            "the standard deviation of a group divides by G − 1, not by G": centred / (np.std(rewards) + 1e-4),
            "the range, highest less lowest, is no standard deviation": centred / (np.ptp(rewards) + 1e-4),
            "the standard deviation is the square root of the variance": centred / (deviation**2 + 1e-4),
            "the division by the standard deviation is missing": centred,
            "the mean of the group is not subtracted": np.array(rewards) / (deviation + 1e-4),
            "the sign is turned round: the better reward gets the higher advantage": -centred / (deviation + 1e-4),
            "0 divided by 0: a group that agrees needs the small term": np.full(len(rewards), np.nan),
        }
        try:
            with np.errstate(invalid="ignore", divide="ignore"):
                found = advantages(list(rewards))
        except ZeroDivisionError:
            found = np.full(len(rewards), np.nan)
        expect(found, centred / (deviation + 1e-4), f"rewards {rewards}", wrong=wrong, tolerance=2e-3)


@exercise("00.2", "Rank eight rewrites before CLIP does", minutes=5, difficulty=1)
def rank_rewrites(ranking: Callable, rewards: Any) -> str:
    """`ranking()`: the pictures' numbers, the best first; each order is accepted, and compared with the rewards."""
    rewards = np.asarray(rewards, dtype=float)
    found, every = np.asarray(ranking()).tolist(), list(range(len(rewards)))
    numbers = sorted(found) if isinstance(found, list) and all(isinstance(one, (int, float)) for one in found) else []
    if numbers != every:
        ideas = {
            "the first picture has the number 0, not 1": numbers == [number + 1 for number in every],
            "these are scores; the pictures' numbers are asked for, the best first": any(n % 1 for n in numbers),
            "a number stands twice": len(set(numbers)) < len(numbers),
            "pictures are missing": len(numbers) < len(every),
        }
        idea = next((name for name, holds in ideas.items() if holds), None)
        raise WrongAnswer(f"for {len(every)} pictures: expected each of {every} once, found {found!s:.80}", idea)
    pairs = [(a, b) for place, a in enumerate(found) for b in found[place + 1 :] if rewards[a] != rewards[b]]
    agree = sum(rewards[a] > rewards[b] for a, b in pairs)
    turned = ". Is your list from the worst to the best?" if 4 * agree < len(pairs) else ""
    first = f"CLIP puts picture {int(np.nanargmax(rewards))} first, you put picture {int(found[0])}"
    return f"CLIP agrees with you on {agree} of {len(pairs)} pairs (chance: {len(pairs) / 2:g}); {first}{turned}"
