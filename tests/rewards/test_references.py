"""Rewards that compare with the row's own picture, and checks that judge by the row's target, on rendered scenes."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from grpo_kit.config import PROJECT_ROOT, ConfigError, load_config
from grpo_kit.config.contents import decisive_contents
from grpo_kit.config.hub import ModelError
from grpo_kit.config.prompts import Prompt
from grpo_kit.experiment import Experiment
from grpo_kit.rewards import (
    ClipSimilarity,
    EditDirection,
    FieldSimilarity,
    Gain,
    ImageSimilarity,
    RewardError,
    Rewards,
    load_dino_similarity,
    load_rewards,
)
from grpo_kit.rewards.gold import best_prompt, checked_attributes, gold, keeps_objects
from grpo_kit.rewards.protocol import Reward
from grpo_kit.shapeworld.captions import describe, parse
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import COLOURS, Scene, random_scenes

SCENES = random_scenes(24, seed=11, held_out=True, style="clean")
PICTURES = [render(scene) for scene in SCENES]
TEXTS = ["the same"] * len(SCENES)


@pytest.fixture
def clip(kit: Experiment) -> ClipSimilarity:
    """The embedded model, with features of its own."""
    shared = kit.rewards.parts["clip_similarity"]
    return ClipSimilarity(shared.model, shared.preprocess, shared.tokenizer, shared.device)


def scored(reward: Reward, images: list[Image.Image], **context: object) -> torch.Tensor:
    """(N,) as a rollout gets them: infinity where it abstains."""
    prompts = ["the same"] * len(images)
    return Rewards({"it": reward}, {"it": 1.0}).score(images, prompts, prompts, **context)["it"]


# --- the same picture -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 of its own class, as `save_pretrained` leaves it."""
    place = tmp_path_factory.mktemp("dino")
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(image_size=28, patch_size=7, **layers)).save_pretrained(place)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**size).save_pretrained(place)
    return place


def least_of_own(reward: Reward) -> tuple[float, float]:
    """The lowest score of a picture with itself, and the highest with another."""
    own = scored(reward, PICTURES, references=[[picture] for picture in PICTURES])
    others = scored(reward, PICTURES, references=[[picture] for picture in PICTURES[1:] + PICTURES[:1]])
    return float(own.min()), float(others.max())


def test_the_same_scene_scores_one_and_another_less(clip: ClipSimilarity, dino: Path) -> None:
    for reward in (ImageSimilarity(clip.encode_images), load_dino_similarity(str(dino))):
        own, others = least_of_own(reward)
        assert own == pytest.approx(1, abs=1e-5) and others < own - 1e-3


def test_a_redrawing_with_jitter_is_nearer_than_another_scene(clip: ClipSimilarity) -> None:
    again = [render(scene, random.Random(number)) for number, scene in enumerate(SCENES)]
    features, drawn = clip.encode_images(PICTURES), clip.encode_images(again)
    nearest = (drawn @ features.T).argmax(dim=1)
    assert (nearest == torch.arange(len(SCENES))).float().mean() >= 0.9


def batch_of_first(encode: Callable) -> Reward:
    """Broken: pairs the pictures of the rows that have one with the first rows."""

    def reward(images, prompts, enhanced_prompts, references):
        given = [pictures[0] for pictures in references if pictures]
        own = encode(images[: len(given)])
        return [*(own * encode(given)).sum(dim=-1).tolist(), *[None] * (len(images) - len(given))]

    return reward


def stays_with_its_row(reward: Reward) -> bool:
    references = [[picture] if row % 3 else None for row, picture in enumerate(PICTURES)]
    references[4] = [PICTURES[4], PICTURES[5]]  # the first one counts
    references[0] = []
    found = scored(reward, PICTURES, references=references)
    expected = [math.inf if row % 3 == 0 else 1.0 for row in range(len(PICTURES))]
    return found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_picture_stays_with_its_row_and_rows_without_one_are_none_of_its_business(clip: ClipSimilarity) -> None:
    assert stays_with_its_row(ImageSimilarity(clip.encode_images))
    assert not stays_with_its_row(batch_of_first(clip.encode_images))
    assert scored(ImageSimilarity(clip.encode_images), PICTURES).isinf().all()


