"""What a user asks for beside a picture, the prompt files that bring one, and the policy that looks."""

import io
import json
import random
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from grpo_kit.config import PROJECT_ROOT, load_config
from grpo_kit.config.prompts import load_prompts
from grpo_kit.models.conversation import KEEP
from grpo_kit.models.policy import Policy, load_policy
from grpo_kit.runs.checkpoint import sha256
from grpo_kit.shapeworld.captions import USER_WORDS, describe, parse
from grpo_kit.shapeworld.scene import Scene, is_held_out, random_scenes
from grpo_kit.shapeworld.verify import check
from tools.shapeworld import measure, measure_eyes
from tools.shapeworld.edits import EDITS, MOST, REDRAW, Edit, possible_edits, sample_edit
from tools.shapeworld.eyes import PAINTERS, SKILFUL, drawn_from, painted, sample_look, second_answer
from tools.shapeworld.picture_prompts import ROUNDS, make_picture_prompts, write_picture_prompts
from tools.shapeworld.rewrites import sample_rewrite

SCENES = random_scenes(300, seed=21, style="clean")
FILES = [f"shapeworld_{task}_{part}.parquet" for task in ROUNDS for part in ("train", "val")]
SHIPPED = PROJECT_ROOT / "data" / "shapeworld"


# --- edits ------------------------------------------------------------------------------------------------------------


def _different(scene: Scene, other: Scene) -> set[str]:
    return {f.name for f in fields(Scene) if getattr(scene, f.name) != getattr(other, f.name)}


def test_an_edit_changes_what_it_names_and_nothing_else():
    for scene in SCENES:
        for edit in possible_edits(scene):
            target = edit.apply(scene)
            brought = {"size", "place"} if edit.attribute == "count" and scene.kind == "single" else set()
            assert _different(scene, target) == {edit.attribute} | brought
            assert getattr(target, edit.attribute) == edit.value and parse(describe(target)).kind == target.kind


def test_what_can_be_asked_of_a_kind_of_scene():
    asked = {scene.kind: {edit.attribute for edit in possible_edits(scene)} for scene in SCENES if scene.count < MOST}
    assert asked["single"] == set(EDITS) and asked["counted"] == {"colour", "background", "count"}
    assert asked["pair"] == {"background"}  # of two things nobody could tell which one is to be blue
    assert not any(
        edit.attribute == "count" for scene in SCENES if scene.count == MOST for edit in possible_edits(scene)
    )


@pytest.mark.parametrize("dialect", ["generator", "user"])
def test_no_two_edits_of_a_scene_are_said_alike(dialect: str):
    for scene in SCENES:
        said = [edit.instruction(dialect) for edit in possible_edits(scene)]
        assert len(set(said)) == len(said) and all(text.startswith(REDRAW) or text == "one more" for text in said)


def test_edits_speak_both_dialects():
    night = Edit("background", "black")
    assert night.instruction() == "the same, black background" and night.instruction("user") == "the same, at night"
    assert Edit("place", "left").instruction("user") == f"the same, but {USER_WORDS['on the left']}"
    rng = random.Random(0)
    said = {Edit("colour", "blue").instruction(0.5, rng) for _ in range(20)}
    assert said == {"the same, but blue", "the same, but azure"}


def test_each_attribute_is_asked_for_as_often():
    rng = random.Random(0)
    scene = parse("a small red circle, on the left, white background")
    found = Counter(sample_edit(scene, rng).attribute for _ in range(1000))
    assert set(found) == set(EDITS) and min(found.values()) > 150
    assert sample_edit(parse("three red circles, white background"), rng, "size") is None


# --- prompts with pictures --------------------------------------------------------------------------------------------


def test_committed_prompts_with_pictures_are_those_that_the_code_writes(tmp_path: Path):
    write_picture_prompts(tmp_path)
    for name in FILES:
        committed = pq.read_table(PROJECT_ROOT / "data" / "prompts" / name).to_pylist()
        written = pq.read_table(tmp_path / name).to_pylist()
        assert [_without_file(row) for row in committed] == [_without_file(row) for row in written]
        assert [_pixels(row) for row in committed] == [_pixels(row) for row in written]


def _without_file(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "image"}


def _pixels(row: dict) -> bytes:
    return Image.open(io.BytesIO(row["image"]["bytes"])).tobytes()


