"""`grpo-kit plan --drafts`: how well few steps and latents rank rewrites, beside a judge that draws with all."""

import hashlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from grpo_kit import cli
from grpo_kit.config import load_config
from grpo_kit.experiment import Experiment
from grpo_kit.preflight import drafts
from grpo_kit.rewards.composition import Rewards


def by_words(images, prompts, enhanced_prompts):
    """A reward that no latent changes: the rewrite's own number."""
    return [int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 2**24 for text in enhanced_prompts]


def by_pixels(images, prompts, enhanced_prompts):
    """A reward that is different noise for each picture."""
    return [int(hashlib.sha256(image.tobytes()).hexdigest()[:6], 16) / 2**24 for image in images]


def always_same(images, prompts, enhanced_prompts):
    return [1.0] * len(images)


def measured(kit: Experiment, reward, count: int) -> pd.DataFrame:
    own = replace(kit, rewards=Rewards({"own": reward}, {"own": 1.0}))
    return drafts.rank_agreement(own, kit.train_prompts[:count])


@pytest.fixture(scope="module")
def words(kit: Experiment) -> pd.DataFrame:
    return measured(kit, by_words, count=1)


@pytest.fixture(scope="module")
def noise(kit: Experiment) -> pd.DataFrame:
    return measured(kit, by_pixels, count=4)


def test_a_reward_of_the_words_is_ranked_alike_by_any_draft(words: pd.DataFrame):
    assert set(words["steps"]) == {1, 2, 4, 8} and set(words["latents"]) == {1, 2, 3}
    assert words["agreement"].tolist() == pytest.approx([1.0] * len(words))


def test_the_price_grows_with_steps_and_latents(words: pd.DataFrame):
    seconds = words.set_index(["steps", "latents"])["seconds"]
    assert seconds[8, 1] > seconds[1, 1]
    assert seconds[2, 3] == pytest.approx(3 * seconds[2, 1])


@pytest.mark.slow
def test_noise_is_ranked_by_no_draft_since_the_judge_sees_other_latents(noise: pd.DataFrame):
    assert (noise["low"] <= noise["agreement"]).all() and (noise["agreement"] <= noise["high"]).all()
    assert noise["agreement"].abs().max() < 0.6 and abs(noise["agreement"].mean()) < 0.3
    # with the judge's own latents a draft with all steps and three of them would agree with noise, too
    assert abs(noise.set_index(["steps", "latents"])["agreement"][8, 3]) < 0.5


def test_failed_pictures_and_equal_rewards():
    rewards, judge = np.random.default_rng(0).random((2, 5, 6)), np.arange(10.0).reshape(2, 5)
    rewards[0] = judge[0][:, None]
    rewards[0, 2, 4] = np.nan  # its row is left out
    rewards[1] = 1.0
    assert drafts._agreement(rewards, judge, 2).tolist() == pytest.approx([1.0, 0.0])
    rewards[0] = np.nan
    assert np.isnan(drafts._agreement(rewards, judge, 2)[0])


def test_the_best_settings_cost_no_more_than_todays():
    table = pd.DataFrame(
        {"steps": steps, "latents": n, "agreement": value, "low": 0.0, "high": 1.0, "seconds": n * price}
        for steps, price, values in ((2, 1.0, (0.3, 0.5, 0.6)), (4, 2.0, (0.4, 0.7, 0.9)), (8, 4.0, (0.45, 0.8, 0.95)))
        for n, value in enumerate(values, start=1)
    )
    config = load_config("tiny", {"generation_settings.rollout_steps": 4})
    text = drafts.in_words(table, config)
    assert "today: steps 4, latents 1, 2 s a rewrite" in text
    assert text.endswith(
        "agreement 0.50 with -o generation_settings.rollout_steps=2 -o generation_settings.images_per_prompt=2"
    )
    dearer = load_config("tiny", {"generation_settings.rollout_steps": None})
    assert "rollout_steps=4 -o generation_settings.images_per_prompt=2" in drafts.in_words(table, dearer)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, kit: Experiment):
    monkeypatch.setattr(drafts, "PROMPTS", 2)
    monkeypatch.setattr(drafts, "load_experiment", lambda config: replace(kit, config=config))
    with pytest.raises(SystemExit) as done:
        cli.main(["plan", "--profile", "tiny", "--drafts", "-o", "training_settings.group_size=4"])
    lines = capsys.readouterr().out.splitlines()
    assert not done.value.code and lines[0] == "2 prompts, 4 rewrites each, judged by 6 other latents with all 8 steps"
    assert lines[2].startswith("steps  latents  rank agreement") and len(lines) == 17
    with pytest.raises(SystemExit):
        cli.main(["plan", "--profile", "tiny", "--drafts", "--device", "t4"])
    assert "--drafts: found with --device" in capsys.readouterr().err


def test_rewards_that_rank_nothing_are_an_error(monkeypatch: pytest.MonkeyPatch, kit: Experiment):
    own = replace(kit, rewards=Rewards({"own": always_same}, {"own": 1.0}))
    monkeypatch.setattr(drafts, "PROMPTS", 2)
    monkeypatch.setattr(drafts, "load_experiment", lambda config: replace(own, config=config))
    with pytest.raises(drafts.KitError, match="found no group whose rewards differ"):
        drafts.drafts_text(load_config("tiny", {"training_settings.group_size": 2}))
