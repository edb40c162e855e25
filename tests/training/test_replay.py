"""Replay: what a run recorded comes out again bit for bit, and whatever does not is found and named."""

import copy
import dataclasses
import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from support.policy_forms import LORA

import grpo_kit.runs.checkpoint
from grpo_kit import cli
from grpo_kit.config import Config, KitError, load_config
from grpo_kit.config.hardware import library_versions
from grpo_kit.config.prompts import Prompt
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator
from grpo_kit.models.policy import load_policy
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rewards.shaping import Shaping
from grpo_kit.training.difference import ABSENT, Comparison, compare, compare_line
from grpo_kit.training.iteration import run_iteration
from grpo_kit.training.loop import make_optimizer, train
from grpo_kit.training.replay import COMPUTED_BY_THE_STEP, STEP, WHOLE, Replay, _Record, replay
from grpo_kit.training.restore import copied_state, put_back, read_rollout, recorded_rollout, restore_after

SETTINGS = {
    "training_settings.num_iterations": 3,
    "training_settings.prompts_per_iteration": 2,
    "training_settings.group_size": 4,
    "training_settings.learning_rate": 1e-3,
    "training_settings.validate_every": 3,
    "training_settings.save_every": 2,  # iterations 1 and 2 have no checkpoint before them once 3 is committed
    "generation_settings.num_inference_steps": 1,
    "generation_settings.max_new_tokens": 16,
    "evaluation_settings.validation_prompts": 2,
    "evaluation_settings.paraphrases": False,
}
ONE_PROMPT = {"training_settings.prompts_per_iteration": 1}
FORMS = {
    "all weights": {},
    "adapter that sees": ONE_PROMPT
    | {
        "model_settings.lora": LORA,
        "model_settings.use_image": True,
        "training_settings.beta": 0.0,
        "training_settings.updates_per_rollout": 1,
        "training_settings.micro_batch_size": 3,
    },
    "two turns": ONE_PROMPT
    | {"generation_settings.turns": 2, "model_settings.painters": [{}, {"red": "blue", "blue": "red"}]},
    "branches": ONE_PROMPT
    | {
        "generation_settings.turns": 3,
        "generation_settings.branches": True,
        "generation_settings.credit": "difference",
        "training_settings.redraw_cost": 0.05,
        "model_settings.use_image": True,
        "model_settings.look_at": "grey",
    },
    "running statistics": ONE_PROMPT
    | {"training_settings.advantage_eps": 1.0},  # an eps that does not cancel the reward's scale
}


def _pictures(form: str) -> int:
    """How many an iteration draws."""
    settings = SETTINGS | FORMS[form]
    rows = settings["training_settings.prompts_per_iteration"] * settings["training_settings.group_size"]
    return rows * settings.get("generation_settings.turns", 1)


def _config(kit: Experiment, form: str) -> Config:
    return load_config(kit.config, SETTINGS | FORMS[form])


def _fresh(kit: Experiment, form: str = "all weights") -> Experiment:
    """The experiment as a new process would load it."""
    config = _config(kit, form)
    policy = load_policy(config) if config.model_settings.lora else copy.deepcopy(kit.policy)
    policy.max_new_tokens = config.generation_settings.max_new_tokens
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "batch_size": 24}
    generator = Generator(kit.generator.pipeline, **options, painters=config.model_settings.painters or ())
    own = dataclasses.replace(kit, config=config, policy=policy, generator=generator)
    if form == "running statistics":
        shaping = {"clip_similarity": Shaping(normalize="running")}
        own = own.with_rewards(dataclasses.replace(kit.rewards, shaping=shaping, running={}))
    return own


