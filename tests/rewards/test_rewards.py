"""Rewards: what CLIP looks at, how parts add up, and what a reward may return (CORRECTNESS.md T16, T18)."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from support.broken_twins import broken_versions

from grpo_kit.config import load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.experiment import Experiment
from grpo_kit.rewards.clip import ClipSimilarity, load_clip_similarity
from grpo_kit.rewards.composition import Reward, RewardError, Rewards
from grpo_kit.rewards.gold import best_prompt, checked_attributes, gold, grammatical, keeps_objects
from grpo_kit.rewards.loading import load_rewards
from grpo_kit.shapeworld.captions import parse
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import random_scenes

TEXTS = ["a red circle", "two blue crosses, on snow", "a tiny rosy hoop"]
IMAGES = [render(scene) for scene in random_scenes(3, seed=0, style="clean")]


@pytest.fixture(scope="module")
def clip(kit: Experiment) -> ClipSimilarity:
    return kit.rewards.parts["clip_similarity"]


@pytest.fixture
def own_clip(clip: ClipSimilarity) -> ClipSimilarity:
    """The same model with a count and features of its own."""
    return ClipSimilarity(clip.model, clip.preprocess, clip.tokenizer, clip.device)


def brightness(images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(image).mean()) / 255 for image in images]


def words(images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]) -> np.ndarray:
    return np.array([len(text.split()) for text in enhanced_prompts])


# --- CLIP similarity --------------------------------------------------------------------------------------------------


def scores_the_rewrite(clip: ClipSimilarity) -> Reward:
    return lambda images, prompts, enhanced_prompts: clip(images, enhanced_prompts, prompts)


def scores_both(clip: ClipSimilarity) -> Reward:
    return lambda images, prompts, enhanced_prompts: (
        clip(images, prompts, prompts) + clip(images, enhanced_prompts, enhanced_prompts)
    )


def _looks_at_the_users_prompt_alone(reward: Reward) -> bool:
    """With the pictures fixed: whether the rewrites change nothing, and the users' prompts something."""
    rewards = Rewards({"it": reward}, {"it": 1.0})
    scores = rewards(IMAGES, TEXTS, TEXTS)
    others = [["masterpiece, sharp", "", "a red circle " * 40], TEXTS[::-1]]
    fixed = all(torch.equal(scores, rewards(IMAGES, TEXTS, rewrites)) for rewrites in others)
    return fixed and not torch.equal(scores, rewards(IMAGES, TEXTS[::-1], TEXTS))


@pytest.mark.trap("T18")
def test_clip_looks_at_the_users_prompt_and_not_at_the_rewrite(clip: ClipSimilarity):
    assert _looks_at_the_users_prompt_alone(clip)


@pytest.mark.parametrize("mutant", broken_versions({scores_the_rewrite: "T18", scores_both: "T18"}))
def test_reward_that_looks_at_the_rewrite_is_noticed(clip: ClipSimilarity, mutant: Callable[[ClipSimilarity], Reward]):
    assert not _looks_at_the_users_prompt_alone(mutant(clip))


def test_clip_is_the_cosine_of_open_clips_own_embeddings(clip: ClipSimilarity, kit: Experiment):
    import open_clip

    name = f"local-dir:{kit.config.model_settings.clip_model}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    with torch.no_grad():
        pictures = model.eval().encode_image(torch.stack([preprocess(image) for image in IMAGES]))
        texts = model.encode_text(open_clip.get_tokenizer(name)(TEXTS))
    torch.testing.assert_close(clip(IMAGES, TEXTS, TEXTS), torch.cosine_similarity(pictures, texts), rtol=0, atol=1e-5)


def test_a_score_is_the_same_alone_in_a_batch_and_again(own_clip: ClipSimilarity):
    together = own_clip(IMAGES, TEXTS, TEXTS)
    alone = [own_clip([image], [text], [text])[0] for image, text in zip(IMAGES, TEXTS, strict=True)]
    torch.testing.assert_close(torch.stack(alone), together, rtol=0, atol=1e-5)
    assert torch.equal(own_clip(IMAGES, TEXTS, TEXTS), together)


def test_kept_features_do_not_depend_on_the_texts_beside_them(own_clip: ClipSimilarity, clip: ClipSimilarity):
    texts = [f"{text}, {word}" for text in TEXTS for word in ("sharp", "crisp", "soft", "vintage")]
    together = own_clip.encode_texts(texts)
    alone = ClipSimilarity(clip.model, clip.preprocess, clip.tokenizer, clip.device)
    assert torch.equal(together, torch.cat([alone.encode_texts([text]) for text in texts]))


