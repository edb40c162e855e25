"""The world of tones: words and back, waveforms and back, and shipped models that know one dialect or both."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler, StableAudioPipeline
from transformers import ClapModel, ClapProcessor

from grpo_kit.config.media import Sound
from grpo_kit.config.paths import PROJECT_ROOT
from grpo_kit.rewards.gold import best_prompt, gold, keeps_objects
from grpo_kit.rewards.sound import load_clap_similarity
from grpo_kit.shapeworld import captions, moving, tones
from grpo_kit.shapeworld.tones import KINDS, PITCHES, RATE, Tone, check, describe, oracle_caption, parse
from tools.tones import measure, sounds
from tools.tones.sounds import random_tone
from tools.tones.words import generator_caption, make_prompts, reward_caption, sample_rewrite

DATA = PROJECT_ROOT / "data" / "tones"
HELD_OUT = [Tone(kind, pitch) for kind in KINDS for pitch in PITCHES if sounds.is_held_out(Tone(kind, pitch))]


def as_sound(wave: np.ndarray) -> Sound:
    """A waveform (n,) at the world's rate."""
    return Sound(wave[None], RATE)


def test_words_of_either_dialect_are_read_back():
    rng = random.Random(0)
    for _ in range(500):
        tone = random_tone(rng)
        for text in (describe(tone, rng.random(), rng), oracle_caption(tone), sample_rewrite(tone, rng)):
            assert parse(text) is not None, text
        assert parse(describe(tone, 1.0, rng)) == parse(describe(tone)) == replace(tone, style=None)
        assert parse(oracle_caption(tone)) == replace(tone, style="clean")
        assert parse(reward_caption(tone, rng)) is not None


@pytest.mark.parametrize("text", ["", "a red circle", "a high", "a high sine, clear, clear", "a sine, clear, muffled"])
def test_what_is_outside_the_grammar_is_none(text: str):
    assert parse(text) is None


def test_worlds_do_not_read_each_other():
    rng = random.Random(1)
    said = [describe(random_tone(rng), 0.5, rng) for _ in range(100)]
    assert not any(map(captions.parse, said)) and not any(map(moving.parse, said))


def test_the_check_reads_clean_sounds_and_denies_spoiled_ones():
    rates = measure.check_accuracy(400, seed=5)
    assert rates["clean"]["everything"] > 0.98
    assert min(rates["crackling"]["clean"], rates["rumbling"]["clean"]) > 0.98


def test_a_check_that_hears_the_spectrum_alone_is_caught():
    """The broken twin: the same power at every frequency, and nothing of when."""
    asked, waves = measure.sounds(60, 6, "clean")
    timeless = [np.fft.irfft(np.abs(np.fft.rfft(wave))).astype(np.float32) for wave in waves]
    right, broken = measure.attribute_rates(waves, asked), measure.attribute_rates(timeless, asked)
    assert right["everything"] > 0.95 and broken["everything"] < 0.5


@pytest.mark.parametrize("attribute", ["kind", "pitch", "loudness", "length"])
def test_a_sound_wrong_in_one_attribute_fails_there_alone(attribute: str):
    heard = {"kind": "sine", "pitch": "low", "loudness": "loud", "length": "long", "style": "clean"}
    other = {"kind": "noise", "pitch": "high", "loudness": "soft", "length": "short"}
    wave = sounds.synthesise(Tone(**heard), np.random.default_rng(0))
    held = check(as_sound(wave), Tone(**heard | {attribute: other[attribute]}))
    assert [name for name, holds in held.items() if not holds] == [attribute]


@pytest.mark.parametrize("rate", [8000, 16000])
def test_the_check_takes_the_rate_from_the_sound(rate: int):
    time = np.arange(rate) / rate
    sound = Sound(0.35 * np.sin(2 * np.pi * 480 * time)[None].astype(np.float32), rate)
    assert all(check(sound, Tone("sine", "middle", "loud", "long")).values())


def test_silence_has_nothing_and_what_is_outside_the_grammar_no_score():
    silence = as_sound(np.zeros(8000, np.float32))
    assert not any(check(silence, Tone("sine", "low")).values())
    scores = gold([silence, silence], ["a low sine", "a cat"], [""] * 2)
    assert scores[0] == 0 and np.isnan(scores[1])


def test_a_rewrite_keeps_or_loses_the_request():
    kept = keeps_objects([None] * 3, ["a deep hum"] * 3, ["a loud low sine, muffled", "a high sine", "a cat"])
    assert kept == [1.0, 0.0, 0.0]