@pytest.fixture(scope="module")
def runs(kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three iterations in each form; look, do not touch."""
    folders = {form: tmp_path_factory.mktemp("runs") / form.replace(" ", "-") for form in FORMS}
    for form, folder in folders.items():
        train(_fresh(kit, form), folder, progress=False)
    return folders


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A run of one's own, all weights trained."""
    return Path(shutil.copytree(runs["all weights"], tmp_path / "run"))


def _again(kit: Experiment, folder: Path, iteration: int, form: str = "all weights", **options: bool) -> Replay:
    return replay(folder, iteration, kit=_fresh(kit, form), progress=False, **options)


def _contents(folder: Path) -> dict[str, bytes]:
    return {place.relative_to(folder).as_posix(): place.read_bytes() for place in folder.rglob("*") if place.is_file()}


# --- what was recorded comes out again --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_iteration_comes_out_bit_for_bit_and_the_run_is_left_as_it_was(
    runs: dict[str, Path], kit: Experiment, form: str
):
    before = _contents(runs[form])
    assert {f"checkpoints/iter_00000{i}/manifest.json" for i in (2, 3)} <= before.keys()
    for iteration, start in ((1, "the config's own models"), (2, "the config's own models"), (3, "iter_000002")):
        found = _again(kit, runs[form], iteration, form)
        assert found.equal, found.verdict
        assert start in found.started_from and found.first_difference is None and not found.skipped
        kept = f"rollouts/iter_00000{iteration}.parquet" in before
        assert set(found.sources) == ({STEP, WHOLE} if kept else {WHOLE})
        _require_compared(found, kept, f"checkpoints/iter_00000{iteration}" if iteration > 1 else None, form)
    assert _contents(runs[form]) == before


def _require_compared(found: Replay, kept: bool, checkpoint: str | None, form: str) -> None:
    """A replay that compared less would be equal too."""
    for part in found.sources:
        names = set(found.table.query("part == @part")["what"])
        assert {"metrics: reward", "metrics: loss", "metrics: grad_norm", "metrics: learning_rate"} <= names
        assert not any("time" in name for name in names)
        if kept:
            assert {"metrics: kl", "rollout: advantage", "rollout: ref_logprobs", "rollout: new_logprobs"} <= names
        if kept and part == WHOLE:
            columns = ("completion_ids", "tokens", "enhanced_prompt", "reward", "old_logprobs", "its file")
            assert {f"pictures ({_pictures(form)} files)", *(f"rollout: {column}" for column in columns)} <= names
        if checkpoint:
            stated = {name for name in names if name.startswith(checkpoint)}
            expected = ["weights", "optimizer", "optimizer's settings"]
            expected += ["rewards' statistics"] if form == "running statistics" else []
            assert stated == {f"{checkpoint}: {name}" for name in expected}


def test_step_alone_samples_draws_and_scores_nothing(
    runs: dict[str, Path], kit: Experiment, monkeypatch: pytest.MonkeyPatch
):
    own = _fresh(kit)
    for place in ((type(own.policy), "sample"), (Generator, "generate_images"), (Rewards, "score")):
        monkeypatch.setattr(*place, lambda *_, **__: pytest.fail("not needed"))
    found = replay(runs["all weights"], 3, kit=own, step_only=True, progress=False)
    assert found.equal and set(found.sources) == {STEP} and "rollouts/iter_000003.parquet" in found.sources[STEP]
    with pytest.raises(KitError, match="rollout of iteration 2: not kept, allowed: 1, 3"):
        _again(kit, runs["all weights"], 2, step_only=True)


def test_rollout_from_its_table_is_the_one_that_was_sampled(runs: dict[str, Path], kit: Experiment):
    own = _fresh(kit, "running statistics")
    sampled, _ = run_iteration(own, make_optimizer(own, own.config), 1)
    columns = read_rollout(runs["running statistics"] / "rollouts" / "iter_000001.parquet")
    read = recorded_rollout(_fresh(kit, "running statistics"), columns, 1)
    names = ["group_ids", "completion_mask", "rewards", "old_logprobs", "truncated", "totals", "image_seeds"]
    assert all(torch.equal(getattr(read, name), getattr(sampled, name)) for name in names)
    assert torch.equal(read.completion_ids[read.completion_mask], sampled.completion_ids[sampled.completion_mask])
    assert read.enhanced_prompts == sampled.enhanced_prompts and read.metrics() == sampled.metrics()
    assert [prompt.user_prompt for prompt in read.prompts] == [prompt.user_prompt for prompt in sampled.prompts]


def _pictured(kit: Experiment, *colours: str) -> Experiment:
    """The experiment with prompts of the same words that differ by their pictures."""
    files = [io.BytesIO() for _ in colours]
    for file, colour in zip(files, colours, strict=True):
        Image.new("RGB", (32, 32), colour).save(file, "png")
    return dataclasses.replace(kit, train_prompts=[Prompt("the same", images=(file.getvalue(),)) for file in files])


