"""Rewards from a config: their options, what they share, the protocol through a rollout, and the public names."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.config_files import save_config

import grpo_kit.rewards
from grpo_kit.config import PROJECT_ROOT, ConfigError, KitError, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.rewards import (
    Rewards,
    Shaping,
    check_reward_settings,
    in_threads,
    load_rewards,
    loading,
    media_of,
    sharpness,
    with_time_limit,
)
from grpo_kit.rewards.clip import ClipEncoder
from grpo_kit.rewards.gold import gold
from grpo_kit.rewards.loading import REWARDS
from grpo_kit.rewards.protocol import context_of
from grpo_kit.rollout import collect_rollout
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import random_scenes

IMAGES = [render(scene) for scene in random_scenes(4, seed=5)]
TEXTS = ["a red circle", "two blue squares", "a pink ring", "a crimson ball"]


def _load(kit: Experiment, **settings: object) -> Rewards:
    config = load_config(kit.config, {f"reward_settings.{name}": value for name, value in settings.items()})
    return load_rewards(config, kit.generator)


def _error(key: str, value: object) -> str:
    with pytest.raises(KitError) as error:
        check_reward_settings(load_config("tiny", {f"reward_settings.{key}": value}))
    text = str(error.value)
    assert len(text.splitlines()) == 1 and text.isprintable()
    return text


# --- from a config ----------------------------------------------------------------------------------------------------


def test_every_reward_that_needs_no_further_file_or_server_loads_and_scores(kit: Experiment):
    names = {name for name, made in REWARDS.items() if "image" in media_of(made)}
    names -= {
        "pickscore",
        "hps",
        "aesthetic",
        "http",
        "judge",
        "dino_similarity",
        "xclip_similarity",
        "clap_similarity",
    }
    names = sorted(names)
    options = {"safety": {"avoid": ["glitch"]}, "style": {"phrase": "sharp"}}
    rewards = _load(kit, weights=dict.fromkeys(names, 1.0), monitors=[], options=options)
    context = {"group_ids": torch.tensor([0, 0, 1, 1]), "image_seeds": torch.tensor([1, 1, 2, 2])}
    context |= {"references": [IMAGES[-1:]] * 3 + [IMAGES[:1]]}
    context |= {"metadata": [{"caption": "a red circle", "target": "a blue circle"}] * 4}
    scores = rewards.score(IMAGES, TEXTS, TEXTS, **context)
    assert sorted(scores) == names and all(values.isfinite().all() for values in scores.values())
    shared = {id(reward.clip) for reward in rewards.parts.values() if hasattr(reward, "clip")}
    assert shared == {id(rewards.parts["clip_similarity"])}  # one model for all


def test_model_is_loaded_once_and_only_where_a_reward_needs_it(kit: Experiment, monkeypatch: pytest.MonkeyPatch):
    loaded, init = [], ClipEncoder.__init__
    monkeypatch.setattr(ClipEncoder, "__init__", lambda self, *a: loaded.append(a) or init(self, *a))
    _load(kit, weights={"sharpness": 1.0, "length": 0.1}, monitors=["gold"])
    assert not loaded
    _load(kit, weights={"clip_similarity": 1.0, "image_quality": 0.1}, monitors=["meaning_kept", "consistency"])
    assert len(loaded) == 1


def test_options_reach_the_reward(kit: Experiment):
    rewards = _load(
        kit,
        weights={"length": 1.0, "repetition": 1.0, "jpeg_size": 1.0, "safety": 1.0, "image_quality": 1.0},
        options={
            "length": {"max_words": 3},
            "repetition": {"size": 1},
            "jpeg_size": {"quality": 50},
            "safety": {"avoid": ["blood", "gore"], "threshold": 0.5, "margin": 0.25},
        },
    )
    parts = rewards.parts
    assert (parts["length"].max_words, parts["repetition"].size, parts["jpeg_size"].quality) == (3, 1, 50)
    assert (parts["safety"].avoid, parts["safety"].threshold, parts["safety"].margin) == (["blood", "gore"], 0.5, 0.25)
    assert parts["image_quality"].pairs[0] == ("Good photo.", "Bad photo.")  # the given options replace the profile's


def test_embedded_world_has_words_of_its_own_for_quality(kit: Experiment):
    assert _load(kit, weights={"image_quality": 1.0}).parts["image_quality"].pairs == [
        ("sharp", "dreamy"),
        ("sharp", "vintage"),
        ("sharp", "glitch"),
    ]


def test_shaping_combination_threads_and_limits_reach_the_rewards(kit: Experiment, monkeypatch: pytest.MonkeyPatch):
    given = []
    for wrap in (in_threads, with_time_limit):
        noting = lambda reward, number, wrap=wrap: given.append((reward, number)) or wrap(reward, number)  # noqa: E731
        monkeypatch.setattr(loading, wrap.__name__, noting)
    rewards = _load(
        kit,
        weights={"clip_similarity": 1.0, "sharpness": 0.1},
        shaping={"sharpness": {"normalize": "running", "clip": [0, 0.5]}},
        combine="normalize_then_sum",
        threads={"sharpness": 2},
        timeout={"sharpness": 60, "gold": 30},
    )
    assert rewards.shaping == {"sharpness": Shaping("running", (0.0, 0.5))} and rewards.combine == "normalize_then_sum"
    assert given == [(sharpness, 2), (rewards.parts["sharpness"].__wrapped__, 60), (gold, 30)]
    plain = _load(kit, weights={"sharpness": 0.1}).score(IMAGES, TEXTS, TEXTS)
    found = rewards.score(IMAGES, TEXTS, TEXTS)
    assert all(torch.equal(found[name], plain[name]) for name in ("sharpness", "gold"))


@pytest.mark.parametrize(
    ("on_bad_reward", "on_error"), [("raise", "raise"), ("drop_sample", "nan"), ("drop_group", "nan")]
)
def test_setting_for_bad_rewards_decides_what_a_failing_call_does(kit: Experiment, on_bad_reward: str, on_error: str):
    config = load_config(kit.config, {"training_settings.on_bad_reward": on_bad_reward})
    assert load_rewards(config).on_error == on_error


@pytest.mark.parametrize("profile", ["tiny", "workshop", "full", "classic"])
def test_settings_of_every_profile_are_possible(profile: str):
    check_reward_settings(load_config(profile))


def test_reward_settings_survive_their_own_json(tmp_path: Path):
    config = load_config(
        "tiny",
        {
            "reward_settings.options.safety": {"avoid": ["blood"], "threshold": "0.3"},
            "reward_settings.shaping.clip_similarity": '{"normalize": "group", "clip": [-1, 1], "scale": 2}',
            "reward_settings.timeout.clip_similarity": "2.5",
        },
    )
    assert load_config(save_config(config, tmp_path / "c.json")) == config
    assert config.reward_settings.shaping["clip_similarity"].clip == (-1, 1)


def test_paths_among_the_options_count_from_the_file_and_are_saved_relative_to_the_project(tmp_path: Path):
    IMAGES[0].save(tmp_path / "look.png")
    data = {"reward_settings": {"weights": {"style": 1.0}, "options": {"style": {"reference": "look.png"}}}}
    (tmp_path / "c.json").write_text(json.dumps(data))
    config = load_config(tmp_path / "c.json")
    assert config.reward_settings.options["style"]["reference"] == str(tmp_path / "look.png")
    given = {"style": {"reference": "notebooks/images/loop.png"}}
    config = load_config("tiny", {"reward_settings.options": given})
    assert config.reward_settings.options["style"]["reference"] == str(PROJECT_ROOT / "notebooks/images/loop.png")
    assert config.to_dict()["reward_settings"]["options"] == given
    assert given == {"style": {"reference": "notebooks/images/loop.png"}}  # the caller's own dict is left alone


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("weights", {"beauty": 1}, "reward_settings: found 'beauty', allowed: aesthetic, clap_similarity, "),
        ("options.safty", {"avoid": ["x"]}, "reward_settings.options: found 'safty', allowed: aesthetic, "),
        ("threads", {"beauty": 2}, "reward_settings.threads: found 'beauty', allowed: aesthetic, "),
        ("timeout", {"beauty": 2}, "reward_settings.timeout: found 'beauty', allowed: aesthetic, "),
        ("options.safety", {"avod": ["x"]}, "options.safety.avod: unknown key, did you mean avoid?; allowed: avoid, "),
        ("weights", {"safety": 1}, "reward_settings.options.safety.avoid: missing, allowed: a list"),
        ("options.safety", {"avoid": "blood"}, "options.safety.avoid: found 'blood', allowed: a list"),
        ("options.safety", {"avoid": [""]}, "options.safety.avoid.0: found '', allowed: text, not empty"),
        ("options.safety", {"avoid": ["x"], "threshold": "high"}, "threshold: found 'high', allowed: number"),
        ("options.image_quality", {"pairs": [["good"]]}, "image_quality.pairs.0"),
        ("options.length", {"max_words": True}, "options.length.max_words: found true, allowed: integer >= 1"),
        ("options.contrast", {"size": 3}, "options.contrast: found size, allowed: none, it has no options"),
        ("options.safety", 3, "reward_settings.options.safety: found 3, allowed: a JSON object"),
        ("shaping.clip_similarity.clip", [1, 0], "clip: found [1, 0], allowed: [low, high] with low < high, or null"),
        ("shaping.clip_similarity.clip", 1, "clip: found 1, allowed: [low, high] with low < high, or null"),
        ("shaping.clip_similarity.clip", [0, "x"], "shaping.clip_similarity.clip.1: found 'x'"),
        ("shaping.clip_similarity.normalize", "batch", "found 'batch', allowed: none, running, group"),
        ("shaping.clip_similarity.scal", 2, "unknown key, did you mean scale?; allowed: clip, normalize, scale"),
        ("shaping.gold.scale", 2, "names among the weights (clip_similarity), not 'gold'"),
        ("combine", "sum", "found 'sum', allowed: sum_then_normalize, normalize_then_sum"),
        ("threads.clip_similarity", 0, "threads.clip_similarity: found 0, allowed: integer >= 1"),
        ("timeout.clip_similarity", 0, "timeout.clip_similarity: found 0, allowed: number > 0"),
    ],
)
def test_mistake_is_one_line_with_key_value_and_what_is_allowed(key: str, value: object, part: str):
    assert part in _error(key, value)


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("style", {}, "reference, phrase: found neither, allowed: one of them"),
        ("style", {"reference": "no/such.png"}, "reference: found 'no/such.png', allowed: a picture file"),
        ("jpeg_size", {"quality": 100}, "quality: found 100, allowed: 1 to 95"),
        ("safety", {"avoid": []}, "avoid: found [], allowed: a list of at least one text"),
    ],
)
def test_impossible_value_names_the_option(kit: Experiment, name: str, options: dict, part: str):
    with pytest.raises(ConfigError) as error:
        _load(kit, weights={name: 1.0}, options={name: options})
    assert str(error.value).startswith(f"reward_settings.options.{name}: {part}") and "\n" not in str(error.value)


# --- the protocol -----------------------------------------------------------------------------------------------------


class Listening:
    """Keeps what it was handed."""

    def __init__(self) -> None:
        self.given: dict[str, torch.Tensor] = {}

    def __call__(self, images, prompts, enhanced_prompts, *, group_ids, image_seeds) -> list[float]:
        self.given = {"group_ids": group_ids, "image_seeds": image_seeds}
        return [0.0] * len(images)


def test_rollout_hands_each_image_its_group_and_its_seed(kit: Experiment):
    listening = Listening()
    rewards = Rewards({"it": listening}, {"it": 1.0})
    found = collect_rollout(
        kit.policy, kit.generator, rewards, kit.train_prompts[:2], 3, images_per_prompt=2, share_seeds=False
    )
    assert listening.given["group_ids"].tolist() == [0] * 6 + [1] * 6
    assert torch.equal(listening.given["image_seeds"], found.image_seeds.flatten())
    assert all(values.dtype == torch.int64 for values in listening.given.values())


def test_row_without_a_picture_takes_its_group_and_seed_with_it():
    listening = Listening()
    rewards = Rewards({"it": listening}, {"it": 1.0})
    rewards([IMAGES[0], None, IMAGES[2]], TEXTS[:3], group_ids=[0, 0, 1], image_seeds=torch.tensor([7, 8, 9]))
    assert {name: values.tolist() for name, values in listening.given.items()} == {
        "group_ids": [0, 1],
        "image_seeds": [7, 9],
    }


def test_reward_is_handed_only_what_it_names():
    def plain(images, prompts, enhanced_prompts):
        return []

    def groups(images, prompts, enhanced_prompts, group_ids=None):
        return []

    def anything(images, prompts, enhanced_prompts, **others):
        return []

    assert [context_of(reward) for reward in (plain, groups, anything, Listening(), lambda *columns: [], max)] == [
        (),
        ("group_ids",),
        (),
        ("group_ids", "image_seeds"),
        (),
        (),
    ]


def test_function_of_a_user_works_beside_the_kits_own(kit: Experiment):
    def redness(images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]) -> list[float]:
        return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images]

    rewards = Rewards({"redness": redness, **kit.rewards.parts}, {"redness": 0.5, "clip_similarity": 1.0})
    assert rewards(IMAGES, TEXTS).isfinite().all()


# --- public names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", grpo_kit.rewards.__all__)
def test_public_name_resolves_and_is_documented(name: str):
    found = getattr(grpo_kit.rewards, name)
    assert name == "Reward" or found.__doc__


def test_names_are_listed_and_unknown_ones_refused():
    assert set(grpo_kit.rewards.__all__) <= set(dir(grpo_kit.rewards))
    with pytest.raises(AttributeError, match="no attribute 'Beauty'"):
        _ = grpo_kit.rewards.Beauty


def test_importing_the_package_loads_no_torch_and_text_rewards_no_model_library():
    code = (
        "import sys, grpo_kit.rewards\nassert 'torch' not in sys.modules\n"
        "from grpo_kit.rewards import Length\nprint([n for n in ('open_clip', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