def test_the_oracle_writes_the_generators_words():
    assert best_prompt("a faint hum", medium="sound") == "a soft long middle sine, clear"


def test_prompts_on_disk_are_those_of_the_code_and_held_out_pairs_stay_out():
    for name, per_category, seed, held_out in (("train", 40, 10, False), ("val", 20, 11, True)):
        lines = (PROJECT_ROOT / "data" / "prompts" / f"tones_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert records == make_prompts(per_category, seed, held_out)
        assert {sounds.is_held_out(parse(record["user_prompt"])) for record in records} == {held_out}
    assert {tone.kind for tone in HELD_OUT} == set(KINDS) and {tone.pitch for tone in HELD_OUT} == set(PITCHES)


def test_the_generators_captions_teach_it_no_users_word():
    """Where a user's word stands in a caption, it agrees with the sound no more often than by chance."""
    rng, agree, found = random.Random(2), 0, 0
    meant = {users: word for word, users in tones.USER_WORDS.items()}
    for _ in range(20000):
        tone = random_tone(rng)
        for users, word in meant.items():
            if users in generator_caption(tone, rng).split(" "):
                found, agree = found + 1, agree + (word in tone.stated().values())
    assert 0.25 < agree / found < 0.45  # 5 kinds, 3 pitches, 2 loudnesses, 2 lengths: 0.33 by chance


# --- the shipped models ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline() -> StableAudioPipeline:
    """The shipped generator, as any user of diffusers loads it."""
    loaded = DiffusionPipeline.from_pretrained(DATA / "generator", dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def drawn(pipeline: StableAudioPipeline, texts: list[str]) -> list[np.ndarray]:
    """One sound of each text."""
    generators = [torch.Generator().manual_seed(number) for number in range(len(texts))]
    audios = pipeline(texts, 1.0, num_inference_steps=10, guidance_scale=1.0, generator=generators).audios
    return list(audios[:, 0].numpy())


def test_the_generator_obeys_its_own_words_and_not_the_users(pipeline: StableAudioPipeline):
    assert isinstance(pipeline.scheduler, EDMDPMSolverMultistepScheduler)  # the default one needs torchsde
    rng = random.Random(3)
    asked = [replace(random_tone(rng), style=None) for _ in range(60)]
    own = measure.attribute_rates(drawn(pipeline, [oracle_caption(tone) for tone in asked]), asked)
    users = measure.attribute_rates(drawn(pipeline, [describe(tone, 1.0, rng) for tone in asked]), asked)
    assert min(own["pitch"], own["loudness"], own["length"]) > 0.8 and own["kind"] > 0.65 and own["everything"] > 0.5
    assert own["clean"] > users["clean"] + 0.25
    assert users["pitch"] < 0.6 and users["loudness"] < 0.8  # by chance 0.33 and 0.5


def test_harmful_words_spoil(pipeline: StableAudioPipeline):
    asked = [Tone(kind, "middle", "loud", "long") for kind in KINDS for _ in range(4)]
    clean, spoiled = (
        measure.attribute_rates(drawn(pipeline, [f"{describe(tone)}, {word}" for tone in asked]), asked)["clean"]
        for word in ("clear", "distorted")
    )
    assert clean > 0.8 and spoiled < 0.5


def test_the_reward_model_knows_both_dialects_and_its_extractor_never_cuts():
    model, processor = (
        ClapModel.from_pretrained(DATA / "clap", dtype=torch.float32),
        ClapProcessor.from_pretrained(DATA / "clap"),
    )
    assert min(measure.discernment(model.eval(), processor, count=200).values()) > 0.8
    assert processor.feature_extractor.nb_max_samples == tones.SAMPLES


def test_the_reward_model_hears_what_the_generator_draws(pipeline: StableAudioPipeline):
    """It was trained on what the world's program makes; one that had heard silence under it gave nothing to these."""
    rng = random.Random(4)
    texts = [oracle_caption(replace(random_tone(rng), style=None)) for _ in range(40)]
    sounds, similarity = list(map(as_sound, drawn(pipeline, texts))), load_clap_similarity(str(DATA / "clap"))
    own, others = similarity(sounds, texts, texts), similarity(sounds, texts[1:] + texts[:1], texts)
    assert own.mean() > 0.45 and own.mean() > others.mean() + 0.3


def test_the_weights_are_small():
    assert sum(file.stat().st_size for file in Path(DATA).glob("*/*") if ".work" not in file.parts) < 5e6