def test_a_rollout_is_no_record_of_prompts_with_other_pictures(kit: Experiment, tmp_path: Path):
    colours = ("red", "blue", "green")
    train(_pictured(_fresh(kit), *colours), tmp_path / "run", progress=False)
    again = replay(tmp_path / "run", 1, kit=_pictured(_fresh(kit), *colours), progress=False)
    assert again.equal, again.verdict
    for other in (_pictured(_fresh(kit), *reversed(colours)), _fresh(kit)):
        found = replay(tmp_path / "run", 1, kit=other, step_only=True, progress=False)
        assert not found.equal and "found other prompts with pictures than the run's" in found.first_difference


# --- what does not come out again is named ----------------------------------------------------------------------------


def _edit(place: Path, old: str, new: str) -> None:
    text = place.read_text()
    assert old in text
    place.write_text(text.replace(old, new, 1))


def test_changed_number_of_metrics_is_named(run: Path, kit: Experiment):
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[2])
    _edit(run / "metrics.jsonl", repr(line["loss"]), repr(line["loss"] * (1 + 1e-15)))
    found = _again(kit, run, 3, step_only=True)
    assert not found.equal and found.first_difference.startswith("metrics.jsonl line 3, loss: recorded")
    assert list(found.table.query("not equal")["what"].unique()) == ["metrics: loss"]


def test_damage_to_a_line_is_named_also_where_it_lies_between(run: Path, kit: Experiment):
    _edit(run / "metrics.jsonl", '"iteration": 2', '"iteration": 7')
    place, rest = run / "checkpoints" / "iter_000002", run.parent / "elsewhere"
    assert "line 2, iteration: recorded 7, replayed 2" in _again(kit, run, 2).first_difference
    place.rename(rest)  # now iteration 2 lies between the start and iteration 3
    assert "line 2, iteration: recorded 7, replayed 2" in _again(kit, run, 3).first_difference
    _edit(run / "metrics.jsonl", '"iteration": 7', '"iteration" 7')
    assert _again(kit, run, 2).first_difference.startswith("metrics.jsonl line 2: ")


def test_changed_cell_of_a_rollout_is_named(run: Path, kit: Experiment):
    place = run / "rollouts" / "iter_000003.parquet"
    table = pd.read_parquet(place)
    numbers = ("reward", "reward/gold", "advantage", "old_logprobs", "ref_logprobs", "new_logprobs")
    for row, column in enumerate(numbers):
        values = list(table[column])
        values[row] = values[row] * (1 + 2e-7) + 1e-12
        table[column] = values
    table.loc[6, "enhanced_prompt"] += "."
    table.to_parquet(place, index=False)
    found = _again(kit, run, 3)
    for row, column in enumerate([*numbers, "enhanced_prompt"]):
        named = [one for one in found.comparisons if one.what == f"rollout: {column}"]
        assert len(named) == (2 if column in COMPUTED_BY_THE_STEP else 1)
        text = f"rollouts/iter_000003.parquet, {column}[{row}]"
        assert all(one.difference.startswith(text) for one in named), named
    assert found.table.query("what == 'rollout: tokens'")["equal"].all()


def test_flipped_bit_of_a_rollout_or_a_picture_is_found(runs: dict[str, Path], tmp_path: Path):
    whole, damaged = runs["all weights"], Path(shutil.copytree(runs["all weights"], tmp_path / "run"))
    source = random.Random(0)
    picture = sorted((whole / "thumbnails").glob("iter_000003_*.jpg"))[2]
    for name in ["rollouts/iter_000003.parquet"] * 60 + [picture.relative_to(whole).as_posix()] * 10:
        content = bytearray((whole / name).read_bytes())
        content[source.randrange(len(content))] ^= 1 << source.randrange(8)
        (damaged / name).write_bytes(content)
        found = _Record(damaged, 3, {}).compared_rollout(WHOLE, whole)
        assert any(name in (one.difference or "") for one in found)
        shutil.copyfile(whole / name, damaged / name)
    assert all(one.equal for one in _Record(damaged, 3, {}).compared_rollout(WHOLE, whole))


def _flip(place: Path) -> None:
    content = bytearray(place.read_bytes())
    content[-5] ^= 1
    place.write_bytes(content)


