"""What is concluded from an evaluation's rows, and from two looks during training."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from grpo_kit.config import EvaluationSettings, load_config
from grpo_kit.evaluation.conclusions import summarize, with_metrics
from grpo_kit.evaluation.power import detectable_difference, variance_parts
from grpo_kit.evaluation.validation import validate
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator
from grpo_kit.runs.folder import RunFolder
from grpo_kit.show.summary import comparison_table, detectable_note, direction, evaluation_notes

CATEGORIES = ("animals", "animals", "animals", "places", "places", "numbers")
DIFFICULTIES = ("easy", "hard", "easy", "easy", "hard", "hard")
RAW, TRAINED = 0.3, 0.6


@pytest.fixture(scope="module")
def settings() -> EvaluationSettings:
    return load_config("tiny", {"evaluation_settings.n_resamples": 300}).evaluation_settings


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Twelve prompts, three latents; the trained policy is better by 0.3, and adds the same words to all."""
    rng = np.random.default_rng(0)
    level = rng.normal(0, 0.1, 12)
    gain = {"raw": RAW + np.zeros(12), "trained": TRAINED + rng.normal(0, 0.05, 12)}
    return pd.DataFrame(
        [
            {
                "prompt_id": i,
                "user_prompt": f"thing {i}",
                "category": CATEGORIES[i % 6],
                "difficulty": DIFFICULTIES[i % 6],
                "variant": variant,
                "seed": seed,
                "text": f"thing {i}" + (", sharp and bright" if variant == "trained" else ""),
                "reward": float(reward := level[i] + means[i] + rng.normal(0, 0.05)),
                "reward/clip": reward,
                "reward/quality": reward / 2,
            }
            for variant, means in gain.items()
            for i in range(12)
            for seed in range(3)
        ]
    )


# --- by category and difficulty ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["category", "difficulty"])
def test_each_stratum_has_the_means_intervals_and_number_of_its_prompts(
    rows: pd.DataFrame, settings: EvaluationSettings, column: str
):
    found = summarize(rows, settings)["strata"][column]
    assert set(found) == set(rows[column]) and sum(part["num_prompts"] for part in found.values()) == 12
    for value, part in found.items():
        alone = summarize(rows[rows[column] == value], settings)
        assert part["num_prompts"] == alone["num_prompts"]
        assert part["variants"] == alone["variants"]
        assert part["differences"]["trained-raw"] == alone["differences"]["trained-raw"]


def test_a_stratum_of_one_prompt_has_no_interval(rows: pd.DataFrame, settings: EvaluationSettings):
    few = rows[rows["prompt_id"].isin([0, 1, 5])]
    found = summarize(few, settings)["strata"]["category"]
    one = found["numbers"]["variants"]["raw"]["reward"]
    assert found["numbers"]["num_prompts"] == 1 and one["low"] is None and one["mean"] is not None
    assert found["animals"]["variants"]["raw"]["reward"]["low"] is not None
    assert direction(found["numbers"]["differences"]["trained-raw"]["reward"]) == "unclear"


# --- metrics, diversity, what could be detected -----------------------------------------------------------------------


def test_every_part_is_a_metric_unless_it_is_the_whole_reward(rows: pd.DataFrame, settings: EvaluationSettings):
    assert with_metrics(rows)[1] == ["reward", "quality"]
    found = summarize(rows, settings)
    mean = found["variants"]["trained"]
    assert mean["quality"]["mean"] == pytest.approx(mean["reward"]["mean"] / 2)
    other = rows.assign(**{"reward/clip": rows["reward"] + 1})
    assert with_metrics(other)[1] == ["reward", "clip", "quality"]


def test_the_suffix_that_all_rewrites_get_stands_in_the_results(rows: pd.DataFrame, settings: EvaluationSettings):
    found = summarize(rows, settings)
    assert found["diversity"]["trained"]["suffix"] == "sharp and bright" and "raw" not in found["diversity"]
    assert "100 % of the trained policy's rewrites end in “sharp and bright”" in " ".join(evaluation_notes(found))


def test_what_could_be_detected_is_computed_from_the_pairs(rows: pd.DataFrame, settings: EvaluationSettings):
    found = summarize(rows, settings)["detectable"]
    wide = rows.pivot(index="prompt_id", columns=["variant", "seed"], values="reward")
    parts = variance_parts((wide["trained"] - wide["raw"]).to_numpy())
    told = found["differences"]["trained-raw"]["reward"]
    assert found["power"] == 0.8 and told["difference"] == pytest.approx(detectable_difference(parts))
    assert told["with_one_seed"] > told["difference"] > told["with_twice_the_seeds"] > told["with_endless_seeds"]
    assert told["with_twice_the_prompts"] == pytest.approx(detectable_difference(parts, 24))
    assert told["difference"] < 0.3  # this effect is plain to see
    unpaired = np.sqrt(sum(wide[v].mean(axis=1).var(ddof=1) for v in ("raw", "trained")) / 12)
    assert told["standard_error"] < 0.6 * unpaired  # a twin that forgets the pairs sees far less


def test_one_latent_says_that_it_does_not_know_what_more_would_bring(rows: pd.DataFrame, settings: EvaluationSettings):
    found = summarize(rows[rows["seed"] == 0], settings)
    told = found["detectable"]["differences"]["trained-raw"]["reward"]
    assert told["seed_variance"] is None and told["with_twice_the_seeds"] is None and told["with_twice_the_prompts"] > 0
    assert "images of each" not in detectable_note(found) and "twice the prompts" in detectable_note(found)


