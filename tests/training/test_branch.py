"""A branch has its parent's history, goes on with other settings, and with none changed is its parent again."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from grpo_kit import cli
from grpo_kit.config import KitError, load_config
from grpo_kit.evaluation.pools import pool_runs, read_runs
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator
from grpo_kit.rewards.shaping import Shaping
from grpo_kit.runs.checkpoint import load_checkpoint
from grpo_kit.runs.record import Origin, read_origin
from grpo_kit.show.report import write_report
from grpo_kit.training.branch import branch
from grpo_kit.training.loop import train
from grpo_kit.training.replay import replay

SETTINGS = {
    "training_settings.num_iterations": 4,
    "training_settings.prompts_per_iteration": 2,
    "training_settings.group_size": 2,
    "training_settings.learning_rate": 1e-3,
    "training_settings.validate_every": 1,
    "training_settings.save_every": 2,
    "generation_settings.num_inference_steps": 1,
    "evaluation_settings.validation_prompts": 2,
    "evaluation_settings.paraphrases": False,
    "reward_settings.shaping": {"clip_similarity": {"normalize": "running"}},
}


def _fresh(kit: Experiment, folder: Path | None = None) -> Experiment:
    """The experiment of a run's config as a new process would load it; None is the settings above."""
    config = load_config(kit.config, SETTINGS) if folder is None else load_config(folder)
    shaping = {name: Shaping(**one.model_dump()) for name, one in config.reward_settings.shaping.items()}
    return dataclasses.replace(
        kit,
        config=config,
        policy=copy.deepcopy(kit.policy),
        generator=Generator(kit.generator.pipeline, num_inference_steps=1, guidance_scale=1.0, batch_size=24),
        rewards=dataclasses.replace(kit.rewards, shaping=shaping, running={}),
    )


