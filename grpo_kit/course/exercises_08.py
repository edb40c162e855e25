"""Checks of the exercises of 08_evaluate: an interval over prompts, and what got worse."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from grpo_kit.config.paths import PROJECT_ROOT
from grpo_kit.course.exercise import exercise, expect


@exercise("08.1", "An interval over prompts, and a wrong one", minutes=10, difficulty=3)
def check_interval(interval: Callable) -> None:
    """`interval(cells, unit)` against the normal interval; its ends, of 4000 draws, within 4 standard errors."""
    for seed, count in ((0, 64), (1, 100)):
        cells = made_cells(np.random.default_rng(seed), count, K=16)  # mean 5; of the mean over prompts: error 1
        alone = float(cells.std() / cells.size**0.5)
        over_prompts, over_pictures = ((5 - 1.96 * error, 5 + 1.96 * error) for error in (1.0, alone))
        ends = np.quantile(cells.mean(axis=1), [0.025, 0.975])
        wrong = {
            "no mean was taken: these are the ends of the values, not of the means of the draws": ends,
            "the mean hardly moves: columns were drawn, not prompts, or rows without replacement": (5.0, 5.0),
            "the mean ± 1 standard error: that is a 68 % interval": (4.0, 6.0),
        }
        given = f"{count} prompts × 16 pictures, unit {{!r}}"
        pictures = {"single pictures were drawn: two pictures of a prompt are not independent": over_pictures}
        found = interval(cells.copy(), "prompts")
        expect(found, over_prompts, given.format("prompts"), wrong=pictures | wrong, tolerance=0.05)
        prompts = {"whole prompts were drawn; the wrong interval draws single cells": over_prompts}
        found = interval(cells.copy(), "pictures")
        expect(found, over_pictures, given.format("pictures"), wrong=prompts | wrong, tolerance=0.05)


def made_cells(rng: np.random.Generator, count: int, K: int, mean: float = 5.0, error: float = 1.0) -> np.ndarray:
    """(count, K) cells whose mean over prompts is `mean`, with exactly this standard error; rows vary little."""
    rows = rng.normal(size=count)
    rows = (rows - rows.mean()) / rows.std() * error * count**0.5
    within = rng.normal(size=(count, K)) * error
    return mean + rows[:, None] + within - within.mean(axis=1, keepdims=True)


@exercise("08.2", "What got worse?", minutes=10, difficulty=2)
def check_got_worse(got_worse: Callable) -> None:
    """`got_worse(differences)` on made scores, on scores of which none fell, and on the recorded evaluation."""
    rng = np.random.default_rng(2)
    in_errors = {"reward": 9.0, "gold": -1.2, "keeps_objects": -6.0, "grammatical": -0.2, "short": 5.0, "clear": -4.0}
    made = {name: made_cells(rng, 80, 9, far, 1.0) / 100 for name, far in in_errors.items()}
    _expect_names(got_worse, made, "six scores")
    _expect_names(got_worse, {name: made[name] for name in ("reward", "gold", "short")}, "three scores")
    path = PROJECT_ROOT / "data" / "demo_run" / "evaluation" / "rows.parquet"
    _expect_names(got_worse, recorded_differences(pd.read_parquet(path)), "the recorded evaluation")


def recorded_differences(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """Each score's (P, K) differences, trained − raw."""
    names = ["reward", *(name for name in rows if name.startswith("reward/"))]
    tables = {name: rows.pivot(index="prompt_id", columns=["variant", "seed"], values=name) for name in names}
    return {name: (table["trained"] - table["raw"]).to_numpy(float) for name, table in tables.items()}


def _expect_names(got_worse: Callable, differences: dict[str, np.ndarray], given: str) -> None:
    """Compare the names with those whose mean lies more than 1.96 standard errors below 0."""

    def below(factor: float, of: Callable[[np.ndarray], np.ndarray]) -> list[str]:
        values = {name: of(cells) for name, cells in differences.items()}
        ends = {name: v.mean() + factor * v.std(ddof=1) / len(v) ** 0.5 for name, v in values.items()}
        return sorted(name for name, end in ends.items() if end < 0)

    right = below(1.96, lambda c: c.mean(axis=1))
    by_prompt = {name: cells.mean(axis=1) for name, cells in differences.items()}
    lowest = min(by_prompt, key=lambda name: by_prompt[name].mean())
    wrong = {
        "a mean below 0 may be chance: the whole interval must lie below 0": below(0, lambda c: c.mean(axis=1)),
        "pictures were counted as independent: the interval is over prompts": below(1.96, np.ravel),
        "these rose: a score got worse where trained − raw is below 0": below(1.96, lambda c: -c.mean(axis=1)),
        "these are the scores whose interval holds or exceeds 0": sorted(set(differences) - set(right)),
        "only the one that fell most; there may be several, or none": [lowest],
    }
    expect(sorted(got_worse(differences)), right, given, wrong=wrong)
