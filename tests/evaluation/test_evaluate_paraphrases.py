"""The same request in other words: a dialect that no training prompt is written in."""

import dataclasses
import json
import random
from pathlib import Path

import pandas as pd
import pytest

from grpo_kit.config import KitError, load_config
from grpo_kit.config.prompts import Prompt
from grpo_kit.evaluation import validation
from grpo_kit.evaluation.conclusions import summarize
from grpo_kit.evaluation.evaluate import evaluate, reword, rewrites
from grpo_kit.evaluation.validation import validate
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator
from grpo_kit.runs.folder import RunFolder
from grpo_kit.shapeworld import captions
from grpo_kit.shapeworld.captions import STYLE_WORDS, describe, paraphrase, parse
from grpo_kit.shapeworld.scene import random_scenes
from tools.shapeworld.captions import leave_open

QUICK = {"evaluation_settings.validation_prompts": 6, "evaluation_settings.n_resamples": 200}
RANDOM = [
    describe(leave_open(scene, 0.5, random.Random(i)), 0.5, random.Random(i))
    for i, scene in enumerate(random_scenes(300, seed=3))
]


@pytest.fixture(scope="module")
def quick(kit: Experiment) -> Experiment:
    """The embedded world with two denoising steps."""
    generator = Generator(kit.generator.pipeline, num_inference_steps=2, guidance_scale=1.0)
    return dataclasses.replace(kit, config=load_config(kit.config, QUICK), generator=generator)


# --- words ------------------------------------------------------------------------------------------------------------


def test_a_paraphrase_asks_for_the_same(kit: Experiment):
    for text in [prompt.user_prompt for prompt in kit.train_prompts + kit.val_prompts] + RANDOM:
        assert parse(paraphrase(text)) == parse(text) and paraphrase(text).lower() != text


def test_a_paraphrase_that_changes_a_colour_is_noticed(monkeypatch: pytest.MonkeyPatch):
    request = parse("a red ball")
    monkeypatch.setattr(captions, "USER_WORDS", captions.USER_WORDS | {"red": "azure"})  # the broken twin
    assert parse(paraphrase("a red ball")) != request


def test_no_paraphrase_is_a_training_prompt_or_is_written_like_one(kit: Experiment):
    train = [prompt.user_prompt for prompt in kit.train_prompts]
    reworded = [paraphrase(prompt.user_prompt) for prompt in kit.val_prompts]
    assert not {text.lower().strip(".") for text in reworded} & set(train)
    assert all(text[0].isupper() and text.endswith(".") for text in reworded)
    assert not any(text[0].isupper() or text.endswith(".") for text in train)
    assert len(set(reworded)) >= 0.95 * len(reworded)


def test_every_word_that_has_another_is_said_in_the_other():
    assert paraphrase("a trio of blue circles") == "Three azure balls."
    assert paraphrase("a crimson ball beside a yellow ring") == "A red circle left of a golden hoop."
    assert (
        paraphrase("an orange plus, on the left, on snow")
        == "A tangerine cross, white background, over on the left side."
    )
    assert paraphrase("A tiny red box, sharp") == "A small crimson square, sharp."
    known = set(captions.USER_WORDS.values()) | set(captions.USER_WORDS)
    for text in RANDOM[:80]:
        scene = parse(text)
        if scene.colour == scene.second_colour or scene.shape == scene.second_shape:
            continue  # "a red box beside a crimson ring" has both words already
        shared = set(paraphrase(text).lower().strip(".").split()) & set(text.replace(",", "").split()) & known
        assert not shared, (text, shared)


def test_style_and_idle_words_stay():
    for word in (*STYLE_WORDS["glitch"], "beautiful"):
        assert word in paraphrase(f"a red circle, {word}")


@pytest.mark.parametrize("text", ["", "a cat", "red", "a red circle, a blue square"])
def test_what_is_outside_the_grammar_has_no_paraphrase(text: str):
    assert paraphrase(text) is None


def test_paraphrases_of_the_prompt_file_go_first_and_prompts_without_any_are_left_out(quick: Experiment):
    prompts = [
        Prompt("a cat on a sofa", metadata={"paraphrases": ["a sofa with a cat", "on the sofa lies a cat"]}),
        Prompt("a dog"),
        Prompt("a red circle"),
        Prompt("a blue ring", metadata={"paraphrases": []}),
    ]
    found = [(i, text) for i, _, text, _ in reword(quick, prompts)]
    assert found == [(0, "a sofa with a cat"), (0, "on the sofa lies a cat"), (2, "A crimson ball.")]
    elsewhere = dataclasses.replace(quick, config=load_config(quick.config, {"evaluation_settings.gold": None}))
    assert [i for i, *_ in reword(elsewhere, prompts)] == [0, 0]


