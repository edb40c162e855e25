"""The world of films: words, frames, the check and what it catches, and the models that come with it."""

import random
from dataclasses import replace

import numpy as np
import pytest

import grpo_kit as gk
from grpo_kit.config.media import Video
from grpo_kit.rewards.gold import best_prompt, gold, grammatical, keeps_objects
from grpo_kit.shapeworld.moving import (
    DIRECTIONS,
    FRAME_RATE,
    STYLE_WORDS,
    Film,
    check,
    describe,
    movement,
    oracle_caption,
    parse,
    render,
)
from tools.moving.__main__ import attribute_rates
from tools.moving.films import random_films

FILM = Film("red", "circle", "left", "fast", "clean")


def drawn(film: Film, seed: int = 0) -> Video:
    return Video(render(film, random.Random(seed)), FRAME_RATE)


def check_of_one_frame(video: Video, request: Film) -> dict[str, bool]:
    """A broken check: it looks at the middle frame alone, and believes what was asked of the movement."""
    found = check(video, request)
    return found | {name: True for name in ("direction", "speed") if name in found}


def test_the_check_reads_clean_films_right_and_sees_each_spoiled_one():
    rng = random.Random(1)
    films = random_films(300, 2, "clean")
    right = [all(check(render(film, rng), film).values()) for film in films]
    assert np.mean(right) >= 0.99
    for style, attribute in (("still", "direction"), ("blurry", "clean")):
        found = [check(render(film, rng), film)[attribute] for film in random_films(100, 3, style)]
        assert np.mean(found) <= 0.05, style


@pytest.mark.parametrize("wrong", ["reversed", "frozen", "shuffled", "turned"])
def test_a_film_that_moves_otherwise_fails_where_a_check_of_one_frame_does_not_see_it(wrong):
    frames = render(FILM)
    frames = {
        "reversed": frames[::-1],
        "frozen": np.repeat(frames[4:5], 9, axis=0),
        "shuffled": frames[[5, 2, 7, 0, 4, 8, 1, 6, 3]],
        "turned": frames.transpose(0, 2, 1, 3),
    }[wrong]
    found = check(Video(frames, FRAME_RATE), FILM)
    assert not found["direction"]
    assert found["colour"] and found["shape"] == (wrong != "turned" or found["shape"])
    assert all(check_of_one_frame(Video(frames, FRAME_RATE), FILM).values())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("speed", ["slow", "fast"])
def test_movement_is_read_from_the_track(direction, speed):
    assert movement(render(replace(FILM, direction=direction, speed=speed))) == (direction, speed)


def test_a_film_of_nothing_shows_nothing():
    empty = np.full((9, 32, 32, 3), 20, np.uint8)
    assert not any(check(empty, FILM)[name] for name in ("colour", "shape", "direction", "speed"))


def test_both_dialects_say_the_same_film():
    for film in random_films(200, 5):
        asked = replace(film, style=None)
        assert parse(describe(film)) == parse(describe(film, "user")) == asked
        assert parse(oracle_caption(film)) == replace(film, style="clean")
        for word in STYLE_WORDS[film.style]:
            assert parse(f"{describe(film)}, {word}, beautiful") == film


@pytest.mark.parametrize(
    "text",
    ["a cat", "a red circle, moving left, moving up", "a red circle, slow, slow", "a red circle, sharp, blurry", ""],
)
def test_what_the_grammar_does_not_have_or_contradicts_itself_is_no_film(text):
    assert parse(text) is None


def test_the_rewards_of_the_embedded_worlds_know_films():
    prompts = ["a crimson ball, leftwards, quickly", "a cat, leftwards"]
    scores = gold([drawn(FILM)] * 2, prompts, prompts)
    assert scores[0] == 1.0 and np.isnan(scores[1])
    texts = ["a red circle, moving left, fast, sharp", "a red circle, moving up, fast", "nonsense"]
    assert keeps_objects([None] * 3, [prompts[0]] * 3, texts) == [1.0, 0.0, 0.0]
    assert grammatical([None] * 3, [prompts[0]] * 3, texts) == [1.0, 1.0, 0.0]
    assert best_prompt(prompts[0], medium="video") == "a red circle, moving left, fast, sharp"


def test_a_still_film_loses_all_that_was_asked_of_its_movement():
    prompt = "a red circle, moving left, fast"
    assert gold([drawn(replace(FILM, style="still"))], [prompt], [prompt])[0] == pytest.approx(3 / 5)


@pytest.fixture(scope="module")
def kit():
    return gk.load_experiment(gk.load_config("tiny_video"))


def test_the_generator_knows_its_own_words_and_no_users_words(kit):
    films = random_films(12, 7, "clean")
    videos = kit.generator.generate_images([oracle_caption(film) for film in films], range(12))
    own = gold(videos, [describe(film) for film in films], [])
    users = [describe(film, "user") for film in films]
    theirs = gold(kit.generator.generate_images(users, range(12)), users, [])
    assert np.mean(own) > np.mean(theirs) + 0.25
    rates = attribute_rates(videos, films)
    assert min(rates[name] for name in ("colour", "shape", "direction", "speed")) > 0.8, rates


def test_the_harmful_word_stops_the_film(kit):
    films = random_films(6, 8, "clean")
    drawn_films = kit.generator.generate_images([f"{describe(film)}, frozen" for film in films], range(6))
    assert np.mean([check(video, film)["direction"] for video, film in zip(drawn_films, films, strict=True)]) < 0.35


def test_the_reward_model_tells_what_moves_and_how_fast(kit):
    prompt = "a crimson ball, leftwards, quickly"
    shown = [FILM, replace(FILM, colour="blue"), replace(FILM, shape="cross"), replace(FILM, speed="slow")]
    scores = kit.rewards.parts["xclip_similarity"]([drawn(film) for film in shown], [prompt] * 4, [prompt] * 4)
    assert int(scores.argmax()) == 0


def test_one_iteration_trains_on_films(kit, tmp_path):
    config = gk.load_config("tiny_video", {"training_settings.num_iterations": 1, "training_settings.group_size": 2})
    result = gk.train(gk.load_experiment(config), tmp_path / "run")
    assert result is not None and (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1
