"""The shipped models do what their cards say, and the recorded run learned."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, T5Tokenizer

import grpo_kit as gk
from grpo_kit.config import PROJECT_ROOT
from grpo_kit.experiment import Experiment
from grpo_kit.rewards.clip import ClipSimilarity
from grpo_kit.shapeworld.scene import random_scenes
from tools.moving.captions import corpus as films
from tools.shapeworld import measure
from tools.shapeworld.vocabulary import TEXT_LENGTH, clip_tokenizer, qwen_tokenizer, word_tokenizer
from tools.tones.words import corpus as sounds

SHIPPED = PROJECT_ROOT / "data" / "shapeworld"


def test_generator_obeys_its_best_captions(kit: Experiment) -> None:
    rates = measure.obedience(kit.generator, random_scenes(60, 77, held_out=True, style="clean"))
    assert min(rates[name] for name in ("colour", "count", "background", "size", "place")) > 0.92, rates
    assert rates["shape"] > 0.85 and rates["everything"] > 0.75, rates


def test_reward_model_tells_right_from_nearly_right(kit: Experiment) -> None:
    rates = measure.discernment(kit.rewards.parts["clip_similarity"], count=100, seed=78)
    assert min(rates.values()) >= 0.95, rates


def test_a_reward_model_without_training_does_not(kit: Experiment) -> None:
    """The measure's own check: an untrained model of the same form fails it."""
    from tools.shapeworld.reward_model import new_reward_model

    clip = kit.rewards.parts["clip_similarity"]
    torch.manual_seed(0)
    untrained = new_reward_model(clip.model.vocab_size)
    rates = measure.discernment(ClipSimilarity(untrained, clip.preprocess, clip.tokenizer, clip.device), 100, seed=78)
    assert min(rates.values()) < 0.8, rates


@pytest.mark.slow
def test_the_recorded_policy_beats_where_it_started_and_the_users_own_words() -> None:
    run = PROJECT_ROOT / "data" / "demo_run"
    kit = gk.load_experiment(gk.load_config(run), trained=run / "best")
    prompts = kit.val_prompts[40:60]
    result = gk.evaluate(kit, prompts, compare=("raw", "initial", "trained"), seeds_per_prompt=1).results
    for other in ("raw", "initial"):
        for metric in ("reward", "gold"):
            assert result["differences"][f"trained-{other}"][metric]["low"] > 0, (other, metric)


def test_a_build_that_goes_on_numbers_its_words_as_before() -> None:
    """The library's trainer numbers single letters differently each time; the embeddings must not notice."""
    assert clip_tokenizer().get_vocab() == clip_tokenizer().get_vocab()
    assert qwen_tokenizer().get_vocab() == qwen_tokenizer().get_vocab()


@pytest.mark.parametrize("world", ["moving", "tones"])
def test_every_word_of_a_small_world_is_one_token_of_its_generator(world: str) -> None:
    texts = {"moving": films, "tones": sounds}[world]()
    tokenizer = AutoTokenizer.from_pretrained(PROJECT_ROOT / "data" / world / "generator" / "tokenizer")
    assert tokenizer.get_vocab() == word_tokenizer(texts).get_vocab()
    for text in texts[:1000]:
        assert len(tokenizer(text).input_ids) == len(re.findall(r"\w+|,", text)) + 1 <= TEXT_LENGTH, text
    assert tokenizer.unk_token_id not in tokenizer("a zebra that juggles").input_ids


def test_a_tokenizer_that_is_trained_on_these_words_spells_them_out() -> None:
    """The broken twin: captions became so long that their ends were cut."""
    trained = T5Tokenizer().train_new_from_iterator(films(), vocab_size=320)
    assert max(len(trained(text).input_ids) for text in films()) > TEXT_LENGTH


@pytest.mark.parametrize("name", ["policy", "generator", "clip"])
def test_every_card_names_how_its_model_was_made(name: str) -> None:
    card = json.loads((SHIPPED / name / "card.json").read_text(encoding="utf-8"))
    assert {"command", "seed", "minutes_on_two_cores", "metrics", "sha256", "good_for", "not_good_for"} <= card.keys()


def test_all_weights_together_stay_under_25_megabytes_and_those_of_other_media_under_12() -> None:
    weights = [path for path in Path(PROJECT_ROOT / "data").rglob("*.safetensors") if ".work" not in path.parts]
    media = sum(path.stat().st_size for path in weights if {"moving", "tones"} & {*path.parts})
    assert 0 < media <= 12e6
    assert sum(path.stat().st_size for path in weights) - media <= 25e6
