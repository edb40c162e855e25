"""Rewards of videos, sounds and views, by tiny X-CLIP and CLAP of their own classes; what does not fit is refused."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapProcessor,
    CLIPImageProcessor,
    CLIPTokenizer,
    RobertaTokenizer,
    VideoMAEImageProcessor,
    XCLIPConfig,
    XCLIPModel,
    XCLIPProcessor,
)

from grpo_kit.config import PROJECT_ROOT, load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.config.media import KINDS, Sound, Video, Views
from grpo_kit.experiment import Experiment
from grpo_kit.rewards import (
    ClapSimilarity,
    ClipFrames,
    ClipSimilarity,
    ClipViews,
    Gain,
    Length,
    MediumError,
    RewardError,
    Rewards,
    XClipSimilarity,
    in_threads,
    load_clap_similarity,
    load_rewards,
    load_xclip_similarity,
    loudness,
    media_of,
    motion,
    sharpness,
    with_time_limit,
)
from grpo_kit.rewards.gold import best_prompt, gold, keeps_objects
from grpo_kit.rewards.loading import REWARDS
from grpo_kit.rewards.protocol import Reward
from grpo_kit.rollout import collect_rollout
from grpo_kit.shapeworld import captions, moving
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import random_scenes

RATE = 8000  # of the tiny CLAP, which hears one second
SCENES = [np.asarray(render(scene)) for scene in random_scenes(12, seed=5, held_out=True, style="clean")]
TEXTS = ["a red circle", "two blue squares", "a red circle"]


def film(*places: int) -> Video:
    return Video(np.stack([SCENES[place] for place in places]), 8.0)


FILMS = [film(*range(6)), film(*range(3, 9)), film(*range(6, 12))]


def noise(seconds: float, channels: int = 1, rate: int = RATE, seed: int = 0) -> Sound:
    values = np.random.default_rng(seed).normal(0, 0.1, (channels, round(seconds * rate)))
    return Sound(values.astype(np.float32), rate)


SOUNDS = [noise(0.5), noise(1, channels=2, seed=1), noise(1.4, seed=2)]


# --- tiny models, as `save_pretrained` leaves them --------------------------------------------------------------------

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module", params=[CLIPImageProcessor, VideoMAEImageProcessor])
def xclip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An X-CLIP of four frames, in half precision, with either processor that the hub's have."""
    place = tmp_path_factory.mktemp("xclip")
    tokenizer = CLIPTokenizer.from_pretrained(PROJECT_ROOT / "data/shapeworld/generator/tokenizer")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    mit = {f"mit_{key}": value for key, value in TINY.items()}
    config = XCLIPConfig(
        text_config=TINY | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config=TINY | mit | {"image_size": 16, "patch_size": 8, "num_frames": 4, "mit_hidden_size": 8},
        projection_dim=8,
        prompt_num_attention_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        XCLIPModel(config).half().save_pretrained(place)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    XCLIPProcessor(request.param(**size), tokenizer).save_pretrained(place)
    return place


@pytest.fixture(scope="module", params=["rand_trunc", "fusion"])
def clap(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLAP of either kind: one that hears the whole, one that fuses parts of long sounds with it."""
    place = tmp_path_factory.mktemp("clap")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {word: place for place, word in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    tokenizer = RobertaTokenizer(vocab=vocabulary, merges=[])
    hearing = {"num_mel_bins": 64, "spec_size": 128, "window_size": 4, "patch_stride": [4, 4], "depths": [1, 1]}
    hearing |= {"patch_embeds_hidden_size": 16, "hidden_size": 32, "num_attention_heads": [1, 2], "aff_block_r": 2}
    config = ClapConfig(
        text_config=TINY | {"vocab_size": len(vocabulary), "max_position_embeddings": 26, "projection_dim": 8},
        audio_config=hearing | {"projection_dim": 8, "enable_fusion": request.param == "fusion"},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ClapModel(config).half().save_pretrained(place)
    spectrum = {"feature_size": 64, "sampling_rate": RATE, "fft_window_size": 256, "hop_length": 80}
    spectrum |= {"frequency_max": 4000, "max_length_s": 1, "truncation": request.param}
    ClapProcessor(ClapFeatureExtractor(**spectrum), tokenizer).save_pretrained(place)
    return place


@pytest.fixture
def encoder(kit: Experiment) -> ClipSimilarity:
    """The embedded world's CLIP."""
    return kit.rewards.parts["clip_similarity"]


def alone(reward: Reward, media: list, texts: list[str]) -> list[float]:
    return [float(reward([one], [text], [text])[0]) for one, text in zip(media, texts, strict=True)]


# --- videos -----------------------------------------------------------------------------------------------------------


def test_xclip_is_its_own_models_cosine_on_frames_at_even_distances(xclip: Path) -> None:
    reward = load_xclip_similarity(str(xclip))
    model, tools = XCLIPModel.from_pretrained(xclip).float().eval(), XCLIPProcessor.from_pretrained(xclip)
    expected = []
    for video, text in zip(FILMS, TEXTS, strict=True):
        pictures = [video.pictures[place] for place in (0, 2, 3, 5)]
        inputs = tools(text=[text], videos=pictures, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs | {"pixel_values": inputs["pixel_values"].view(1, 4, 3, 16, 16)}).logits_per_video
        expected.append(float(logits[0, 0] / model.logit_scale.detach().exp()))
    found = reward(FILMS, TEXTS, ["whatever"] * 3)
    assert found.tolist() == pytest.approx(expected, abs=1e-5) and found.std() > 0
    assert alone(reward, FILMS, TEXTS) == pytest.approx(found.tolist(), abs=1e-6)
    assert reward([film(0)], TEXTS[:1], TEXTS[:1]).isfinite().all()  # fewer frames than the model reads


def test_xclip_counts_a_prompt_that_is_cut_once(xclip: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = load_xclip_similarity(str(xclip))
    with caplog.at_level(logging.WARNING, "grpo_kit"):
        for _ in range(2):
            reward(FILMS, [", ".join(TEXTS * 3)] * 3, TEXTS)
    assert reward.truncated == 1 and "xclip_similarity: a text longer than 16" in caplog.text


def tells_films_of_the_same_frames_apart(score: Callable[[Video], float]) -> bool:
    """Whether it differs between an almost still film and one that jumps, of the same frames in another order."""
    return abs(score(film(2, 2, 3, 3)) - score(film(2, 3, 2, 3))) > 1e-4


def test_what_sees_the_order_of_frames_differs_and_a_mean_over_frames_does_not(
    xclip: Path, encoder: ClipSimilarity
) -> None:
    def score(reward: Reward, video: Video) -> float:
        return float(reward([video], TEXTS[:1], TEXTS[:1])[0])

    for reward in (motion, load_xclip_similarity(str(xclip))):
        assert tells_films_of_the_same_frames_apart(partial(score, reward))
    assert not tells_films_of_the_same_frames_apart(partial(score, ClipFrames(encoder)))  # the broken twin


def test_motion_is_the_mean_step_of_all_values() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    half = np.concatenate([black[:2], white[2:]])
    media = [Video(np.stack(frames), 8.0) for frames in ([black] * 5, [black, white, black], [black, half], [white])]
    assert motion(media, [""] * 4, [""] * 4) == pytest.approx([0, 1, 0.5, 0], abs=1e-12)


def test_clip_of_frames_and_views_is_that_of_their_pictures(encoder: ClipSimilarity) -> None:
    cosines = torch.stack([encoder(one.pictures, [text] * 6, TEXTS) for one, text in zip(FILMS, TEXTS, strict=True)])
    views = [Views(tuple(one.pictures)) for one in FILMS]
    for reward, media, expected in (
        (ClipFrames(encoder), FILMS, cosines.mean(dim=1)),
        (ClipFrames(encoder, "first"), FILMS, cosines[:, 0]),
        (ClipViews(encoder), views, cosines.mean(dim=1)),
        (ClipViews(encoder, "minimum"), views, cosines.amin(dim=1)),
    ):
        found = reward(media, TEXTS, ["whatever"] * 3)
        assert found == pytest.approx(expected.tolist(), abs=1e-5)
        assert alone(reward, media, TEXTS) == pytest.approx(found, abs=1e-6)


# --- sounds -----------------------------------------------------------------------------------------------------------


def test_clap_is_its_own_models_cosine(clap: Path) -> None:
    reward = load_clap_similarity(str(clap))
    model, tools = ClapModel.from_pretrained(clap).float().eval(), ClapProcessor.from_pretrained(clap)
    expected = []
    for sound, text in zip(SOUNDS, TEXTS, strict=True):
        inputs = tools(text=[text], audio=sound.mono[:RATE], sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs | {"is_longer": torch.zeros(1, 1, dtype=torch.bool)})
        expected.append(float(torch.cosine_similarity(found.audio_embeds, found.text_embeds)[0]))
    found = reward(SOUNDS, TEXTS, ["whatever"] * 3)
    assert found.tolist() == pytest.approx(expected, abs=1e-5) and found.std() > 0
    assert alone(reward, SOUNDS, TEXTS) == pytest.approx(found.tolist(), abs=1e-6)


def never_cuts_by_chance(score: Callable[[Sound], float]) -> bool:
    """Whether a long sound scores the same whatever numpy's random numbers are, which stay as they are."""
    found, kept = set(), np.random.get_state()
    try:
        for seed in range(6):
            np.random.seed(seed)
            before = np.random.get_state()[1].tolist(), np.random.get_state()[2]
            found.add(round(score(noise(3, seed=7)), 6))
            if before != (np.random.get_state()[1].tolist(), np.random.get_state()[2]):
                return False
        return len(found) == 1
    finally:
        np.random.set_state(kept)


def test_a_long_sound_is_cut_at_its_end_and_never_by_chance(clap: Path) -> None:
    def score(reward: Reward, sound: Sound) -> float:
        return float(reward([sound], ["a hum"], ["a hum"])[0])

    def uncut(sound: Sound) -> float:
        """Broken: the whole sound, as the extractor's documentation has it."""
        inputs = tools(text=["a hum"], audio=sound.mono, sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs)
        return float(torch.cosine_similarity(found.audio_embeds, found.text_embeds)[0])

    model, tools = ClapModel.from_pretrained(clap).float().eval(), ClapProcessor.from_pretrained(clap)
    assert never_cuts_by_chance(lambda sound: score(load_clap_similarity(str(clap)), sound))
    assert not never_cuts_by_chance(uncut)
    long, reward = noise(3, seed=7), load_clap_similarity(str(clap))
    beginning = Sound(long.samples[:, :RATE], RATE)
    assert score(reward, long) == pytest.approx(score(reward, beginning), abs=1e-6)


def test_the_wrong_rate_is_an_error_in_every_case_unless_it_is_resampled(clap: Path) -> None:
    seconds = np.arange(2 * RATE) / (2 * RATE)
    tone = Sound(0.5 * np.sin(2 * np.pi * 440 * seconds)[None].astype(np.float32), 2 * RATE)
    for on_error in ("raise", "nan"):
        rewards = Rewards({"clap": load_clap_similarity(str(clap))}, {"clap": 1.0}, on_error=on_error)
        with pytest.raises(
            RewardError, match="'clap': found a sound of 16,000 Hz, allowed: the model's 8,000"
        ) as error:
            rewards.score([tone], ["a hum"], ["a hum"])
        assert "\n" not in str(error.value)
    same = Sound(tone.samples[:, ::2], RATE)
    found = alone(load_clap_similarity(str(clap), resample=True), [tone, same], ["a hum"] * 2)
    assert found[0] == pytest.approx(found[1], abs=1e-2)  # but for the filter's ends


def test_loudness_is_in_decibels_of_full_scale() -> None:
    seconds = np.arange(RATE) / RATE
    sine = np.sin(2 * np.pi * 440 * seconds)[None].astype(np.float32)
    media = [Sound(values.astype(np.float32), RATE) for values in (np.ones((2, 9)), sine, sine / 10, 0 * sine)]
    assert loudness(media, [""] * 4, [""] * 4) == pytest.approx([0, -3.0103, -23.0103, -120], abs=1e-3)


# --- by a config ------------------------------------------------------------------------------------------------------


def test_a_config_names_them_and_their_models(kit: Experiment, xclip: Path, clap: Path) -> None:
    options = {"xclip_similarity": {"model": str(xclip)}, "clap_similarity": {"model": str(clap), "resample": True}}
    options |= {"still": {"reward": "clip_frames", "frames": "first"}, "clip_views": {"over": "minimum"}}
    names = ("xclip_similarity", "clap_similarity", "clip_frames", "still", "clip_views", "motion", "loudness")
    settings = {"weights": dict.fromkeys(names, 1.0), "monitors": [], "options": options}
    parts = load_rewards(
        load_config(kit.config, {f"reward_settings.{key}": one for key, one in settings.items()})
    ).parts
    kinds = {"xclip_similarity": XClipSimilarity, "clap_similarity": ClapSimilarity, "clip_views": ClipViews}
    assert all(isinstance(parts[name], kind) for name, kind in kinds.items())
    assert parts["still"].frames == "first" and parts["still"].clip is parts["clip_views"].clip
    taken = ["video", "sound", "video", "video", "views", "video", "sound"]
    assert [media_of(parts[name]) for name in names] == [(kind,) for kind in taken]


@pytest.mark.parametrize("load", [load_xclip_similarity, load_clap_similarity])
def test_a_model_that_is_not_there_or_of_another_kind_is_one_line(
    load: Callable, tmp_path: Path, kit: Experiment
) -> None:
    for place in (str(tmp_path), kit.config.model_settings.vlm_model):
        with pytest.raises(ModelError, match=r"^reward_settings\.options\.(xclip|clap)_similarity\.model: ") as error:
            load(place)
        assert "\n" not in str(error.value)


def test_the_documents_table_names_them() -> None:
    text = (PROJECT_ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    for name in ("xclip_similarity", "clip_frames", "motion", "clap_similarity", "loudness", "clip_views"):
        assert f"`{name}`" in text


# --- what does not fit ------------------------------------------------------------------------------------------------


def filmed(images, prompts, enhanced_prompts, *, weight=1.0):
    return [weight * len(video.frames) for video in images]


filmed.media = ("video",)


def scored(reward: Reward, media: list) -> list[float]:
    return Rewards({"it": reward}, {"it": 1.0}).score(media, TEXTS, TEXTS)["it"].tolist()


def test_a_medium_that_failed_has_no_score(xclip: Path, encoder: ClipSimilarity) -> None:
    for reward in (load_xclip_similarity(str(xclip)), ClipFrames(encoder), motion):
        found = scored(reward, [FILMS[0], None, FILMS[2]])
        assert [np.isnan(one) for one in found] == [False, True, False]
    assert np.isnan(scored(loudness, [None, SOUNDS[0], None])).tolist() == [True, False, True]


def test_rewards_say_what_they_take_through_all_that_wraps_them() -> None:
    assert media_of(sharpness) == media_of(lambda *columns: []) == ("image",)
    for wrap in (partial(partial, weight=2.0), partial(in_threads, workers=2), partial(with_time_limit, seconds=60)):
        assert media_of(wrap(filmed)) == ("video",)
    assert media_of(with_time_limit(in_threads(partial(filmed, weight=2.0), 2), 60)) == ("video",)
    assert media_of(Gain(None, filmed)) == ("video",) and media_of(Gain(None, sharpness)) == ("image",)
    words = {"grammatical", "keeps_objects", "length", "meaning_kept", "repetition"}
    assert {name for name, made in REWARDS.items() if media_of(made) == tuple(KINDS)} == words


@pytest.mark.parametrize("said", ["film", ("video", "smell"), (), 3, [["video"]]])
def test_what_is_no_medium_is_one_line(said: object) -> None:
    def reward(images, prompts, enhanced_prompts):
        return [0.0] * len(images)

    reward.media = said
    with pytest.raises(
        RewardError, match=r"reward 'it': media: found .*, allowed: a tuple of image, video, sound, views"
    ):
        Rewards({"it": reward}, {"it": 1.0}).require_medium("video")


class Counting:
    """A generator that says what it gives, and counts what it is asked for."""

    def __init__(self, medium: str) -> None:
        self.medium, self.asked = medium, 0

    def generate_images(self, prompts: list[str], seeds: list[int]) -> list:
        self.asked += len(prompts)
        return [FILMS[0] if self.medium == "video" else Image.new("RGB", (32, 32))] * len(prompts)


def test_a_reward_that_does_not_fit_is_refused_before_anything_is_drawn(kit: Experiment) -> None:
    generator = Counting("video")
    for rewards in (
        Rewards({"sharp": sharpness}, {"sharp": 1.0}),
        Rewards({"filmed": filmed}, {"filmed": 1.0}, {"sharp": in_threads(sharpness, 2)}, on_error="nan"),
    ):
        with pytest.raises(MediumError, match="reward 'sharp': found a generator of video, allowed: image") as error:
            collect_rollout(kit.policy, generator, rewards, ["a red circle"], 2, use_image=True)
        assert "\n" not in str(error.value) and generator.asked == 0
        with pytest.raises(MediumError):
            replace(kit, generator=generator, rewards=rewards)
    fits = Rewards({"filmed": filmed, "length": Length(3)}, {"filmed": 1.0, "length": 1.0}, {"motion": motion})
    fits.require_medium("video")
    found = collect_rollout(kit.policy, generator, fits, ["a red circle"], 2)
    assert generator.asked > 0 and found.reward_parts["filmed"].tolist() == [6.0, 6.0]
    with pytest.raises(MediumError, match="reward 'filmed': found a generator of image, allowed: video"):
        kit.with_rewards(fits)


def test_a_users_own_reward_says_what_it_takes_and_a_config_passes_it_on(kit: Experiment, tmp_path: Path) -> None:
    source = "def length(images, prompts, enhanced_prompts, *, times=1):\n"
    source += "    return [times * len(video.frames) for video in images]\n\nlength.media = ('video',)\n"
    (tmp_path / "films.py").write_text(source)
    name = f"{tmp_path}/films.py:length"
    settings = {"weights": {name: 1.0}, "monitors": [], "options": {name: {"times": 2}}, "threads": {name: 2}}
    rewards = load_rewards(load_config(kit.config, {f"reward_settings.{key}": one for key, one in settings.items()}))
    rewards.require_medium("video")
    assert rewards(FILMS, TEXTS).tolist() == [12, 12, 12]
    with pytest.raises(MediumError, match="films:length"):
        rewards.require_medium("sound")


# --- the check of the embedded worlds ---------------------------------------------------------------------------------


def test_the_medium_says_which_grammar_counts() -> None:
    asked = "a crimson ball"  # in the grammar of pictures and in that of films
    film = Video(moving.render(moving.Film("red", "circle", "right", "fast", "clean")), 8.0)
    picture = render(captions.parse("a large red circle, in the center, white background, sharp"))
    silence = Sound(np.zeros((1, 8000), np.float32), 8000)
    found = gold([picture, film, silence], [asked] * 3, [asked] * 3)
    assert found[:2] == [1.0, 1.0] and math.isnan(found[2])
    assert math.isnan(gold([film], ["a deep hum"], [""])[0]) and gold([silence], ["a deep hum"], [""]) == [0.0]
    best = [best_prompt(asked, medium=kind) for kind in ("image", "video", "sound", "views")]
    assert best[0] != best[1] and "moving" not in best[0] and best[2:] == [None, None]
    assert keeps_objects([film], [asked], ["a red circle, moving left, sharp"]) == [1.0]
    assert keeps_objects([film], [asked], ["a blue circle, moving left, sharp"]) == [0.0]
