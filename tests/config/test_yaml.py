"""Settings in YAML, and errors with the line on which a setting stands, in JSON too."""

import json
from pathlib import Path

import pytest

from grpo_kit.config import ConfigError, load_config

SETTINGS = """\
# a run of mine
profile: tiny
model_settings:
  system_prompt: no
  vae_slicing: yes
training_settings: &ours
  learning_rate: 1e-4
  group_size: 6
  beta: .5
evaluation_settings:
  num_prompts: null
  paraphrases: false
tracking_settings: {project: 2026-01-01}
"""


def written(folder: Path, text: str | bytes, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def error_of(path: Path, **overrides: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and text.isprintable()
    return text.replace(str(path), path.name)


@pytest.mark.field("F17")
@pytest.mark.parametrize("change", [str.encode, lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()])
def test_numbers_texts_and_truths_are_those_of_yaml_1_2(change, tmp_path: Path) -> None:
    config = load_config(written(tmp_path, change(SETTINGS), "c.yml"))
    assert config.training_settings.learning_rate == 1e-4 and config.training_settings.beta == 0.5
    assert config.training_settings.group_size == 6 and config.evaluation_settings.num_prompts is None
    assert config.evaluation_settings.paraphrases is False
    assert config.model_settings.system_prompt == "no"  # YAML 1.1 has false
    assert config.model_settings.vae_slicing is True  # where a truth is wanted, yes and no are read as before
    assert config.tracking_settings.project == "2026-01-01"  # and a date


@pytest.mark.field("F17")
@pytest.mark.parametrize(
    ("written_as", "expected"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.e-4", 1e-4), (".0001", 1e-4), ("+1e-4", 1e-4), ("'1e-4'", 1e-4), ("0", 0.0)],
)
def test_a_number_is_a_number_however_it_is_written(written_as: str, expected: float, tmp_path: Path) -> None:
    path = written(tmp_path, f"training_settings: {{learning_rate: {written_as}}}\n")
    assert load_config(path).training_settings.learning_rate == expected


@pytest.mark.field("F17")
def test_a_profile_says_the_same_in_yaml_and_in_json_and_anchors_are_followed(tmp_path: Path) -> None:
    import yaml

    config = load_config("workshop", {"training_settings.learning_rate": 3e-5, "reward_settings.weights": {"on": 1}})
    text = yaml.safe_dump(json.loads(json.dumps(config.to_dict())), allow_unicode=True)
    assert load_config(written(tmp_path, text)) == config
    merged = "a: &a {group_size: 6}\n".replace("a: ", "tracking_settings: {}\ntraining_settings: ")
    assert load_config(written(tmp_path, merged)).training_settings.group_size == 6


@pytest.mark.field("F17")
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training_settings:\n  group_size: 4\n  group_size: 8\n", ["c.yaml:2: ", "'group_size' stands twice"]),
        ("training_settings:\n  group_size: 4\n beta: 1\n", ["c.yaml:3: not YAML"]),
        ("training_settings:\n\tgroup_size: 4\n", ["c.yaml:2: not YAML", "cannot start any token"]),
        ("a: 1\n---\nb: 2\n", ["c.yaml:2: not YAML"]),
        ("model_settings: !!python/object:os.system {}\n", ["c.yaml:1: not YAML"]),
        ("reward_settings:\n  weights:\n    1: 2\n", ["reward_settings.weights.1: found 1, allowed: ", "(in c.yaml"]),
        (b"profile: tiny\n# caf\xe9\n", ["c.yaml: not UTF-8 text (byte 19)"]),
        ("- profile\n", ["c.yaml: found ['profile'], allowed"]),
        ("", ["c.yaml: found null, allowed"]),
        ("training_settings:\n  learning_rate: fast\n", ["learning_rate: found 'fast', allowed", "(in c.yaml:2)"]),
        ("model_settings:\n  use_image: nope\n", ["use_image: found 'nope', allowed: true or false", "(in c.yaml:2)"]),
        ("training_settings:\n\n  gruop_size: 8\n", ["did you mean group_size?", "(in c.yaml:3)"]),
        ("training_settings:\n  group_size: 1:30\n", ["group_size: found '1:30', allowed: integer", "(in c.yaml:2)"]),
        ("traning_settings: {}\n", ["did you mean training_settings?", "(in c.yaml:1)"]),
        ("training_settings:\n  epsilon: 0.2\n  delta: 1.1\n", ["delta: found 1.1", "(in c.yaml:3)"]),
    ],
)
def test_a_mistake_is_one_line_with_its_place(text: str | bytes, parts: list[str], tmp_path: Path) -> None:
    found = error_of(written(tmp_path, text))
    assert all(part in found for part in parts), found


@pytest.mark.field("F17")
def test_an_error_of_json_names_the_line_too_and_an_override_has_none(tmp_path: Path) -> None:
    text = '{\n\t"training_settings": {\n\t\t"beta": 0.1,\n\t\t"group_size": 1\n\t}\n}\n'
    path = written(tmp_path, text, "c.json")
    assert error_of(path).endswith("(in c.json:4)")
    assert error_of(path, **{"training_settings.group_size": 4, "training_settings.seed": -1}).endswith("(in c.json)")
