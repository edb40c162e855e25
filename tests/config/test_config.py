"""Profiles, the flat classic form, overrides, and errors in one line."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grpo_kit as gk
from grpo_kit.config import PROFILES, PROJECT_ROOT, Config, ConfigError, TrainingSettings, load_config
from grpo_kit.grpo import LOSS_TYPES

CLASSIC = {
    "model_settings": {
        "vlm_model": "microsoft/DialoGPT-medium",
        "sd_model": "runwayml/stable-diffusion-v1-5",
        "clip_model": "openai/clip-vit-base-patch32",
    },
    "training_settings": {"learning_rate": "1e-6", "group_size": 4, "num_iterations": 100},
}


def _write(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def _error(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(*args, **kwargs)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and text.isprintable()
    return text


@pytest.mark.parametrize("name", PROFILES)
def test_profile_loads_and_survives_its_own_json(name: str):
    config = load_config(name)
    assert config.profile == name
    assert load_config(config.to_dict()) == config
    assert load_config(config) == config


def test_tiny_names_what_the_repository_ships():
    config = load_config("tiny")
    assert config.model_settings.vlm_model == str(PROJECT_ROOT / "data/shapeworld/policy")
    assert config.training_settings.train_prompts == str(PROJECT_ROOT / "data/prompts/shapeworld_train.jsonl")
    assert config.evaluation_settings.gold == "shapeworld"


def test_workshop_is_tiny_with_less_work():
    tiny, workshop = load_config("tiny"), load_config("workshop")
    assert workshop.model_settings == tiny.model_settings
    assert workshop.training_settings.num_iterations < tiny.training_settings.num_iterations


def test_flat_classic_form_loads_unchanged(tmp_path: Path):
    config = load_config(_write(tmp_path / "config.json", CLASSIC))
    assert config.profile == "classic"
    assert config.model_settings.vlm_model == "microsoft/DialoGPT-medium"
    assert config.training_settings.learning_rate == 1e-6
    assert config.training_settings.group_size == 4
    assert config.reward_settings == load_config("classic").reward_settings


def test_file_without_models_builds_on_tiny_and_a_named_profile_is_obeyed(tmp_path: Path):
    file = _write(tmp_path / "a.json", {"training_settings": {"group_size": 3}})
    assert load_config(file).profile == "tiny"
    assert load_config(file).training_settings.num_iterations == 120
    file = _write(tmp_path / "b.json", {"profile": "full", "training_settings": {"group_size": 3}})
    assert load_config(file).generation_settings == load_config("full").generation_settings


def test_dictionaries_replace_and_sections_merge():
    config = load_config({"reward_settings": {"weights": {"mine": 2}}})
    assert config.reward_settings.weights == {"mine": 2.0}
    assert config.reward_settings.monitors == ["gold", "keeps_objects", "grammatical"]


def test_relative_paths_count_from_the_file_then_from_the_project(tmp_path: Path):
    (tmp_path / "my" / "policy").mkdir(parents=True)
    models = {"vlm_model": "my/policy", "sd_model": "org/model", "clip_model": "./later"}
    data = {"model_settings": models, "evaluation_settings": {"val_prompts": "val.jsonl"}}
    config = load_config(_write(tmp_path / "c.json", data))
    assert config.model_settings.vlm_model == str(tmp_path / "my" / "policy")
    assert config.model_settings.sd_model == "org/model"  # nothing lies there: a hub id
    assert config.model_settings.clip_model == str(tmp_path / "later")  # looks like a path
    assert config.evaluation_settings.val_prompts == str(tmp_path / "val.jsonl")
    overridden = load_config("tiny", {"training_settings.train_prompts": "pyproject.toml"})
    assert overridden.training_settings.train_prompts == str(PROJECT_ROOT / "pyproject.toml")


def test_paths_do_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = load_config("tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert load_config("tiny") == before


def test_saved_configuration_is_the_same_anywhere_and_names_no_path_of_this_machine(tmp_path: Path):
    config = load_config("tiny", {"training_settings.seed": 7})
    path = _write(tmp_path / "config.json", config.to_dict() | {"versions": {"torch": "2.15.0"}, "machine": {}})
    assert str(PROJECT_ROOT) not in path.read_text(encoding="utf-8")
    assert load_config(path) == config
    assert load_config(tmp_path) == config  # a run folder
    moved = shutil.move(path, tmp_path / "elsewhere.json")
    assert load_config(moved) == config
    assert [entry.name for entry in tmp_path.iterdir()] == ["elsewhere.json"]


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("training_settings.learning_rate", "1e-6", 1e-6),
        ("training_settings.group_size", "8", 8),
        ("training_settings.loss_type", "dapo", "dapo"),
        ("model_settings.use_image", "true", True),
        ("model_settings.system_prompt", "true", "true"),  # text stays text
        ("model_settings.system_prompt", "null", "null"),
        ("model_settings.vlm_model", "12", "12"),
        ("model_settings.clip_pretrained", "null", None),
        ("generation_settings.height", "null", None),
        ("generation_settings.height", "64", 64),
        ("generation_settings.image_batch_size", "8", 8),
        ("generation_settings.image_batch_size", "auto", "auto"),
        ("reward_settings.weights", '{"a": 1, "b": -0.5}', {"a": 1.0, "b": -0.5}),
        ("reward_settings.monitors", '["gold"]', ["gold"]),
        ("evaluation_settings.gold", "null", None),
    ],
)
def test_overrides_may_be_given_as_text(key: str, text: str, expected: object):
    section, name = key.split(".")
    assert getattr(getattr(load_config("tiny", {key: text}), section), name) == expected


def test_overrides_reach_into_dictionaries_and_absent_sections():
    config = load_config("tiny", {"reward_settings.weights.mine": "0.5", "model_settings.lora.r": "4"})
    assert config.reward_settings.weights == {"clip_similarity": 1.0, "mine": 0.5}
    assert config.model_settings.lora.r == 4
    assert load_config("tiny").model_settings.lora is None  # the profile itself is unchanged
    variables = {f"model_settings.chat_template_kwargs.{name}": name for name in ("true", "2", "words")}
    found = load_config("tiny", variables).model_settings.chat_template_kwargs
    assert found == {"true": True, "2": 2, "words": "words"}


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("training_settings.group_size", 1, ["training_settings.group_size: found 1, allowed: integer >= 2"]),
        ("training_settings.group_size", True, ["found true, allowed: integer"]),
        ("training_settings.group_size", 2.5, ["found 2.5, allowed: integer"]),
        ("training_settings.gruop_size", 8, ["unknown key, did you mean group_size?"]),
        ("traning_settings.seed", 8, ["unknown key, did you mean training_settings?"]),
        ("group_size", 8, ["Write training_settings.group_size"]),
        ("training_settings.learning_rate", "fast", ["found 'fast', allowed: number >= 0 and <= 1"]),
        ("training_settings.learning_rate", "nan", ["allowed: number"]),
        ("training_settings.learning_rate", float("inf"), ["allowed: number"]),
        ("training_settings.num_iterations", 0, ["allowed: integer >= 1"]),
        ("training_settings.loss_type", "gpo", ["found 'gpo', allowed: grpo, bnpo, dr_grpo, dapo"]),
        ("training_settings.delta", 1.1, ["training_settings.delta: found 1.1, allowed: number > 1.2"]),
        ("training_settings.micro_batch_size", 0, ["found 0, allowed: integer >= 1 or null"]),
        ("training_settings.delta", True, ["found true, allowed: number > 1 or null"]),
        ("evaluation_settings.num_prompts", 1, ["found 1, allowed: integer >= 2 or null"]),
        ("model_settings.chat_template_kwargs.x", None, ["kwargs.x: found null, allowed: true or false or integer"]),
        ("training_settings.seed.x", 1, ["'seed' is a single value"]),
        ("generation_settings.temperature", 0, ["allowed: number > 0"]),
        ("generation_settings.height", "3", ["allowed: integer >= 8 or null"]),
        ("model_settings.device", "gpu", ["found 'gpu', allowed: auto, cpu, mps, cuda or cuda:N"]),
        ("model_settings.instruction", "Improve it", ["allowed: a text that contains {prompt} once"]),
        ("model_settings.system_prompt", 3, ["found 3, allowed: text"]),
        ("model_settings.vlm_model", "", ["allowed: text, not empty"]),
        ("model_settings.sd_model", "a\0b", ["NUL"]),
        ("model_settings.lora.r", 0, ["model_settings.lora.r: found 0, allowed: integer >= 1"]),
        ("model_settings.lora.rank", 8, ["model_settings.lora.rank: unknown key"]),
        ("model_settings", "tiny", ["found 'tiny', allowed: a JSON object"]),
        ("reward_settings.weights", {}, ["not empty"]),
        ("reward_settings.weights.x", "y", ["reward_settings.weights.x: found 'y', allowed: number"]),
        ("reward_settings.monitors", ["clip_similarity"], ["clip_similarity is rewarded"]),
        ("tracking_settings.wandb", "on", ["allowed: disabled, offline, online"]),
        ("profile", "tny", [f"allowed: {', '.join(PROFILES)}"]),
        ("", 1, ["unknown key"]),
        ("a.b.c", 1, ["a: unknown key"]),
    ],
)
def test_mistake_is_one_line_with_key_value_and_what_is_allowed(key: str, value: object, parts: list[str]):
    text = _error("tiny", {key: value})
    assert all(part in text for part in parts), text


def test_several_mistakes_are_counted_and_the_file_is_named(tmp_path: Path):
    file = _write(tmp_path / "c.json", {"training_settings": {"group_size": 1, "num_iterations": 0, "seed": -1}})
    text = _error(file)
    assert "group_size" in text and "(and 2 more)" in text and str(file) in text


def test_null_is_refused_where_a_value_is_needed():
    assert "model_settings.lora.r: found null" in _error({"model_settings": {"lora": {"r": None}}})


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"training_settings": {\n"group_size": 4,,\n}}', ":2: not JSON"),
        ("", ":1: not JSON"),
        ("[1, 2]", "found [1, 2], allowed: a JSON object"),
        ('"tiny"', "found 'tiny', allowed: a JSON object"),
        ('{"profile": "tiny", "profile": "full"}', "stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"seed": ' + "9" * 5000 + "}", "integer"),
        ('{"profile": "tinny"}', "did you mean tiny?"),
        ('{"profile": 3}', "profile: found 3"),
        ('{"model_settings": 3}', "found 3"),
        ('{"\\u001b[31m": 3}', "unknown key"),
        ('{"training_settings": {"learning_rate": NaN}}', "allowed: number"),
    ],
)
def test_broken_file_is_one_line(tmp_path: Path, content: str, part: str):
    assert part in _error(_write(tmp_path / "c.json", content))


def test_file_that_is_not_text_is_one_line(tmp_path: Path):
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in _error(tmp_path / "c.json")


def test_byte_order_mark_is_fine(tmp_path: Path):
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf{}")
    assert load_config(tmp_path / "c.json") == load_config("tiny")


@pytest.mark.parametrize("name", ["tinny", "", "\0", "x" * 6000, "no/such/file.json", "../tiny"])
def test_unknown_profile_or_file_says_what_there_is(name: str):
    text = _error(name)
    assert ", ".join(PROFILES) in text and len(text) < 340


def test_settings_cannot_be_changed_in_place():
    config = load_config("tiny")
    with pytest.raises(ValueError):
        config.training_settings.group_size = 3


def test_a_value_is_never_shown_for_an_unknown_key():
    # somebody may put a key or token where it does not belong
    assert "s3cret" not in _error({"tracking_settings": {"wandb_api_key": "s3cret"}})


def test_the_losses_that_may_be_set_are_those_that_there_are():
    assert get_args(TrainingSettings.model_fields["loss_type"].annotation) == LOSS_TYPES


KEYS = [
    f"{s}.{k}" for s, section in load_config("tiny").to_dict().items() if isinstance(section, dict) for k in section
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=20), JSON, max_size=4))
def test_any_override_gives_a_configuration_or_one_line(overrides: dict):
    try:
        config = load_config("tiny", overrides)
    except gk.KitError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
    else:
        assert config.training_settings.group_size >= 2 and 0 < config.evaluation_settings.confidence < 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*Config.model_fields, "versions"]) | st.text(max_size=8), JSON, max_size=4))
def test_any_json_file_gives_a_configuration_or_one_line(tmp_path: Path, data: dict):
    (tmp_path / "c.json").write_bytes(json.dumps(data).encode("utf-8", "surrogatepass"))
    try:
        load_config(tmp_path / "c.json")
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
