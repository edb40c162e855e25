"""The arithmetic of the benchmarks about rewards: equal budgets, paired differences, the table's order."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.studies import budget, reward_table


def _write(place: Path, gold: np.ndarray) -> None:
    frame = pd.DataFrame({"prompt_id": range(len(gold)), "gold": gold, "reward": gold, "seed": 0})
    budget.keep(frame.assign(user_prompt="a", variant="trained"), place)


def test_every_arm_of_the_budget_draws_as_many_images() -> None:
    drawn = {}
    for arm in budget.ARMS:
        config = budget.configured("tiny", arm, seed=1, iterations=3)
        training, generation = config.training_settings, config.generation_settings
        drawn[arm] = training.prompts_per_iteration * training.group_size * generation.images_per_prompt
        assert generation.share_seeds != arm.endswith("-own") and training.seed == 1 and training.num_iterations == 3
    assert set(drawn.values()) == {32}, drawn


def test_arms_are_compared_run_by_run_and_prompt_by_prompt(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0.5, 0.2, (3, 40))  # the luck of a seed and a prompt, which the arms share
    for seed, luck in enumerate(noise):
        _write(tmp_path / f"{budget.DEFAULT}_{seed}.parquet", luck)
        _write(tmp_path / f"2x2x8_{seed}.parquet", luck - 0.1)
    table = budget.results(tmp_path, [budget.DEFAULT, "2x2x8"]).set_index("arm")
    row = table.loc["2x2x8"]
    name = "gold less the default's"
    assert row["training seeds"] == 3 and row[name] == pytest.approx(-0.1)
    assert row[f"{name}, low"] == pytest.approx(-0.1) == row[f"{name}, high"], "paired, so shared luck drops out"
    assert row["gold, high"] - row["gold, low"] > 0.05, "which an interval of one arm alone does not know"
    assert name not in table.loc[budget.DEFAULT].dropna()


def test_one_run_has_a_mean_and_no_interval(tmp_path: Path) -> None:
    _write(tmp_path / f"{budget.DEFAULT}_0.parquet", np.array([0.0, 1.0]))
    (row,) = budget.results(tmp_path, [budget.DEFAULT]).to_dict("records")
    assert row["gold"] == 0.5 and "gold, low" not in row


def test_the_reward_table_has_the_best_agreement_first_and_says_what_is_missing() -> None:
    columns = [f"{kind}{end}" for kind in reward_table.INTERVALS for end in ("", ", low", ", high")]
    columns += [*reward_table.SHARES, "ms per image"]
    table = pd.DataFrame(0.25, index=["poor", "good", "unknown"], columns=columns)
    table["rank within"] = [-0.5, 0.75, np.nan]
    lines = reward_table.markdown(table).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [
        "reward",
        lines[1].strip("| "),
        "good",
        "poor",
        "unknown",
    ]
    assert "−0.50" in lines[3] and "–" in lines[4] and len({line.count("|") for line in lines}) == 1