def test_the_right_picture_scores_above_the_others(clip: ClipSimilarity):
    prompts = ["a red circle", "a blue square", "three green rings", "a pink cross"]
    images = [render(parse(best_prompt(prompt))) for prompt in prompts]
    table = clip.encode_images(images) @ clip.encode_texts(prompts).T
    assert torch.equal(table.argmax(dim=0), torch.arange(4)) and torch.equal(table.argmax(dim=1), torch.arange(4))


def test_a_spoiled_picture_scores_below_the_clean_one(clip: ClipSimilarity):
    clean = "a large red circle, in the center, white background, sharp"
    scene = parse(clean)
    prompts = ["a crimson ball"] * 4
    images = [render(scene)] + [render(parse(clean.replace("sharp", word))) for word in ("soft", "faded", "glitch")]
    scores = clip(images, prompts, prompts)
    assert (scores[0] > scores[1:]).all()


def test_each_text_is_encoded_once(own_clip: ClipSimilarity, monkeypatch: pytest.MonkeyPatch):
    asked, encode = [], own_clip.model.encode_text
    monkeypatch.setattr(own_clip.model, "encode_text", lambda ids, **k: asked.extend(ids.tolist()) or encode(ids, **k))
    for _ in range(3):
        own_clip(IMAGES, [TEXTS[0], TEXTS[1], TEXTS[0]], TEXTS)
    assert asked == own_clip.tokenizer(TEXTS[:2]).tolist()


@pytest.mark.trap("T18")
def test_text_that_is_too_long_is_counted_and_reported(own_clip: ClipSimilarity, caplog: pytest.LogCaptureFixture):
    longest = "three tiny golden pyramids over on the left side at night"
    long = ", ".join(TEXTS * 12)
    with caplog.at_level(logging.WARNING, "grpo_kit"):
        own_clip.encode_texts([*TEXTS, longest])
        assert own_clip.truncated == 0 and not caplog.records
        own_clip.encode_texts([long, TEXTS[0]])
        own_clip.encode_texts([f"{long}, sharp"])
    assert own_clip.truncated == 2
    assert len(caplog.records) == 1 and "was cut" in caplog.text


@pytest.mark.trap("T18", broken="cut_silently")
def test_text_that_is_cut_silently_is_noticed(own_clip: ClipSimilarity, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ClipSimilarity, "_count_truncated", lambda *args: None)
    with pytest.raises(AssertionError):
        test_text_that_just_fits_is_not_counted(own_clip)


@pytest.mark.trap("T18")
def test_text_that_just_fits_is_not_counted(own_clip: ClipSimilarity):
    own_clip.encode_texts([" ".join(["red"] * 22)])  # and a start and an end: 24 tokens
    assert own_clip.truncated == 0
    own_clip.encode_texts([" ".join(["red"] * 23)])
    assert own_clip.truncated == 1


def test_clip_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ModelError, match="clip_model: could not load") as error:
        load_clip_similarity(str(tmp_path), None, torch.device("cpu"))
    assert "\n" not in str(error.value) and "missing or damaged" in str(error.value)


# --- composition ------------------------------------------------------------------------------------------------------


def test_total_is_the_weighted_sum_of_parts_and_ignores_monitors():
    rewards = Rewards({"brightness": brightness, "words": words}, {"brightness": 2.0, "words": -0.5}, {"gold": gold})
    parts = rewards.score(IMAGES, TEXTS, TEXTS)
    assert set(parts) == {"brightness", "words", "gold"} and parts["gold"].dtype == torch.float64
    torch.testing.assert_close(rewards.total(parts), 2 * parts["brightness"] - 0.5 * parts["words"])
    assert torch.equal(rewards(IMAGES, TEXTS, TEXTS), rewards.total(parts))


def test_single_picture_scores_as_in_a_batch(kit: Experiment):
    batch = kit.rewards(IMAGES, TEXTS)
    alone = kit.rewards.calculate_reward(IMAGES[1], TEXTS[1])
    assert isinstance(alone, float) and alone == pytest.approx(float(batch[1]), abs=1e-5)


class Rank:
    """A reward that is an object and returns a tensor with gradient."""

    def __call__(self, images: Sequence[Image.Image], *texts: Sequence[str]) -> torch.Tensor:
        return torch.arange(len(images), dtype=torch.float32, requires_grad=True)


