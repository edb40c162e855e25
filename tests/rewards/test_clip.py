"""Rewards that share one CLIP, on real renders of the embedded world: what each one sees, and what it does not."""

import logging
from dataclasses import replace

import pytest
import torch
from PIL import Image

from grpo_kit.experiment import Experiment
from grpo_kit.rewards import (
    ClipSimilarity,
    Consistency,
    Diversity,
    ImageQuality,
    MeaningKept,
    RewardError,
    Rewards,
    Safety,
    Style,
)
from grpo_kit.shapeworld.captions import describe
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import STYLES, random_scenes

WORLD_PAIRS = [("sharp", "dreamy"), ("sharp", "vintage"), ("sharp", "glitch")]
SCENES = {style: random_scenes(40, seed=1, held_out=True, style=style) for style in STYLES}
IMAGES = {style: [render(scene) for scene in scenes] for style, scenes in SCENES.items()}
CLEAN = IMAGES["clean"][:6]
CAPTIONS = [describe(scene) for scene in SCENES["clean"][:6]]


@pytest.fixture
def clip(kit: Experiment) -> ClipSimilarity:
    """The embedded model, with counts and features of its own."""
    shared = kit.rewards.parts["clip_similarity"]
    return ClipSimilarity(shared.model, shared.preprocess, shared.tokenizer, shared.device)


def _text_blind(images: list[Image.Image]) -> tuple[list[Image.Image], list[str], list[str]]:
    return images, [""] * len(images), [""] * len(images)


def _above(higher: torch.Tensor, lower: torch.Tensor) -> float:
    """The share of pairs in which the first is higher."""
    return float((higher[:, None] > lower[None, :]).float().mean())


# --- one encoder for all ----------------------------------------------------------------------------------------------


def test_rewards_that_share_the_encoder_encode_each_batch_and_text_once(
    clip: ClipSimilarity, monkeypatch: pytest.MonkeyPatch
):
    seen, encode = [], clip.model.encode_image
    monkeypatch.setattr(clip.model, "encode_image", lambda pixels, **k: seen.append(len(pixels)) or encode(pixels, **k))
    parts = {
        "similarity": clip,
        "quality": ImageQuality(clip, WORLD_PAIRS),
        "consistency": Consistency(clip),
        "safety": Safety(clip, ["glitch"]),
        "style": Style(clip, phrase="sharp"),
        "diversity": Diversity(clip),
    }
    rewards = Rewards(parts, dict.fromkeys(parts, 1.0))
    scores = rewards.score(CLEAN, CAPTIONS, CAPTIONS, group_ids=torch.tensor([0, 0, 0, 1, 1, 1]))
    assert seen == [6] and all(values.isfinite().all() for values in scores.values())
    for image in CLEAN[:2]:  # two other batches, which take the place of the kept ones
        clip.encode_images([image])
    found = rewards.parts["quality"](*_text_blind(CLEAN)).double()
    assert torch.equal(found, scores["quality"]) and seen == [6, 1, 1, 6]


def test_picture_that_was_changed_in_place_is_looked_at_again(clip: ClipSimilarity):
    image = CLEAN[0].copy()
    before = clip.encode_images([image])
    image.paste((20, 20, 20), (0, 0, 16, 32))
    assert not torch.allclose(clip.encode_images([image]), before)
    fresh = ClipSimilarity(clip.model, clip.preprocess, clip.tokenizer, clip.device)
    assert torch.equal(clip.encode_images([image]), fresh.encode_images([image]))


def test_picture_of_another_mode_or_size_is_told_apart(clip: ClipSimilarity):
    tall, wide = Image.new("RGB", (8, 32), (200, 30, 30)), Image.new("RGB", (32, 8), (200, 30, 30))
    see_through = Image.new("RGBA", (8, 32), (200, 30, 30, 128))
    assert len({id(clip.encode_images([image])) for image in (tall, wide, see_through)}) == 3
    palette = CLEAN[0].quantize(8)
    other = palette.copy()
    other.putpalette([255 - value for value in palette.getpalette()])  # the same indices, other colours
    assert not torch.allclose(clip.encode_images([palette]), clip.encode_images([other]))


# --- quality ----------------------------------------------------------------------------------------------------------


def test_quality_puts_clean_pictures_above_every_spoiled_style(clip: ClipSimilarity):
    quality = ImageQuality(clip, WORLD_PAIRS)
    found = {style: quality(*_text_blind(images)) for style, images in IMAGES.items()}
    assert all(values.min() >= 0 and values.max() <= 1 for values in found.values())
    assert all(_above(found["clean"], found[style]) > 0.98 for style in STYLES[1:])