@pytest.mark.parametrize("given", ["a text", [1], [""], {"a": "b"}])
def test_paraphrases_that_are_no_texts_are_one_line(quick: Experiment, given: object):
    with pytest.raises(KitError, match=r"prompt 'a cat': paraphrases: found .*, allowed: a list of texts") as error:
        reword(quick, [Prompt("a cat", metadata={"paraphrases": given})])
    assert "\n" not in str(error.value)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_paraphrases_share_latents_with_their_originals_and_are_judged_by_them(
    quick: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seeds, draw = [], quick.generator.generate_images
    monkeypatch.setattr(
        quick.generator, "generate_images", lambda texts, latents: seeds.append(list(latents)) or draw(texts, latents)
    )
    prompts = [Prompt("a cat"), *quick.val_prompts[:3]]  # the first has no paraphrase: places must not shift
    found = evaluate(quick, prompts, ("raw", "trained", "oracle")[:2], run_dir=tmp_path, seeds_per_prompt=2)
    originals, reworded = seeds[0], seeds[1]
    assert reworded == originals[2::2] and seeds[2] == originals and seeds[3] == reworded
    rows = found.paraphrases
    assert list(rows["prompt_id"]) == [1, 2, 3] * 2 and (rows["seed"] == 0).all()
    asked = rows[rows["variant"] == "trained"]
    assert list(asked["text"]) == rewrites(quick, [Prompt(text) for text in asked["paraphrase"]], "trained")
    assert list(rows["user_prompt"]) == [prompt.user_prompt for prompt in prompts[1:]] * 2
    kept = pd.read_parquet(tmp_path / "evaluation" / "paraphrases.parquet")
    pd.testing.assert_frame_equal(kept, rows, check_dtype=False)
    assert json.loads((tmp_path / "final_results.json").read_text())["paraphrases"]["num_prompts"] == 3


def test_the_comparison_itself_does_not_depend_on_paraphrases(quick: Experiment):
    asked, not_asked = (
        evaluate(quick, quick.val_prompts[:2], seeds_per_prompt=2, paraphrases=wanted) for wanted in (True, False)
    )
    pd.testing.assert_frame_equal(asked.rows, not_asked.rows)
    assert asked.results["differences"] == not_asked.results["differences"]
    assert "paraphrases" not in not_asked.results and not_asked.paraphrases.empty


def test_a_policy_that_understands_only_the_trained_words_is_seen(quick: Experiment):
    rows = pd.DataFrame(
        [
            {
                "prompt_id": i, "user_prompt": f"p{i}", "category": "c", "difficulty": "easy", "variant": variant,
                "seed": seed, "text": f"p{i}", "reward": level + 0.01 * i,
            }
            for variant, level in (("raw", 0.2), ("trained", 0.8)) for i in range(8) for seed in range(2)
        ]
    )  # fmt: skip
    other = rows[rows["seed"] == 0].assign(paraphrase="x")
    other.loc[other["variant"] == "trained", "reward"] -= 0.5
    found = summarize(rows, quick.config.evaluation_settings, other)["paraphrases"]
    assert found["from_originals"]["trained"]["reward"]["mean"] == pytest.approx(-0.5)
    assert found["from_originals"]["raw"]["reward"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert found["differences"]["trained-raw"]["reward"]["mean"] == pytest.approx(0.1)
    twice = pd.concat([other, other.assign(reward=other["reward"] + 0.2)])  # two paraphrases of each prompt
    again = summarize(rows, quick.config.evaluation_settings, twice)["paraphrases"]
    assert again["from_originals"]["trained"]["reward"]["mean"] == pytest.approx(-0.4)


# --- validation -------------------------------------------------------------------------------------------------------


def test_validation_asks_half_of_its_prompts_in_other_words(quick: Experiment, tmp_path: Path):
    found = validate(quick, 0, RunFolder(tmp_path))
    details = found["paraphrases"]
    assert details["num_prompts"] == 3 and found["paraphrase"] == details["reward"]
    asked = [sample["user_prompt"] for sample in details["samples"]]
    assert asked == [prompt.user_prompt for prompt in quick.val_prompts[:6:2]]
    originals = [sample for sample in found["samples"] if sample["user_prompt"] in asked]
    assert details["originals"]["reward"] == pytest.approx(sum(sample["reward"] for sample in originals) / 3)
    assert json.loads((tmp_path / "validation_iter_000000.json").read_text()) == found


def test_validation_without_paraphrases_has_none(quick: Experiment, tmp_path: Path):
    without = dataclasses.replace(quick, config=load_config(quick.config, {"evaluation_settings.paraphrases": False}))
    found, asked = validate(without, 0, RunFolder(tmp_path)), validate(quick, 0, RunFolder(tmp_path))
    assert "paraphrase" not in found and "paraphrases" not in found
    assert found["samples"] == asked["samples"] and found["reward"] == asked["reward"]


def test_half_of_the_prompts_is_a_choice_that_one_name_makes(
    quick: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(validation, "PARAPHRASED", 1)
    assert validate(quick, 0, RunFolder(tmp_path))["paraphrases"]["num_prompts"] == 6
