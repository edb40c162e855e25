"""F15: what a run depends on in files is recorded by content; with other content it is another run."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.quick_runs import QUICK, fresh

from grpo_kit.config import Config, KitError, load_config
from grpo_kit.config.contents import content_digest, prompts_digest
from grpo_kit.config.prompts import load_prompts
from grpo_kit.experiment import Experiment
from grpo_kit.runs.folder import RunError
from grpo_kit.training.branch import branch
from grpo_kit.training.loop import start, train
from grpo_kit.training.replay import changed_since

pytestmark = pytest.mark.field("F15")
ONE = {"training_settings.num_iterations": 1, "training_settings.save_every": 1, "training_settings.validate_every": 1}


def _config(place: Path, **training: object) -> Config:
    """Prompts and policy in files of one's own."""
    tiny = load_config("tiny")
    if not (place / "train.jsonl").exists():
        shutil.copy(tiny.training_settings.train_prompts, place / "train.jsonl")
        shutil.copy(tiny.evaluation_settings.val_prompts, place / "held_out.jsonl")
        shutil.copytree(tiny.model_settings.vlm_model, place / "policy")
    own = {
        "model_settings.vlm_model": str(place / "policy"),
        "training_settings.train_prompts": str(place / "train.jsonl"),
        "evaluation_settings.val_prompts": str(place / "held_out.jsonl"),
    }
    return load_config("tiny", QUICK | ONE | own | {f"training_settings.{name}": v for name, v in training.items()})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One iteration on prompts and a policy in files of its own; look, do not touch."""
    place = tmp_path_factory.mktemp("contents")
    start(_config(place), place / "run")
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """The same in a folder of its own: prompts, policy and run were moved."""
    copied = Path(shutil.copytree(trained, tmp_path / "moved"))
    config = json.loads((copied / "run" / "config.json").read_text())
    assert set(config["contents"]) >= {"model_settings.vlm_model", "training_settings.train_prompts"}
    return copied


def a_line_more(place: Path) -> str:
    with (place / "train.jsonl").open("a") as file:
        file.write('{"user_prompt": "a red ball"}\n')
    return "training_settings.train_prompts"


def other_metadata(place: Path) -> str:
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    rows[5]["answer"] = 2  # what a reward may read
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "training_settings.train_prompts"


def other_weights(place: Path) -> str:
    with (place / "policy" / "model.safetensors").open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"\1\2\3")
    return "model_settings.vlm_model"


@pytest.mark.parametrize("change", [a_line_more, other_metadata, other_weights])
def test_changed_content_is_refused_before_models_are_loaded_and_a_branch_goes_on_with_it(
    place: Path, change: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
):
    key = change(place)
    with monkeypatch.context() as patch, pytest.raises(RunError, match=rf"{key}: other content than when") as error:
        patch.setattr("grpo_kit.training.loop.load_experiment", lambda config: pytest.fail("models were loaded"))
        start(_config(place, num_iterations=2), place / "run")
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(f"grpo-kit replay {place / 'run'} --iteration 1 --branch")
    if change is other_weights:
        return
    where = {key: str(place / "train.jsonl"), "training_settings.num_iterations": 2}
    branch(place / "run", 1, place / "branch", where, progress=False)
    start(load_config(place / "branch"), place / "branch")
    assert len((place / "branch" / "metrics.jsonl").read_text().splitlines()) == 2


def test_files_that_were_moved_or_written_otherwise_are_the_same(place: Path):
    lines = (place / "train.jsonl").read_text().splitlines()
    rewritten = "\r\n\r\n".join(json.dumps(json.loads(line), ensure_ascii=True, indent=None) for line in lines)
    (place / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + rewritten.encode() + b"\r\n")
    (place / "policy" / "README.md").write_text("a card with results")
    start(_config(place, num_iterations=2), place / "run")
    assert len((place / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert not {"training_settings.train_prompts", "model_settings.vlm_model"} & changed_since(place / "run").keys()


def test_prompts_of_a_notebook_that_no_file_has_are_recorded_too(kit: Experiment, tmp_path: Path):
    train(fresh(kit, num_iterations=1), tmp_path, progress=False)
    with pytest.raises(KitError, match=r"found 12 prompts, \w+, recorded 9 prompts, \w+"):
        other = dataclasses.replace(fresh(kit, num_iterations=2), train_prompts=kit.train_prompts[:12])
        train(other, tmp_path, progress=False)


def test_best_is_chosen_among_validations_of_the_same_prompts(place: Path):
    lines = (place / "held_out.jsonl").read_text().splitlines(keepends=True)
    (place / "held_out.jsonl").write_text("".join(lines[2:]))  # a validation has two
    first = place / "run" / "validation_iter_000001.json"
    found = json.loads(first.read_text())
    found["reward"] = found["rewards"]["gold"] = 9.9  # as easy prompts may score
    first.write_text(json.dumps(found))
    start(_config(place, num_iterations=2), place / "run")
    assert "val_prompts: other content than when the run began" in (place / "run" / "training.log").read_text()
    assert "after iteration 2" in (place / "run" / "best" / "README.md").read_text()


def test_a_digest_sees_every_file_and_does_not_read_all_of_a_large_one(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights.bin").write_bytes(bytes(5_000_000))
    seen = {content_digest(tmp_path)}
    for change in ("more", "end", "name"):
        if change == "more":
            (tmp_path / "config.json").write_text("{}")
        elif change == "end":
            (tmp_path / "sub" / "weights.bin").write_bytes(bytes(4_999_999) + b"1")
        else:
            (tmp_path / "config.json").rename(tmp_path / "other.json")
        seen.add(content_digest(tmp_path))
    assert len(seen) == 4
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "lock").write_text("")
    assert content_digest(tmp_path) in seen
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(20_000_000_000)  # of which most is not read
    assert content_digest(tmp_path) not in seen


def test_a_digest_of_prompts_is_of_what_they_say(tmp_path: Path):
    prompts = load_prompts(load_config("tiny").training_settings.train_prompts)
    assert prompts_digest(prompts) == prompts_digest(list(prompts)) != prompts_digest(prompts[::-1])
    assert prompts_digest(prompts[:3]).startswith("3 prompts, ")