@pytest.mark.parametrize("reward", [brightness, words, Rank(), lambda images, *texts: tuple(range(len(images)))])
def test_any_callable_is_a_reward(reward: object):
    found = Rewards({"mine": reward}, {"mine": 1.0})(IMAGES, TEXTS)
    assert found.shape == (3,) and found.isfinite().all() and not found.requires_grad


@pytest.mark.trap("T16")
def test_picture_that_is_missing_is_nan_and_the_reward_does_not_see_it():
    seen = []

    def listen(images, prompts, enhanced_prompts):
        seen.append((len(images), list(prompts), list(enhanced_prompts)))
        return [1.0] * len(images)

    rewards = Rewards({"listen": listen}, {"listen": 3.0})
    found = rewards([IMAGES[0], None, IMAGES[2]], TEXTS, ["x", "y", "z"])
    assert found.isnan().tolist() == [False, True, False] and found[0] == found[2] == 3
    assert seen == [(2, [TEXTS[0], TEXTS[2]], ["x", "z"])]
    assert rewards([None, None], TEXTS[:2]).isnan().all() and len(seen) == 1


@pytest.mark.trap("T16")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_part_that_could_not_score_makes_the_total_nan_and_a_monitor_does_not(value: float):
    def failing(images, prompts, enhanced_prompts):
        return [value, 1.0, 1.0]

    part = Rewards({"a": brightness, "b": failing}, {"a": 1.0, "b": 0.5})(IMAGES, TEXTS)
    assert part.isnan().tolist() == [True, False, False]
    watched = Rewards({"a": brightness}, {"a": 1.0}, {"b": failing})
    assert watched(IMAGES, TEXTS).isfinite().all() and watched.score(IMAGES, TEXTS, TEXTS)["b"].isnan()[0]


@pytest.mark.parametrize(
    "values",
    [[1.0, 2.0], [1.0] * 4, 1.0, [[1.0, 2.0, 3.0]], "good", ["1", "2", "3"], {"a": 1}],
    ids=["short", "long", "one number", "row", "text", "texts", "a dict"],
)
def test_reward_that_returns_something_else_is_one_line_that_names_it(values: object):
    rewards = Rewards({"mine": lambda *args: values}, {"mine": 1.0})
    with pytest.raises(RewardError, match="reward 'mine': found") as error:
        rewards(IMAGES, TEXTS)
    assert "\n" not in str(error.value)


@pytest.mark.trap("T17")
def test_error_inside_a_reward_surfaces():
    def broken(images, prompts, enhanced_prompts):
        raise ZeroDivisionError("mine")

    with pytest.raises(RewardError, match=r"reward 'broken': ZeroDivisionError: mine \(test_rewards.py:\d+\)") as error:
        Rewards({"broken": broken}, {"broken": 1.0})(IMAGES, TEXTS)
    assert isinstance(error.value.__cause__, ZeroDivisionError) and "\n" not in str(error.value)


def test_unknown_name_in_a_config_is_one_line():
    with pytest.raises(RewardError, match=r"reward_settings: found 'beauty', allowed: .*clip_similarity, ") as error:
        load_rewards(load_config("tiny", {"reward_settings.weights": {"beauty": 1.0}}))
    assert "\n" not in str(error.value)


# --- the world's own checks -------------------------------------------------------------------------------------------


def test_gold_is_what_the_picture_shows_of_what_the_user_asked_for():
    scene = "a large red circle, in the center, white background, sharp"
    image = render(parse(scene))
    asked = ["a crimson ball", "a blue circle", "a cat on a sofa"]
    found = gold([image] * 3, asked, asked)
    assert found[0] == 1 and found[1] == pytest.approx(3 / 4) and found[2] != found[2]
    assert checked_attributes(image, "a blue circle") == {"colour": False, "shape": True, "count": True, "clean": True}
    assert checked_attributes(image, "a cat") == {}


def test_rewrites_are_checked_for_what_they_keep_and_for_grammar():
    asked = ["three crimson balls"] * 5
    written = ["three red circles, sharp", "a red circle", "red circles three", "", "three crimson balls, glitch"]
    assert keeps_objects([None] * 5, asked, written) == [1, 0, 0, 0, 1]
    assert grammatical([None] * 5, asked, written) == [1, 1, 0, 0, 1]
    assert best_prompt("a cat") is None
    assert best_prompt("three crimson balls") == "three red circles, white background, sharp"