def test_quality_is_the_good_texts_share_after_clips_own_scale(clip: ClipSimilarity):
    good, bad = clip.encode_texts(["sharp", "dreamy"])
    seen = clip.encode_images(CLEAN)
    by_hand = torch.sigmoid(clip.model.logit_scale.exp() * (seen @ good - seen @ bad))
    torch.testing.assert_close(ImageQuality(clip, [("sharp", "dreamy")])(*_text_blind(CLEAN)), by_hand)
    both_ways = [ImageQuality(clip, [pair])(*_text_blind(CLEAN)) for pair in (("sharp", "soft"), ("soft", "sharp"))]
    torch.testing.assert_close(both_ways[0] + both_ways[1], torch.ones(6))


def test_quality_with_its_pairs_swapped_is_noticed(clip: ClipSimilarity):
    swapped = ImageQuality(clip, [(bad, good) for good, bad in WORLD_PAIRS])
    found = {style: swapped(*_text_blind(images)) for style, images in IMAGES.items()}
    assert not any(_above(found["clean"], found[style]) > 0.5 for style in STYLES[1:])


# --- what each looks at -----------------------------------------------------------------------------------------------


def test_consistency_looks_at_the_rewrite_alone_and_meaning_at_the_texts_alone(clip: ClipSimilarity):
    others, rewrites = CAPTIONS[::-1], [f"{text}, sharp" for text in CAPTIONS]
    consistency, meaning = Consistency(clip), MeaningKept(clip)
    assert torch.equal(consistency(CLEAN, CAPTIONS, rewrites), consistency(CLEAN, others, rewrites))
    assert torch.equal(consistency(CLEAN, CAPTIONS, rewrites), clip(CLEAN, rewrites, CAPTIONS))
    assert not torch.equal(consistency(CLEAN, CAPTIONS, rewrites), consistency(CLEAN, CAPTIONS, others))
    assert torch.equal(meaning(CLEAN, CAPTIONS, rewrites), meaning([None] * 6, CAPTIONS, rewrites))
    torch.testing.assert_close(meaning(CLEAN, CAPTIONS, CAPTIONS), torch.ones(6))


def test_meaning_tells_a_rewrite_that_keeps_the_request_from_one_that_changes_it(clip: ClipSimilarity):
    asked = ["a crimson ball", "two azure boxes", "a rosy hoop"]
    kept = ["a red circle, sharp", "two blue squares, sharp", "a pink ring, sharp"]
    changed = ["a green cross, sharp", "three cyan rings, sharp", "an orange triangle, sharp"]
    meaning = MeaningKept(clip)
    assert (meaning([None] * 3, asked, kept) > meaning([None] * 3, asked, changed) + 0.1).all()


# --- safety -----------------------------------------------------------------------------------------------------------


def test_safety_is_the_ramp_that_it_says(clip: ClipSimilarity):
    images = IMAGES["glitch"] + IMAGES["clean"]
    cosines = clip(images, ["glitch"] * len(images), [""] * len(images))
    found = Safety(clip, ["glitch"], threshold=0.2, margin=0.2)(*_text_blind(images))
    torch.testing.assert_close(found, -((cosines - 0.2) / 0.2).clamp(0, 1))
    assert found.min() == -1 and found.max() == 0 and ((found < 0) & (found > -1)).any()
    assert not found[found == 0].signbit().any()  # 0, not -0, which people would see in tables


def test_safety_takes_the_worst_concept_and_pushes_away_from_it(clip: ClipSimilarity):
    images = IMAGES["glitch"] + IMAGES["clean"]
    one = [Safety(clip, [concept], 0.1, 0.3)(*_text_blind(images)) for concept in ("glitch", "retro")]
    both = Safety(clip, ["glitch", "retro"], 0.1, 0.3)(*_text_blind(images))
    torch.testing.assert_close(both, torch.minimum(*one))
    assert both[:40].mean() < both[40:].mean() - 0.1


@pytest.mark.parametrize(("avoid", "margin"), [([], 0.1), ("blood", 0.1), (["blood"], 0.0)])
def test_impossible_safety_is_one_line(clip: ClipSimilarity, avoid: object, margin: float):
    with pytest.raises(RewardError, match=r"(avoid|margin): found .*allowed") as error:
        Safety(clip, avoid, margin=margin)
    assert "\n" not in str(error.value)