def test_the_table_ends_with_what_the_evaluation_can_see(rows: pd.DataFrame, settings: EvaluationSettings):
    found = summarize(rows, settings)
    size = found["detectable"]["differences"]["trained-raw"]["reward"]["difference"]
    table = comparison_table(found)
    assert f"from {size:.3f} on" in " ".join(table.split()) and max(map(len, table.splitlines())) <= 90
    assert "images better than raw" in table


def test_results_without_the_newer_parts_are_read_as_before(rows: pd.DataFrame, settings: EvaluationSettings):
    whole = summarize(rows, settings)
    old = {"num_prompts", "seeds_per_prompt", "confidence", "variants", "differences", "by_category", "success_rate"}
    table = comparison_table({key: whole[key] for key in old})
    assert "trained − raw" in table and "is found with" not in table and comparison_table(whole).startswith(table[:200])
    assert evaluation_notes({}) == [] == evaluation_notes({key: whole[key] for key in old})


def test_results_are_what_a_file_can_hold(rows: pd.DataFrame, settings: EvaluationSettings):
    holed = rows.assign(**{"reward/quality": np.nan})
    found = summarize(holed, settings)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["variants"]["raw"]["quality"]["mean"] is None


def test_an_evaluation_that_could_score_nothing_says_so_and_no_more(rows: pd.DataFrame, settings: EvaluationSettings):
    found = summarize(rows.assign(reward=np.nan), settings, rows[rows["seed"] == 0])
    assert (found["num_prompts"], found["excluded_cells"]) == (0, 36)
    assert set(found["differences"]["trained-raw"]["reward"].values()) == {None}
    assert found["paraphrases"]["from_originals"]["trained"]["reward"]["mean"] is None
    assert found["diversity"]["trained"]["suffix"] == "sharp and bright"
    assert "trained − raw" in comparison_table(found)


# --- two looks during training ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(kit: Experiment) -> Experiment:
    """Six prompts, two denoising steps, a policy of its own."""
    generator = Generator(kit.generator.pipeline, num_inference_steps=2, guidance_scale=1.0)
    changes = {
        "evaluation_settings.validation_prompts": 6,
        "evaluation_settings.n_resamples": 200,
        "evaluation_settings.paraphrases": False,
    }
    config = load_config(kit.config, changes)
    return dataclasses.replace(kit, config=config, generator=generator, policy=copy.deepcopy(kit.policy))


@pytest.fixture(scope="module")
def looks(quick: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, Path]:
    """A validation before and one after the policy was changed."""
    folder = tmp_path_factory.mktemp("looks")
    first = validate(quick, 0, RunFolder(folder))
    with torch.no_grad():
        for parameter in quick.policy.trainable_parameters():
            parameter.mul_(1.5)
    return first, validate(quick, 20, RunFolder(folder)), folder


def test_a_validation_compares_itself_with_the_first_prompt_by_prompt(looks: tuple[dict, dict, Path]):
    first, second, _ = looks
    assert "since_start" not in first
    change = [b["reward"] - a["reward"] for a, b in zip(first["samples"], second["samples"], strict=True)]
    told = second["since_start"]
    assert told["differences"]["reward"]["mean"] == pytest.approx(np.mean(change))
    assert told["success"]["reward"]["mean"] == np.mean(np.array(change) > 1e-9)
    assert set(told["differences"]) == {"reward", "clip_similarity", "gold", "keeps_objects", "grammatical"}


def test_a_validation_has_counts_intervals_and_diversity(looks: tuple[dict, dict, Path]):
    found, _, folder = looks
    for name in ("by_category", "by_difficulty"):
        parts = found[name]
        assert sum(part["num_prompts"] for part in parts.values()) == 6
        weighted = sum(part["num_prompts"] * part["reward"] for part in parts.values()) / 6
        assert weighted == pytest.approx(found["reward"])
    told = found["intervals"]["reward"]
    assert told["mean"] == pytest.approx(found["reward"]) and told["low"] < told["mean"] < told["high"]
    assert found["diversity"] == found["rewrites"]["added_distance"] > 0
    assert json.loads((folder / "validation_iter_000000.json").read_text()) == found


def test_a_look_that_is_taken_again_is_the_same_bytes(
    quick: Experiment, looks: tuple[dict, dict, Path], tmp_path: Path
):
    folder = Path(
        shutil.copytree(looks[2], tmp_path / "run")
    )  # continued: it looks again, the files of before are there
    before = (folder / "validation_iter_000020.json").read_bytes()
    validate(quick, 20, RunFolder(folder))
    assert (folder / "validation_iter_000020.json").read_bytes() == before
    assert "since_start" not in validate(quick, 0, RunFolder(folder))  # nothing came before the first look


def test_a_first_look_at_other_prompts_is_not_compared_with(quick: Experiment, tmp_path: Path):
    fewer = load_config(quick.config, {"evaluation_settings.validation_prompts": 3})
    validate(dataclasses.replace(quick, config=fewer), 0, RunFolder(tmp_path))
    assert "since_start" not in validate(quick, 20, RunFolder(tmp_path))
