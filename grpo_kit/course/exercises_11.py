"""Checks of the exercises of 11_eyes: what looking is worth, and a fourth way to share an episode's rewards."""

from collections.abc import Callable

import numpy as np

from grpo_kit.course.exercise import WrongAnswer, exercise, expect


@exercise("11.1", "What is looking worth?", minutes=10, difficulty=2)
def check_worth(worth: Callable) -> None:
    """Both ceilings for tables of several shapes, with painters who draw equally often, and not."""
    tables = {
        "painters who draw equally often": ([[0.5, 0.7], [0.2, 0.9]], [0.5, 0.5]),
        "chances 0.7 and 0.3": ([[0.8, 0.1], [0.2, 0.9]], [0.7, 0.3]),
        "three prompts for two painters": ([[0.9, 0.0], [0.0, 0.8], [0.7, 0.6]], [0.4, 0.6]),
        "a prompt written for one that suits another better": ([[0.3, 0.9], [0.5, 0.2]], [0.5, 0.5]),
    }
    for given, (rows, chances) in tables.items():
        M, p = np.array(rows), np.array(chances)
        found = worth(M.copy(), p.copy())
        if np.shape(found) != (2,):
            raise WrongAnswer(f"for {given}: expected two numbers, found {found!r}")
        diagonal = (np.diag(M[: len(p)]) * p).sum()
        looking, blind = (M.max(axis=0) * p).sum(), (M @ p).max()
        wrong = {
            "the chances are missing": M.max(axis=0).mean(),
            "the best prompt for a painter need not be the one on the diagonal": diagonal,
            "who looks chooses in each column, not in each row": float(M.max(axis=1).mean()),
        }
        expect(found[0], looking, f"{given}, with a look", wrong=wrong)
        wrong = {
            "the chances are missing": M.mean(axis=1).max(),
            "who does not look chooses one prompt for all: the mean comes before the maximum": looking,
            "the mean of all rows is no choice: take the best row": (M @ p).mean(),
        }
        expect(found[1], blind, f"{given}, without a look", wrong=wrong)


@exercise("11.2", "A fourth way to give credit", minutes=10, difficulty=3)
def check_best_to_come(best_to_come: Callable) -> None:
    """Episodes of one to four turns, with pictures that were not scored."""
    nan = np.nan
    for rewards, expected in (
        ([[0.2, 0.7, 0.4], [0.9, 0.1, 0.5]], [[0.7, 0.7, 0.4], [0.9, 0.5, 0.5]]),
        ([[0.3], [0.6]], [[0.3], [0.6]]),
        ([[-0.4, -0.2, -0.9, -0.3]], [[-0.2, -0.2, -0.3, -0.3]]),
        ([[0.2, nan, 0.4], [nan, 0.1, nan]], [[0.4, 0.4, 0.4], [0.1, 0.1, nan]]),
    ):
        r, turns = np.array(rewards), len(rewards[0])
        backwards = r[:, ::-1]
        wrong = {
            "the maximum runs from the left: these are the best so far": np.maximum.accumulate(r, axis=1),
            "a turn is given what comes after it, not what came before": np.tile(r.max(axis=1, keepdims=True), turns),
            "this is the reward of the last picture for all": np.tile(r[:, -1:], turns),
            "a NaN took the others with it: np.fmax leaves it out": np.maximum.accumulate(backwards, axis=1)[:, ::-1],
            "what was not scored is no 0": np.maximum.accumulate(np.nan_to_num(backwards), axis=1)[:, ::-1],
        }
        expect(best_to_come(r.copy()), np.array(expected), f"rewards {rewards}", wrong=wrong)