def test_damaged_checkpoint_is_passed_over_with_its_reason_and_is_a_difference_of_its_own_iteration(
    run: Path, kit: Experiment
):
    _flip(next((run / "checkpoints" / "iter_000002").rglob("optimizer.safetensors")))
    found = _again(kit, run, 3)
    assert found.equal and found.started_from == "the config's own models"
    assert len(found.skipped) == 1 and "iter_000002" in found.skipped[0] and "optimizer" in str(found)
    assert "checkpoints/iter_000002: checkpoint iter_000002: optimizer" in _again(kit, run, 2).first_difference


def test_verdict_names_what_changed_since_but_only_where_something_differs(run: Path, kit: Experiment):
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["machine"]["threads"] == str(torch.get_num_threads())
    recorded["versions"]["torch"], recorded["machine"]["threads"] = "1.2.3", "96"
    (run / "config.json").write_text(json.dumps(recorded))
    found = _again(kit, run, 1, step_only=True)
    here = {"torch": library_versions()["torch"], "threads": str(torch.get_num_threads())}
    assert found.changed == {"torch": ("1.2.3", here["torch"]), "threads": ("96", here["threads"])}
    assert found.verdict.endswith("compared") and "\n" not in found.verdict
    _edit(run / "metrics.jsonl", '"unscored": 0.0', '"unscored": 1.0')
    text = _again(kit, run, 1, step_only=True).verdict
    assert "torch 1.2.3 then" in text and "threads 96 then" in text and "unscored: recorded 1.0, replayed 0.0" in text


def test_notebook_shows_the_table_with_its_texts_escaped(runs: dict[str, Path], kit: Experiment):
    found = _again(kit, runs["all weights"], 1, step_only=True)
    found = dataclasses.replace(found, skipped=["<script>x</script>"])
    page = found._repr_html_()
    assert "<script>" not in page and found.verdict in page and "metrics: reward" in page


def _compared(recorded: dict, replayed: dict) -> list[Comparison]:
    """A line of metrics.jsonl, as JSON has it, beside metrics."""
    return compare_line("p", json.dumps({"iteration": 1} | recorded).encode(), {"iteration": 1} | replayed)


@pytest.mark.parametrize(
    ("recorded", "replayed"),
    [({"a": 0.0}, {"a": -0.0}), ({"a": 1.0}, {}), ({}, {"a": 1.0}), ({"a": None}, {"a": 0.0}), ({"a": 1}, {"a": 1.0})],
)
def test_numbers_that_only_look_alike_differ(recorded: dict, replayed: dict):
    assert [one.equal for one in _compared(recorded, replayed)] == [True, False]
    assert all(one.equal for one in _compared(replayed, replayed))
    assert not compare_line("p", json.dumps(recorded).encode(), {"iteration": 1} | replayed, as_one=True)[0].equal


def test_flipped_bit_of_a_line_is_found_wherever_no_seconds_stand():
    line = b'{"iteration": 4, "loss": -0.029126213863492012, "kl": 1e-05, "clip_ratio/low_mean": null}'
    metrics = {"iteration": 4, "loss": -0.029126213863492012, "kl": 1e-05, "clip_ratio/low_mean": float("nan")}
    assert all(one.equal for one in compare_line(WHOLE, line, metrics))
    for place in range(len(line)):
        for bit in range(8):
            damaged = bytearray(line)
            damaged[place] ^= 1 << bit
            assert not all(one.equal for one in compare_line(WHOLE, bytes(damaged), metrics)), bytes(damaged)


def test_nan_is_what_metrics_has_null_for_and_seconds_are_left_out():
    found = _compared({"a": None, "step_time": 1.0}, {"a": float("nan"), "time/images": 2.0})
    assert [one.what for one in found] == ["metrics: iteration", "metrics: a"] and all(one.equal for one in found)


def test_tables_and_tensors_of_other_shapes_differ():
    def differ(recorded: object, replayed: object) -> bool:
        found = compare("p", "w", "w", recorded, replayed)
        assert found.equal == (found.recorded == found.replayed) and "\n" not in (found.difference or "")
        return not found.equal

    table = pd.DataFrame({"a": [1.0, 2.0]})
    for other in (table[:1], table.rename(columns={"a": "b"}), table.astype("int64")):
        assert differ(table.to_dict("list"), other.to_dict("list"))
    one = torch.zeros(2000, 3)
    spoilt = one.clone()
    spoilt[1000, 1] = 1e-30
    for other in (-one, one.T, one.double(), one[:1], one.flatten(), spoilt, ABSENT):
        assert differ({"x": one}, {"x": other})
    assert differ({"x": one}, {}) and not differ({"x": one}, {"x": one.clone()})
    assert "x[3001]: recorded 0.0, replayed 1.0" in compare("p", "w", "w", {"x": one}, {"x": spoilt}).difference