@pytest.fixture(scope="module")
def parent(kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations, checkpoints of 2 and 4; look, do not touch."""
    folder = tmp_path_factory.mktemp("runs") / "parent"
    train(_fresh(kit), folder, progress=False)
    (folder / "tracking.json").write_text('{"wandb_id": "abc"}')
    return folder


def _branch(kit: Experiment, run: Path, iteration: int, new: Path, changes: dict | None = None) -> Origin:
    return branch(run, iteration, new, changes, kit=_fresh(kit, run), progress=False)


def _go_on(kit: Experiment, folder: Path) -> None:
    train(_fresh(kit, folder), folder, progress=False)


def _contents(folder: Path) -> dict[str, bytes]:
    return {place.relative_to(folder).as_posix(): place.read_bytes() for place in folder.rglob("*") if place.is_file()}


def _lines(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "time" not in name} for row in rows]


OWN = {"config.json", "branch.json", "training.log", "tracking.json", "metrics.jsonl", ".lock"}


@pytest.mark.parametrize("iteration", [1, 2])  # without a checkpoint of its own, and with one
def test_branch_with_nothing_changed_ends_as_its_parent_bit_for_bit(
    parent: Path, kit: Experiment, tmp_path: Path, iteration: int
):
    before = _contents(parent)
    origin = _branch(kit, parent, iteration, tmp_path / "same")
    assert origin.differs is None and origin.settings == {} and read_origin(tmp_path / "same") == origin
    assert _lines(tmp_path / "same") == _lines(parent)[:iteration]
    _go_on(kit, tmp_path / "same")
    assert _contents(parent) == before
    here, there = _contents(tmp_path / "same"), before
    assert _lines(tmp_path / "same") == _lines(parent)
    names = {name for name in there if "iter_000002/" not in name} - OWN
    assert {"best/model.safetensors", "checkpoints/iter_000004/manifest.json", "rollouts/iter_000001.parquet"} <= names
    assert not {name for name in names if here.get(name) != there[name]}
    assert "tracking.json" not in here


def test_branch_with_other_settings_differs_only_after_it_began(parent: Path, kit: Experiment, tmp_path: Path):
    new = tmp_path / "other"
    changes = {"training_settings.learning_rate": "5e-4", "training_settings.beta": 0.5}
    origin = _branch(kit, parent, 2, new, changes)
    assert origin.settings == {
        "training_settings.learning_rate": [1e-3, 5e-4],
        "training_settings.beta": [0.04, 0.5],
    }
    assert json.loads((new / "branch.json").read_text())["parent"] == "parent"
    assert str(tmp_path) not in (new / "branch.json").read_text()
    _go_on(kit, new)
    here, there = _contents(new), _contents(parent)
    history = {name for name in there if "00000" in name and "checkpoints" not in name and int(_number(name)) <= 2}
    assert len(history) >= 12 and all(here[name] == there[name] for name in history)
    assert _lines(new)[:2] == _lines(parent)[:2] and len(_lines(new)) == 4
    assert [line["learning_rate"] for line in _lines(new)] == [1e-3, 1e-3, 5e-4, 5e-4]
    assert _lines(new)[2]["reward"] == _lines(parent)[2]["reward"]  # sampled before the first other step
    assert _lines(new)[2]["loss"] != _lines(parent)[2]["loss"]
    assert [_rate(folder, 4) for folder in (new, parent)] == [5e-4, 1e-3]


def _rate(folder: Path, iteration: int) -> float:
    """The learning rate that a run resumed from a checkpoint trains with, whatever its config says."""
    return load_checkpoint(folder / "checkpoints" / f"iter_{iteration:06d}").optimizer["param_groups"][0]["lr"]


def test_branch_that_keeps_the_parents_optimizer_whole_would_train_at_its_rate(
    parent: Path, kit: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changes = {"training_settings.learning_rate": 5e-4}
    _branch(kit, parent, 2, tmp_path / "new", changes)
    monkeypatch.setitem(branch.__globals__, "_with_own_rates", lambda kit, optimizer: optimizer)
    _branch(kit, parent, 2, tmp_path / "broken", changes)
    assert (_rate(tmp_path / "new", 2), _rate(tmp_path / "broken", 2)) == (5e-4, 1e-3)


def _number(name: str) -> str:
    return next(part for part in name.replace(".", "_").split("_") if part.startswith("00000"))


def _rescored(kit: Experiment, parent: Path, folder: Path, scores: Mapping[int, float]) -> Path:
    """A copy of the parent whose validations found other gold scores, as if training had gone so."""
    shutil.copytree(parent, folder)
    for iteration, score in scores.items():
        place = folder / f"validation_iter_{iteration:06d}.json"
        found = json.loads(place.read_text())
        found["rewards"]["gold"] = score
        place.write_text(json.dumps(found))
    return folder


def test_best_is_the_parents_where_it_was_chosen_by_then(parent: Path, kit: Experiment, tmp_path: Path):
    run = _rescored(kit, parent, tmp_path / "run", {0: 0.1, 1: 5.0, 2: 0.2, 3: 5.0, 4: 0.3})
    assert _branch(kit, run, 1, tmp_path / "new", {"training_settings.num_iterations": 2}).best_from_parent
    kept = (run / "best" / "model.safetensors").read_bytes()
    assert (tmp_path / "new" / "best" / "model.safetensors").read_bytes() == kept
    _go_on(kit, tmp_path / "new")
    assert (tmp_path / "new" / "best" / "model.safetensors").read_bytes() == kept  # nothing of its own was better


@pytest.mark.parametrize("forgets", [False, True])
def test_best_is_the_branchs_own_where_the_parent_chose_later(
    parent: Path, kit: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: bool
):
    run = _rescored(kit, parent, tmp_path / "run", {0: 5.0, 1: 4.0, 2: 0.2, 3: 6.0, 4: 0.3})
    origin = _branch(kit, run, 2, tmp_path / "new", {"training_settings.num_iterations": 3})
    assert not origin.best_from_parent and not (tmp_path / "new" / "best").exists()
    if forgets:  # a validation that is measured against policies which the branch does not have
        monkeypatch.setitem(train.__globals__, "first_own_validation", lambda run_dir: 0)
    _go_on(kit, tmp_path / "new")
    assert (tmp_path / "new" / "best").exists() != forgets


def test_running_statistics_end_where_the_branch_does_not_normalise_by_them(
    parent: Path, kit: Experiment, tmp_path: Path
):
    assert load_checkpoint(parent / "checkpoints" / "iter_000002").rewards
    _branch(kit, parent, 2, tmp_path / "kept")
    _branch(kit, parent, 2, tmp_path / "new", {"reward_settings.shaping": {}, "training_settings.num_iterations": 3})
    kept, dropped = (load_checkpoint(tmp_path / name / "checkpoints" / "iter_000002") for name in ("kept", "new"))
    assert kept.rewards["clip_similarity"][0] == 8 and dropped.rewards == {}
    _go_on(kit, tmp_path / "new")  # would be refused with statistics that no reward has
    assert len(_lines(tmp_path / "new")) == 3


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_settings.vlm_model": "other/model"},
            "model_settings.vlm_model: found 'other/model', allowed in",
        ),
        ({"model_settings.lora": {"r": 2}}, "model_settings.lora: found {'r': 2"),
        ({"model_settings.dtype": "bfloat16"}, "model_settings.dtype: found 'bfloat16'"),
        ({"training_settings.num_iterations": 2}, "training_settings.num_iterations: found 2, allowed in a branch at"),
        ({"training_settings.bta": 2}, "training_settings.bta: unknown key"),
        ({"reward_settings.weights": {"clip_similarty": 1.0}}, "clip_similarty"),
        ({"training_settings.train_prompts": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read: No such file"),
    ],
)
def test_setting_that_cannot_change_is_one_line_and_leaves_nothing(
    parent: Path, tmp_path: Path, changes: dict, message: str
):
    with pytest.raises(KitError) as error:
        branch(parent, 2, tmp_path / "new", changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_folder_in_use_and_iteration_that_is_not_there_are_refused(parent: Path, tmp_path: Path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(KitError, match="not empty, and a branch is a new run"):
        branch(parent, 2, tmp_path / "used")
    with pytest.raises(KitError, match="iteration: found 5, allowed in run parent: 1 to 4"):
        branch(parent, 5, tmp_path / "new")


def test_branch_that_is_interrupted_is_not_there(
    parent: Path, kit: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def pull_the_plug(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(branch.__globals__, "commit", pull_the_plug)
        with pytest.raises(KeyboardInterrupt):
            _branch(kit, parent, 2, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    _branch(kit, parent, 2, tmp_path / "new")
    assert [place.name for place in tmp_path.iterdir()] == ["new"]


def test_branch_never_begins_at_iteration_0(parent: Path, kit: Experiment, tmp_path: Path):
    new = tmp_path / "new"
    _branch(kit, parent, 2, new)
    with pytest.raises(KitError, match=r"found 2, allowed in run new: none yet\. Earlier ones are in its parent"):
        replay(new, 2, kit=_fresh(kit, new))
    shutil.rmtree(new / "checkpoints")
    before = _contents(new)
    with pytest.raises(KitError, match="a branch of parent cannot begin at iteration 0"):
        _go_on(kit, new)
    after = _contents(new)
    assert all(after[name] == content for name, content in before.items() if name not in OWN - {"metrics.jsonl"})


def test_start_that_is_not_what_the_run_had_is_told(parent: Path, kit: Experiment, tmp_path: Path):
    run = Path(shutil.copytree(parent, tmp_path / "run"))
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines.replace('"unscored": 0.0', '"unscored": 1.0', 1))
    origin = _branch(kit, run, 1, tmp_path / "new")
    assert "line 1, unscored: recorded 1.0, replayed 0.0" in origin.differs
    assert read_origin(tmp_path / "new") == origin


# --- the command, the report and the comparison -----------------------------------------------------------------------


def _command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments])
    return ended.value.code


def test_command_makes_a_branch_and_says_how_it_goes_on(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = ["replay", str(parent), "--iteration", "2", "--branch", "--run-dir", str(tmp_path / "new")]
    assert _command(*given, "-o", "training_settings.beta=0.1") == 0
    assert f"Next: grpo-kit train --run-dir {tmp_path / 'new'}" in capsys.readouterr().out
    assert load_config(tmp_path / "new").training_settings.beta == 0.1
    assert _command(*given) == 2 and "not empty" in capsys.readouterr().err
    assert _command(*given, "--step-only") == 2


def test_report_names_the_parent_and_a_comparison_does_not_pool_a_branch_with_runs(synthetic_run: Path, tmp_path: Path):
    other = Path(shutil.copytree(synthetic_run, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["training_settings"]["seed"] = 7
    (other / "config.json").write_text(json.dumps(config))
    assert len(pool_runs(read_runs([synthetic_run, other]))) == 1
    origin = {"parent": "<b>first</b>", "iteration": 12, "settings": {"training_settings.beta": [0.04, 0.1]}}
    (other / "branch.json").write_text(json.dumps(origin))
    pools = pool_runs(read_runs([synthetic_run, other]))
    assert len(pools) == 2 and "after iteration 12: beta 0.04 → 0.1" in str(pools[1].settings["branch"])
    page = write_report(other).read_text(encoding="utf-8")
    assert "branch of &lt;b&gt;first&lt;/b&gt;, after iteration 12: beta 0.04 → 0.1" in page
    assert "branch of" not in write_report(synthetic_run).read_text(encoding="utf-8")


def test_damaged_origin_is_one_line(parent: Path, kit: Experiment, tmp_path: Path):
    _branch(kit, parent, 2, tmp_path / "new")
    (tmp_path / "new" / "branch.json").write_text('{"parent": 3')
    with pytest.raises(KitError, match="no record of a branch"):
        read_origin(tmp_path / "new")