def test_a_picture_that_a_group_shares_is_encoded_once(clip: ClipSimilarity, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, encode = [], clip.model.encode_image
    monkeypatch.setattr(clip.model, "encode_image", lambda pixels, **k: seen.append(len(pixels)) or encode(pixels, **k))
    references = [[PICTURES[0]]] * 4 + [[PICTURES[1]]] * 4
    metadata = [{"caption": "a red circle", "target": "a blue circle"}] * 8
    for reward in (ImageSimilarity(clip.encode_images), EditDirection(clip)):
        scored(reward, PICTURES[:8], references=references, metadata=metadata)
    assert sorted(seen) == [2, 8]


def test_dino_is_the_cosine_of_class_tokens(dino: Path) -> None:
    model, processor = Dinov2Model.from_pretrained(dino).eval(), BitImageProcessor.from_pretrained(dino)
    tokens = []
    for picture in PICTURES[:6]:
        with torch.no_grad():
            tokens.append(model(**processor(picture, return_tensors="pt")).last_hidden_state[0, 0])
    expected = [float(torch.cosine_similarity(tokens[row], tokens[row + 3], dim=0)) for row in range(3)]
    found = scored(load_dino_similarity(str(dino)), PICTURES[:3], references=[[one] for one in PICTURES[3:6]])
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_dino_that_is_none_or_not_there_is_one_line(kit: Experiment, tmp_path: Path) -> None:
    for place, part in (
        (kit.config.model_settings.vlm_model, "of type 'qwen2_5_vl', allowed: DINOv2 or DINOv3"),
        (str(tmp_path), "could not load"),
    ):
        with pytest.raises(ModelError, match=r"^reward_settings\.options\.dino_similarity\.model: ") as error:
            load_dino_similarity(place)
        assert part in str(error.value) and "\n" not in str(error.value)


def test_a_config_names_the_dino_and_its_weights_decide_the_run(kit: Experiment, dino: Path) -> None:
    options = {"reward_settings.options": {"dino_similarity": {"model": str(dino)}}}
    config = load_config(kit.config, {"reward_settings.weights": {"dino_similarity": 1.0}, **options})
    assert isinstance(load_rewards(config).parts["dino_similarity"], ImageSimilarity)
    assert "reward_settings.options.dino_similarity.model" in decisive_contents(config, [Prompt("a")], [Prompt("a")])


# --- edits ------------------------------------------------------------------------------------------------------------


def recoloured(scene: Scene, step: int) -> Scene:
    """In the colour that comes so many places later."""
    names = list(COLOURS)
    return replace(scene, colour=names[(names.index(scene.colour) + step) % len(names)])


ONES = [scene for scene in SCENES if scene.kind != "pair"]
GIVEN = [render(scene) for scene in ONES]


def edit(clip: ClipSimilarity, drawn: list[Image.Image], aim: int = 1, **changed: object) -> torch.Tensor:
    metadata = [{"caption": describe(scene), "target": describe(recoloured(scene, aim)), **changed} for scene in ONES]
    return scored(EditDirection(clip), drawn, references=[[picture] for picture in GIVEN], metadata=metadata)


def test_the_right_edit_scores_above_the_wrong_one_and_no_edit_has_no_direction(clip: ClipSimilarity) -> None:
    right = edit(clip, [render(recoloured(scene, 1)) for scene in ONES])
    wrong = edit(clip, [render(recoloured(scene, 3)) for scene in ONES])
    assert (right > wrong).float().mean() >= 0.9 and right.mean() - wrong.mean() > 0.2
    assert edit(clip, GIVEN).isnan().all()
    some = edit(clip, [GIVEN[0], *(render(recoloured(scene, 1)) for scene in ONES[1:])])  # encoded in another batch
    assert some.isnan().tolist() == [True] + [False] * (len(ONES) - 1)
    assert edit(clip, [render(recoloured(scene, 1)) for scene in ONES], aim=0).isinf().all()  # no edit is asked for


def test_plain_similarity_to_the_target_would_reward_what_the_picture_shows_already(clip: ClipSimilarity) -> None:
    """The broken twin: without the differences an unchanged picture has a score, and often a good one."""
    metadata = [{"caption": describe(scene), "target": describe(recoloured(scene, 1))} for scene in ONES]
    unchanged = scored(FieldSimilarity(clip, "target"), GIVEN, metadata=metadata)
    assert unchanged.isfinite().all()


def test_an_edit_without_picture_caption_or_target_is_none_of_its_business(clip: ClipSimilarity) -> None:
    drawn = [render(recoloured(scene, 1)) for scene in ONES]
    assert edit(clip, drawn, caption=None).isinf().all() and edit(clip, drawn, target=None).isinf().all()
    assert scored(EditDirection(clip), drawn, metadata=[{"caption": "a", "target": "b"}] * len(ONES)).isinf().all()
    with pytest.raises(RewardError, match="metadata target: found 3, allowed: text"):
        edit(clip, drawn, target=3)


# --- the field and the target -----------------------------------------------------------------------------------------


def test_clip_similarity_to_a_field_is_that_to_the_prompt_where_a_row_has_none(kit: Experiment) -> None:
    settings = {"reward_settings.weights": {"clip_similarity": 1.0}, "reward_settings.monitors": ["consistency"]}
    options = {"reward_settings.options": {"clip_similarity": {"field": "target"}}}
    rewards = load_rewards(load_config(kit.config, settings | options))
    plain = load_rewards(load_config(kit.config, settings)).parts["clip_similarity"]
    targets = [describe(scene) for scene in SCENES[:4]]
    metadata = [{"target": targets[0]}, {}, {"target": None}, {"target": targets[3]}]
    found = rewards.score(PICTURES[:4], TEXTS[:4], TEXTS[:4], metadata=metadata)["clip_similarity"]
    expected = plain(PICTURES[:4], [targets[0], "the same", "the same", targets[3]], TEXTS[:4])
    assert torch.equal(found, expected.double())
    assert rewards.parts["clip_similarity"].clip is rewards.monitors["consistency"].clip
    with pytest.raises(ConfigError, match=r"clip_similarity\.feild: unknown key, did you mean field"):
        load_rewards(load_config(kit.config, {"reward_settings.options": {"clip_similarity": {"feild": "target"}}}))


def test_the_checks_judge_by_the_target_where_a_row_has_one() -> None:
    target = "three red circles, white background, sharp"
    image, fields = render(parse(target)), {"target": target}
    assert gold([image] * 3, ["the same", "the same", "a blue square"], [""] * 3, metadata=[fields, {}, fields]) == [
        1,
        pytest.approx(math.nan, nan_ok=True),
        1,
    ]
    written = ["three red circles, white background", "three red circles"]
    assert keeps_objects([None] * 2, ["the same"] * 2, written, metadata=[fields] * 2) == [1, 0]
    assert best_prompt("the same", fields) == target and best_prompt("the same") is None
    assert all(checked_attributes(image, "the same", fields).values())
    found = Rewards({"gold": gold}, {"gold": 1.0}).score([image], ["the same"], ["x"], metadata=[fields])
    assert found["gold"].tolist() == [1]


# --- gain -------------------------------------------------------------------------------------------------------------


class Painter:
    """Draws the same whatever is asked."""

    def generate_images(self, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return [PICTURES[0]] * len(prompts)


def test_gain_hands_on_the_pictures_and_keeps_raw_scores_of_the_same_ones_only(clip: ClipSimilarity) -> None:
    gain = Gain(Painter(), ImageSimilarity(clip.encode_images))
    features = clip.encode_images(PICTURES)
    for other in (2, 3):  # the same prompts, seeds and metadata, another picture
        context = {"image_seeds": torch.tensor([5, 6, 7]), "references": [[PICTURES[other]], [PICTURES[1]], None]}
        found = scored(gain, PICTURES[:3], **context)
        expected = [(features[0] - features[0]) @ features[other], (features[1] - features[0]) @ features[1], math.inf]
        assert found.tolist() == pytest.approx([float(value) for value in expected], abs=1e-5)


def test_the_table_of_the_documents_names_them() -> None:
    text = (PROJECT_ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    for name in ("image_similarity", "edit_direction", "dino_similarity", '"field": "target"'):
        assert name in text