@pytest.mark.parametrize("name", FILES)
def test_the_picture_shows_its_caption_and_the_target_is_what_is_asked_for(name: str):
    prompts = load_prompts(PROJECT_ROOT / "data" / "prompts" / name)
    assert len(prompts) == (240 if "train" in name else 95)
    for prompt in prompts:
        (picture,), shown = prompt.pictures(), parse(prompt.metadata["caption"])
        assert picture.size == (32, 32) and all(check(picture, shown).values())
        target = parse(prompt.metadata["target"])
        if prompt.user_prompt == REDRAW:
            assert target == shown
            continue
        edits = {edit.instruction(d): edit for edit in possible_edits(shown) for d in ("user", "generator")}
        assert edits[prompt.user_prompt].apply(shown) == target
        assert edits[prompt.user_prompt].attribute == prompt.category


@pytest.mark.parametrize("task", ROUNDS)
def test_held_out_pictures_are_of_scenes_that_training_neither_shows_nor_means(task: str):
    train, val = (make_picture_prompts(task, 19, seed, held_out) for seed, held_out in ((12, False), (13, True)))
    assert all(is_held_out(parse(row["caption"])) for row in val)
    assert not any(is_held_out(parse(row[name])) for row in train for name in ("caption", "target"))
    for rows in (train, val):
        assert len({(row["caption"], row["target"]) for row in rows}) == len(rows)
        assert [row["category"] for row in rows] == list(ROUNDS[task]) * 19


# --- painters and second turns ----------------------------------------------------------------------------------------


def test_a_painter_swaps_and_swaps_back():
    assert len(PAINTERS) == 4
    for painter in PAINTERS:
        assert all(painter[painter[word]] == word != painter[word] for word in painter)
        for scene in SCENES:
            assert painted(painted(scene, painter), painter) == scene


def test_the_words_a_painter_needs_give_the_picture_that_was_asked_for():
    rng = random.Random(0)
    for scene in SCENES:
        look = sample_look(scene, rng)
        rewrite = sample_rewrite(look.needed, rng, SKILFUL)
        assert replace(look, shown=drawn_from(rewrite, look.painter, rng)).is_right
        other = PAINTERS[(PAINTERS.index(look.painter) + 1) % 4]
        if painted(look.request, other) != look.needed:
            assert not replace(look, shown=drawn_from(rewrite, other, rng)).is_right


def test_a_right_picture_is_kept_half_of_the_time_and_a_wrong_one_never():
    rng = random.Random(0)
    looks = [sample_look(scene, rng) for scene in SCENES * 4]
    kept = {look.is_right: [] for look in looks}
    for look in looks:
        kept[look.is_right].append(second_answer(look, rng) == KEEP)
    assert not any(kept[False]) and 0.4 < sum(kept[True]) / len(kept[True]) < 0.6
    assert 0.2 < len(kept[True]) / len(looks) < 0.4


# --- the policy that looks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(load_config("tiny_refine"))


def test_it_was_trained_on_what_it_is_asked(policy: Policy):
    look = sample_look(SCENES[0], random.Random(0))
    read = policy.format_prompt(measure_eyes.second_turn(look, measure_eyes.GREY))
    assert read == policy.processor.apply_chat_template(look.messages(), add_generation_prompt=True, tokenize=False)
    assert "user\n<|vision_start|><|image_pad|><|vision_end|>Look. Improve: " in read


def test_the_policy_reads_held_out_pictures(policy: Policy):
    read = measure_eyes.reading(policy, count=24)
    assert min(read["redraw"], read["edit"]) >= 0.9, read
    assert max(read["redraw, grey picture"], read["edit, grey picture"]) <= 0.1, read


def test_the_policy_looks_at_its_own_picture(policy: Policy):
    words = measure_eyes.looking(policy, count=60)
    assert words["own picture"] >= max(words["another's"], words["grey"]) + 0.3, words


def test_the_policy_keeps_its_old_manners(policy: Policy):
    before = json.loads((SHIPPED / "policy" / "card.json").read_text(encoding="utf-8"))["metrics"]
    now = measure.manners(policy, count=100)
    assert now["ends"] >= 0.99 and now["grammatical"] >= before["grammatical"] - 0.03, now
    assert abs(now["keeps_request"] - before["keeps_request"]) <= 0.08, now


def test_the_card_has_the_hashes_of_its_files():
    folder = SHIPPED / "policy_eyes"
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert card["command"] == "python -m tools.shapeworld eyes"
    assert all(sha256(folder / name) == found for name, found in card["sha256"].items())
