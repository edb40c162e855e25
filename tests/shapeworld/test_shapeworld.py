"""The embedded world: words and scenes there and back, the gold check, and who may see what."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
from PIL import Image

from grpo_kit.rewards.gold import gold
from grpo_kit.shapeworld.captions import GOOD_WORDS, HARMFUL_WORDS, describe, keeps_request, oracle_caption, parse
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    STYLES,
    Scene,
    is_held_out,
    random_scene,
    random_scenes,
    validation_pairs,
)
from grpo_kit.shapeworld.verify import check, read
from tools.shapeworld.captions import generator_caption, leave_open, reward_caption
from tools.shapeworld.measure import attribute_rates
from tools.shapeworld.pictures import change_one
from tools.shapeworld.prompts import CATEGORIES, make_prompts, write_prompts
from tools.shapeworld.reward_model import near_misses
from tools.shapeworld.rewrites import RewriteMix, sample_rewrite

SCENES = random_scenes(400, seed=1) + random_scenes(100, seed=2, held_out=True)
REQUESTS = [leave_open(scene, 0.4, random.Random(i)) for i, scene in enumerate(SCENES)]


# --- grammar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["generator", "user", 0.5])
def test_what_is_said_in_either_dialect_is_understood(dialect: str | float):
    for number, request in enumerate(REQUESTS):
        assert parse(describe(request, dialect, random.Random(number))) == request


def test_a_dialect_that_swaps_two_colours_would_not_be_understood(monkeypatch: pytest.MonkeyPatch):
    from grpo_kit.shapeworld import captions

    monkeypatch.setitem(captions.USER_WORDS, "red", "azure")
    monkeypatch.setitem(captions.USER_WORDS, "blue", "crimson")
    assert any(parse(describe(request, "user")) != request for request in REQUESTS)


def test_the_dialects_share_no_word_for_a_colour_shape_or_size():
    for scene in SCENES:
        words = [set(describe(replace(scene, background=None), dialect).split()) for dialect in ("generator", "user")]
        assert words[0] & words[1] <= {"a", "an", "and", "of", "the", "on", "at", "in", "side", "left", "right"}


@pytest.mark.parametrize(
    "text",
    [
        "", ",", "red", "a circle", "a red", "a cat", "a red red circle", "a circle red", "three red circle",
        "a red circle, a blue square", "a red circle, in the center, on the left", "sharp, a red circle",
        "a red circle, white background, black background", "a red circle, sharp, glitch", "a red circle, sharp, sharp",
        "a red circle,, sharp", "a red circle sharp", "four red circles", "small large red circle",
    ],
)  # fmt: skip
def test_what_is_outside_the_grammar_or_contradicts_itself_is_no_scene(text: str):
    assert parse(text) is None


def test_style_and_idle_words_add_a_style_and_nothing():
    plain = parse("a red circle")
    assert parse("A red circle, sharp, crisp, beautiful.") == replace(plain, style="clean")
    assert parse("a crimson ball, masterpiece") == plain
    assert all(parse(f"a red circle, {word}").style not in (None, "clean") for word in HARMFUL_WORDS)


def test_the_oracle_keeps_the_request_in_the_generators_words_and_leaves_nothing_open():
    for request in REQUESTS:
        text = oracle_caption(request)
        written = parse(text)
        assert keeps_request(request, written) and written.style == "clean"
        assert text == f"{describe(written)}, sharp"
        assert is_complete(written)


def is_complete(scene: Scene) -> bool:
    needed = {"single": ("size", "place"), "counted": ("count",), "pair": ("relation",)}[scene.kind]
    return all(getattr(scene, name) is not None for name in ("colour", "shape", "background", *needed))


def test_a_request_is_kept_only_by_what_states_all_of_it():
    asked = parse("three red circles, on snow")
    assert keeps_request(asked, parse("a trio of crimson balls, white background, glitch"))
    for other in ("two red circles, on snow", "three red circles", "three blue circles, on snow", "a red circle"):
        assert not keeps_request(asked, parse(other))


def test_training_captions_state_nothing_wrong():
    for number, scene in enumerate(SCENES):
        rng = random.Random(number)
        found = parse(reward_caption(scene, rng))
        assert found is not None and found.stated().items() <= scene.stated().items()
        if scene.style != "clean":
            assert found.style == scene.style  # a spoiled style is always named
        assert parse(generator_caption(scene, rng)) is not None


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_random_scenes_are_complete_and_of_every_kind():
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(2000)]
    assert all(is_complete(scene) for scene in scenes)
    assert {scene.kind for scene in scenes} == {"single", "counted", "pair"}
    assert {scene.style for scene in scenes} == set(STYLES)
    assert {scene.colour for scene in scenes} == set(COLOURS) and {scene.shape for scene in scenes} == set(SHAPES)
    assert all(scene.things[0] != scene.things[1] for scene in scenes if scene.kind == "pair")


def test_held_out_scenes_stay_held_out():
    assert [is_held_out(scene) for scene in SCENES] == [False] * 400 + [True] * 100
    for scene in SCENES:  # whatever their style, else the same picture would be on both sides
        assert len({is_held_out(replace(scene, style=style)) for style in (*STYLES, None)}) == 1
    rng = random.Random(0)
    assert 0.08 < np.mean([is_held_out(random_scene(rng)) for _ in range(4000)]) < 0.12
    # shipped models must never have met their test scenes: the split may not move between versions or processes
    small = Scene(size="small", place="center", background="white")
    things = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    found = [(c, s) for c, s in things if is_held_out(replace(small, colour=c, shape=s))]
    assert found == [("cyan", "ring"), ("pink", "ring")]


def test_random_scenes_repeat_by_seed():
    assert random_scenes(50, seed=5) == random_scenes(50, seed=5) != random_scenes(50, seed=6)


def _differences(scene: Scene, other: Scene) -> set[str]:
    return {f.name for f in fields(Scene) if getattr(scene, f.name) != getattr(other, f.name)}


def _is_near_miss(scene: Scene, other: Scene) -> bool:
    """One attribute differs; a changed count brings size and place along or takes them away."""
    different = _differences(scene, other)
    return len(different) == 1 or ("count" in different and different <= {"count", "size", "place"})


def test_near_misses_differ_in_one_attribute_and_can_be_drawn():
    scenes = random_scenes(600, seed=3)
    misses = near_misses(scenes, seed=0)
    assert all(_is_near_miss(scene, miss) and is_complete(miss) for scene, miss in zip(scenes, misses, strict=True))
    changed = Counter(name for pair in zip(scenes, misses, strict=True) for name in _differences(*pair))
    assert set(changed) == {f.name for f in fields(Scene)}
    assert not all(_is_near_miss(scene, other) for scene, other in itertools.pairwise(scenes))


@pytest.mark.parametrize("attribute", ["colour", "shape", "background", "style", "second_shape", "relation"])
def test_the_attribute_asked_for_is_the_one_that_changes(attribute: str):
    rng = random.Random(0)
    for scene in random_scenes(60, seed=4):
        if getattr(scene, attribute) is not None:
            assert _differences(scene, change_one(scene, rng, attribute)) == {attribute}


# --- the gold check ---------------------------------------------------------------------------------------------------


def _drawn(count: int, style: str) -> tuple[list[Scene], list[Image.Image]]:
    scenes, rng = random_scenes(count, seed=10, style=style), random.Random(11)
    return scenes, [render(scene, rng) for scene in scenes]


def test_verifier_reads_every_attribute_of_2000_clean_pictures():
    scenes, images = _drawn(2000, "clean")
    rates = attribute_rates(images, scenes)
    assert set(rates) == {
        "colour", "shape", "count", "size", "place", "relation", "background", "clean", "everything",
    }  # fmt: skip
    assert min(rates.values()) >= 0.99, rates


@pytest.mark.parametrize("style", ["dreamy", "vintage", "glitch"])
def test_spoiled_pictures_are_not_clean(style: str):
    scenes, images = _drawn(300, style)
    assert attribute_rates(images, scenes)["clean"] <= 0.01


def test_pictures_of_another_scene_fail_the_attribute_that_differs():
    rng = random.Random(12)
    for attribute in ("colour", "shape", "count", "size", "place", "background", "relation"):
        verdicts = []
        for scene in random_scenes(60, seed=13, style="clean"):
            if getattr(scene, attribute) is None or (attribute == "count" and scene.kind == "pair"):
                continue
            image = render(change_one(scene, rng, attribute), rng)
            verdicts.append(check(image, scene)[attribute])
        assert len(verdicts) >= 10 and np.mean(verdicts) <= 0.02, attribute


def test_noise_and_blank_pictures_show_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in noise]
    pictures += [Image.new("RGB", (32, 32), rgb) for rgb in BACKGROUNDS.values()]
    scenes = random_scenes(len(pictures), seed=14, style="clean")
    rates = attribute_rates(pictures, scenes)
    assert rates["shape"] <= 0.1 and rates["everything"] == 0


def test_gold_is_the_share_of_what_was_asked_for_and_ignores_what_was_left_open():
    drawn, blue = "a small red circle, on the left, white background, sharp", "a blue circle, black background"
    image = render(parse(drawn))
    assert gold([image] * 3, ["a crimson ball", drawn, blue], [""] * 3) == pytest.approx([1, 1, 3 / 5])
    found = check(image, parse(blue))
    assert found == {"colour": False, "shape": True, "count": True, "background": False, "clean": True}


def test_a_larger_picture_is_read_as_well():
    scenes, images = _drawn(100, "clean")
    assert all(
        read(image.resize((256, 256), Image.Resampling.NEAREST)).objects == read(image).objects for image in images
    )
    assert attribute_rates([i.convert("RGBA") for i in images], scenes)["everything"] >= 0.97


# --- prompts and rewrites ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompt_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("prompts")
    write_prompts(folder)
    return {
        name: [json.loads(line) for line in (folder / f"shapeworld_{name}.jsonl").read_text().splitlines()]
        for name in ("train", "val")
    }


def _share_no_pair(train: list[dict], held_out: list[dict]) -> bool:
    seen, asked = ({thing for row in rows for thing in parse(row["user_prompt"]).things} for rows in (train, held_out))
    return not seen & asked


def test_training_and_held_out_prompts_share_no_pair_of_colour_and_shape(prompt_files: dict[str, list[dict]]):
    train, held_out = prompt_files["train"], prompt_files["val"]
    assert _share_no_pair(train, held_out)
    assert not _share_no_pair(train[::2], train[1::2])
    assert {thing for row in held_out for thing in parse(row["user_prompt"]).things} == validation_pairs()
    assert {colour for colour, _ in validation_pairs()} == set(COLOURS)
    assert {shape for _, shape in validation_pairs()} == set(SHAPES)


def test_prompts_are_all_different_and_balanced_from_the_start(prompt_files: dict[str, list[dict]]):
    for rows in prompt_files.values():
        assert len({row["user_prompt"] for row in rows}) == len(rows)
        assert Counter(row["category"] for row in rows[:14]) == dict.fromkeys(CATEGORIES, 2)
        assert {row["difficulty"] for row in rows} == {"easy", "medium", "hard"}


def test_committed_prompts_are_those_that_the_code_writes(prompt_files: dict[str, list[dict]]):
    from grpo_kit.config import PROJECT_ROOT

    for name, rows in prompt_files.items():
        committed = (PROJECT_ROOT / "data" / "prompts" / f"shapeworld_{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in committed] == rows


def test_prompts_ask_for_what_their_category_says():
    asks: dict[str, Callable[[Scene], bool]] = {
        "single": lambda s: s.kind == "single" and not (s.size or s.place or s.background),
        "count": lambda s: s.kind == "counted",
        "size": lambda s: s.size is not None,
        "place": lambda s: s.place is not None,
        "background": lambda s: s.kind == "single" and s.background is not None,
        "two-objects": lambda s: s.kind == "pair",
        "dialect": lambda s: s.kind == "single",
    }
    for row in make_prompts(10, seed=3, held_out=False):
        assert asks[row["category"]](parse(row["user_prompt"])), row


def test_rewrites_are_in_the_grammar():
    for number, request in enumerate(REQUESTS):
        assert parse(sample_rewrite(request, random.Random(number))) is not None


def test_rewrites_differ_in_use_so_that_there_is_something_to_learn():
    rng = random.Random(0)
    rewrites = [sample_rewrite(parse("a crimson ball"), rng) for _ in range(1000)]
    read = [scene for rewrite in rewrites if (scene := parse(rewrite))]
    kept = np.mean([keeps_request(parse("a crimson ball"), scene) for scene in read])
    words = [set(rewrite.replace(",", "").split()) for rewrite in rewrites]
    assert 0.7 < kept < 0.95
    assert 0.15 < np.mean([bool(said & set(GOOD_WORDS)) for said in words]) < 0.5
    assert 0.15 < np.mean([bool(said & set(HARMFUL_WORDS)) for said in words]) < 0.6
    faultless = RewriteMix(wrong_thing=0, wrong_count=0, harmful_style=0)
    assert all(keeps_request(request, parse(sample_rewrite(request, rng, faultless))) for request in REQUESTS)