# --- a replay that forgets something would be noticed -----------------------------------------------------------------


def wrong_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """It starts from the checkpoint after the one that it means."""
    load = grpo_kit.runs.checkpoint.load_checkpoint
    patch.setattr(grpo_kit.runs.checkpoint, "load_checkpoint", lambda place: load(place.with_name("iter_000003")))


def momentum_left_out(patch: pytest.MonkeyPatch) -> None:
    """The moments of Adam begin at 0."""
    patch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)


def statistics_left_out(patch: pytest.MonkeyPatch) -> None:
    """The rewards' statistics begin at 0."""
    patch.setattr(Rewards, "load_state_dict", lambda self, state: None)


def state_not_put_back(patch: pytest.MonkeyPatch) -> None:
    """The whole iteration begins where its step alone ended."""
    patch.setattr(sys.modules[replay.__module__], "put_back", lambda kit, optimizer, state: None)


def iteration_before(patch: pytest.MonkeyPatch) -> None:
    """It draws what the iteration before drew."""
    module = sys.modules[replay.__module__]
    patch.setattr(module, "run_iteration", lambda kit, optimizer, i: run_iteration(kit, optimizer, i - 1))


FORGETTING = {  # → whether the step alone shows it
    wrong_checkpoint: True,
    momentum_left_out: True,
    statistics_left_out: True,
    state_not_put_back: False,
    iteration_before: False,
}


@pytest.mark.parametrize("forget", FORGETTING)
def test_replay_that_forgets_something_is_not_equal(
    runs: dict[str, Path], kit: Experiment, monkeypatch: pytest.MonkeyPatch, forget: Callable
):
    forget(monkeypatch)
    found = _again(kit, runs["running statistics"], 3, "running statistics", step_only=FORGETTING[forget])
    assert not found.equal and found.first_difference


def test_restored_state_is_the_checkpoints(runs: dict[str, Path], kit: Experiment):
    own = _fresh(kit)
    optimizer = make_optimizer(own, own.config)
    untrained = copied_state(own, optimizer)
    assert restore_after(own, optimizer, runs["all weights"], 3) == (3, [], [])
    trained = copied_state(own, optimizer)
    assert not compare("p", "w", "w", untrained["weights"], trained["weights"]).equal
    put_back(own, optimizer, untrained)
    assert compare("p", "w", "w", untrained, copied_state(own, optimizer)).equal
    assert not untrained["optimizer"] and trained["optimizer"]


# --- what is refused, and the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("iteration", [-1, 0, 4])
def test_iteration_that_is_not_there_is_one_line(runs: dict[str, Path], iteration: int):
    with pytest.raises(
        KitError, match=rf"iteration: found {iteration}, allowed in run all-weights: 1 to 3\. "
    ) as error:
        replay(runs["all weights"], iteration)
    assert "\n" not in str(error.value)


def test_experiment_with_other_settings_is_refused(runs: dict[str, Path], kit: Experiment):
    with pytest.raises(KitError, match=r"model_settings\.lora: found None in the run"):
        replay(runs["all weights"], 1, kit=_fresh(kit, "adapter that sees"))


def _command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["replay", *arguments])
    return ended.value.code


def test_command_prints_table_and_verdict_and_exits_1_where_something_differs(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    assert _command(str(run), "--iteration", "1") == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("iteration 1: equal bit for bit")
    assert "metrics: reward" in printed and "part" in printed.splitlines()[4]
    _edit(run / "metrics.jsonl", '"unscored": 0.0', '"unscored": 1.0')
    assert _command(str(run), "--iteration", "1", "--step-only") == 1
    assert "unscored: recorded 1.0, replayed 0.0" in capsys.readouterr().out.splitlines()[-1]
    assert _command(str(run), "--iteration", "9") == 2
    assert _command(str(run), "--iteration", "1", "-o", "training_settings.beta=0") == 2
    assert "-o: found without --branch" in capsys.readouterr().err