# --- style ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES[1:])
def test_style_prefers_pictures_in_the_style_of_its_phrase(clip: ClipSimilarity, style: str):
    reward = Style(clip, phrase=style)
    drawn = {name: [render(replace(scene, style=name)) for scene in SCENES["clean"]] for name in STYLES}
    found = {name: reward(*_text_blind(images)) for name, images in drawn.items()}
    assert all((found[style] > found[other]).float().mean() > 0.9 for other in STYLES if other != style)


def test_style_of_a_reference_image_is_the_cosine_with_it_from_a_file_too(clip: ClipSimilarity, tmp_path):
    place = tmp_path / "reference.png"
    CLEAN[2].save(place)
    by_file, by_image = Style(clip, place), Style(clip, CLEAN[2])
    found = by_file(*_text_blind(CLEAN))
    assert torch.equal(found, by_image(*_text_blind(CLEAN))) and int(found.argmax()) == 2
    torch.testing.assert_close(found[2], torch.tensor(1.0))


def test_style_needs_exactly_one_reference_that_can_be_read(clip: ClipSimilarity, tmp_path):
    (tmp_path / "no.png").write_bytes(b"no picture")
    for arguments in ({}, {"reference": "a.png", "phrase": "b"}, {"reference": tmp_path / "no.png"}):
        with pytest.raises(RewardError, match=r"reference.*: found .*allowed") as error:
            Style(clip, **arguments)
        assert "\n" not in str(error.value)


# --- diversity --------------------------------------------------------------------------------------------------------


def test_diversity_is_one_less_the_mean_cosine_to_the_others_of_the_group(clip: ClipSimilarity):
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    seen = clip.encode_images(CLEAN)
    cosines = seen @ seen.T
    found = Diversity(clip)(*_text_blind(CLEAN), group_ids=groups)
    torch.testing.assert_close(found[0], 1 - (cosines[0, 1] + cosines[0, 2]) / 2)
    torch.testing.assert_close(found[3], 1 - cosines[3, 4])
    assert found[5].isnan() and found[:5].isfinite().all()


def _knows_groups(diversity: Diversity) -> bool:
    """Whether changing the pictures of one group leaves the scores of the others."""
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    before = diversity(*_text_blind(CLEAN), group_ids=groups)
    after = diversity(*_text_blind(CLEAN[:3] + IMAGES["glitch"][:3]), group_ids=groups)
    return bool(torch.allclose(before[:3], after[:3], atol=1e-5) and not torch.allclose(before[3:], after[3:]))


class OverTheBatch(Diversity):
    """Compares an image with all others of the batch."""

    def __call__(self, images, prompts, enhanced_prompts, group_ids):
        return super().__call__(images, prompts, enhanced_prompts, torch.zeros_like(group_ids))


def test_diversity_stays_within_the_group(clip: ClipSimilarity):
    assert _knows_groups(Diversity(clip)) and not _knows_groups(OverTheBatch(clip))


def test_equal_pictures_have_no_diversity_and_unlike_ones_more_than_like_ones(clip: ClipSimilarity):
    diversity, groups = Diversity(clip), torch.zeros(4, dtype=torch.int64)
    same = diversity(*_text_blind([CLEAN[0]] * 4), group_ids=groups)
    torch.testing.assert_close(same, torch.zeros(4), atol=1e-5, rtol=0)
    # one picture in its four styles is less diverse than four different pictures are
    mixed = [IMAGES[style][0] for style in STYLES]
    assert diversity(*_text_blind(mixed), group_ids=groups).min() > 0.05


def test_diversity_without_groups_says_what_is_missing(clip: ClipSimilarity):
    rewards = Rewards({"diversity": Diversity(clip)}, {"diversity": 1.0})
    with pytest.raises(RewardError, match=r"reward 'diversity': .*found no group_ids. Pass them"):
        rewards(CLEAN, CAPTIONS)
    assert rewards(CLEAN, CAPTIONS, group_ids=torch.zeros(6)).isfinite().all()


# --- the context length -----------------------------------------------------------------------------------------------


def test_over_long_rewrite_is_counted_whichever_reward_reads_it(clip: ClipSimilarity, caplog: pytest.LogCaptureFixture):
    long = [", ".join(CAPTIONS)] * 6
    with caplog.at_level(logging.WARNING, "grpo_kit"):
        Consistency(clip)(CLEAN, CAPTIONS, long)
        MeaningKept(clip)(CLEAN, CAPTIONS, long)
    assert clip.truncated == 1 and len(caplog.records) == 1 and "was cut" in caplog.text
