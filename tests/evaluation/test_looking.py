"""What looking is worth: the arms are paired, the limits are the world's, and the summary says it (issue: eyes)."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from grpo_kit.config import KitError, load_config
from grpo_kit.evaluation.evaluate import evaluate
from grpo_kit.evaluation.looking import compare_looks, summarize_looks
from grpo_kit.evaluation.table import ARM_NAMES, BEST_OF, BLIND, FIRST, LOOKS, ORACLE
from grpo_kit.experiment import Experiment
from grpo_kit.models.painters import as_read, painter_of
from grpo_kit.show.intervals import looks_plot

SWAPS = {"red": "blue", "blue": "red", "circle": "square", "circles": "squares", "square": "circle"}
SWAPS |= {"squares": "circles"}


@pytest.fixture(scope="module")
def painted(kit: Experiment) -> Experiment:
    settings = {"generation_settings.turns": 2, "model_settings.painters": [{}, SWAPS]}
    few = {"evaluation_settings.paraphrases": False, "evaluation_settings.n_resamples": 200}
    config = load_config(kit.config, settings | few)
    generator = dataclasses.replace(kit.generator, painters=config.model_settings.painters, num_inference_steps=4)
    return dataclasses.replace(kit, config=config, generator=generator)


@pytest.fixture(scope="module")
def rows(painted: Experiment) -> pd.DataFrame:
    return compare_looks(painted, painted.val_prompts[:6], seeds_per_prompt=2)


def test_every_arm_has_the_same_prompts_latents_and_painters(rows: pd.DataFrame):
    assert list(dict.fromkeys(rows["arm"])) == [FIRST, *LOOKS, BEST_OF, ORACLE, BLIND]
    assert set(ARM_NAMES) == set(rows["arm"])
    cells = {arm: part[["prompt_id", "seed", "painter"]].to_numpy().tolist() for arm, part in rows.groupby("arm")}
    assert all(len(found) == 12 and sorted(found) == sorted(cells[FIRST]) for found in cells.values())
    assert set(rows["painter"]) == {0, 1}


def test_best_of_two_is_never_worse_than_the_first_by_its_reward(rows: pd.DataFrame):
    first, best = (rows[rows["arm"] == arm].set_index(["prompt_id", "seed"])["reward"] for arm in (FIRST, BEST_OF))
    assert (best >= first).all() and (best > first).any()


def test_the_oracle_writes_for_the_painter_and_the_blind_one_for_a_single_one(rows: pd.DataFrame):
    oracle, blind = (rows[rows["arm"] == arm] for arm in (ORACLE, BLIND))
    assert oracle["gold"].mean() >= blind["gold"].mean() and oracle["gold"].mean() > 0.9
    for _, same in blind.groupby("prompt_id"):
        assert same["text"].nunique() == 1
    differs = [part["text"].nunique() > 1 for _, part in oracle.groupby("prompt_id") if part["painter"].nunique() > 1]
    assert any(differs)


def test_the_first_pictures_are_those_of_an_evaluation_without_turns(painted: Experiment, rows: pd.DataFrame):
    config = load_config(painted.config, {"generation_settings.turns": 1})
    once = dataclasses.replace(painted, config=config)
    found = evaluate(once, once.val_prompts[:6], compare=("trained",), seeds_per_prompt=2).rows
    assert found["text"].tolist() == rows[rows["arm"] == FIRST]["text"].tolist()
    np.testing.assert_allclose(found["gold"], rows[rows["arm"] == FIRST]["gold"])


def test_an_evaluation_of_two_turns_ends_with_the_own_arms_pictures(painted: Experiment, rows: pd.DataFrame):
    found = evaluate(painted, painted.val_prompts[:6], compare=("raw", "trained", "oracle"), seeds_per_prompt=2)
    last = found.rows[found.rows["variant"] == "trained"]
    assert last["text"].tolist() == rows[rows["arm"] == "own"]["text"].tolist()
    assert found.rows[found.rows["variant"] == "oracle"]["gold"].mean() > 0.9
    assert found.results["looks"] == summarize_looks(found.looks, painted.config.evaluation_settings)
    figure = looks_plot(found.results)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["gold check", "everything right", "reward"]


def test_the_summary_says_how_often_a_right_and_a_wrong_picture_was_kept(painted: Experiment):
    table = pd.DataFrame(
        {
            "arm": np.repeat([FIRST, "own", "grey"], 4),
            "prompt_id": [0, 1, 2, 3] * 3,
            "seed": 0,
            "kept": [False] * 4 + [True, True, False, True] + [False] * 4,
            "first_right": [True, True, True, False] * 3,
            "reward": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.1, 0.1, 0.1, 0.1],
        }
    )
    found = summarize_looks(table, painted.config.evaluation_settings)
    assert found["own"]["kept_when_right"] == pytest.approx(2 / 3) and found["own"]["kept_when_wrong"] == 1.0
    assert found["own"]["less_grey"]["reward"]["mean"] == pytest.approx(0.55)


@pytest.mark.parametrize(("turns", "count", "found"), [(1, 6, "turns 1"), (2, 1, "1 prompts")])
def test_what_cannot_be_compared_is_one_line(painted: Experiment, turns: int, count: int, found: str):
    config = load_config(painted.config, {"generation_settings.turns": turns})
    with pytest.raises(KitError, match=f"looks: found {found}, allowed: at least 2 prompts and .*turns of 2 or more"):
        compare_looks(dataclasses.replace(painted, config=config), painted.val_prompts[:count])


# --- painters ---------------------------------------------------------------------------------------------------------


def test_a_painter_reads_whole_words_and_puts_articles_right():
    swaps = {"red": "orange", "orange": "red", "circle": "square", "square": "circle"}
    assert as_read("a red circle left of an orange ring, sharp", swaps) == "an orange square left of a red ring, sharp"
    assert as_read("scared encircled squares", swaps) == "scared encircled squares"
    assert as_read(as_read("an orange square", swaps), swaps) == "an orange square"
    assert as_read("a  red circle", {}) == "a  red circle"


def test_painters_share_the_latents_evenly_and_each_keeps_its_own():
    drawn = [painter_of(seed, [{}] * 4) for seed in range(4000)]
    assert min(map(drawn.count, range(4))) > 850 and drawn == [painter_of(seed, [{}] * 4) for seed in range(4000)]
