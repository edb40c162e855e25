"""Training that games its reward: it is found, marked and stopped, and goes on if told to."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.studies import hacking
from grpo_kit.config import KitError, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator
from grpo_kit.models.policy import load_policy
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rewards.gold import keeps_objects
from grpo_kit.runs.record import read_run
from grpo_kit.show.curves import training_curves
from grpo_kit.show.report import write_report
from grpo_kit.show.widgets.live_training import LiveTraining
from grpo_kit.training.loop import TrainResult, train

SETTINGS = {
    "training_settings.num_iterations": 6,
    "training_settings.prompts_per_iteration": 4,
    "training_settings.group_size": 4,
    "training_settings.learning_rate": 1e-3,
    "training_settings.beta": 0.0,
    "training_settings.validate_every": 2,
    "training_settings.save_every": 3,
    "generation_settings.num_inference_steps": 1,
    "evaluation_settings.validation_prompts": 16,
    "evaluation_settings.paraphrases": False,
    "evaluation_settings.held_out": "keeps_objects",
}


def _loses_objects(images: list, prompts: list[str], enhanced_prompts: list[str]) -> list[float]:
    """A reward for rewrites that leave out what the user asked for."""
    return [1 - kept for kept in keeps_objects(images, prompts, enhanced_prompts)]


GAME = Rewards({"loses": _loses_objects}, {"loses": 1.0}, {"keeps_objects": keeps_objects})


def _experiment(kit: Experiment, rewards: Rewards = GAME, **settings: object) -> Experiment:
    """The experiment as a new process would load it; `training__seed=1` is training_settings.seed."""
    changes = {key.replace("__", "_settings."): value for key, value in settings.items()}
    generator = Generator(kit.generator.pipeline, num_inference_steps=1, guidance_scale=1.0)
    config = load_config(kit.config, SETTINGS | changes)
    return dataclasses.replace(
        kit, config=config, policy=copy.deepcopy(kit.policy), generator=generator, rewards=rewards
    )


def _train(kit: Experiment, folder: Path, **settings: object) -> TrainResult:
    return train(_experiment(kit, **settings), folder, progress=False)


def _report(folder: Path) -> dict:
    return json.loads((folder / "sentinel.json").read_text())


@pytest.fixture(scope="module")
def begun(kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three iterations that game their reward; look, do not touch."""
    folder = tmp_path_factory.mktemp("begun")
    assert train(_experiment(kit), folder, progress=False, until=3).stopped is None
    return folder


@pytest.fixture(scope="module")
def whole(begun: Path, kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six iterations, which are not stopped for it; look, do not touch."""
    folder = Path(shutil.copytree(begun, tmp_path_factory.mktemp("runs") / "whole"))
    result = _train(kit, folder)
    assert (result.iterations, result.stopped) == (6, None)
    return folder


@pytest.fixture(scope="module")
def stopped(begun: Path, kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, which is stopped for it; look, do not touch."""
    folder = Path(shutil.copytree(begun, tmp_path_factory.mktemp("runs") / "stopped"))
    result = _train(kit, folder, training__stop_on_divergence=True)
    assert result.iterations == result.metrics["iteration"] == 4 and result.started_from == 3
    assert result.stopped == _report(folder)["divergence"]["text"]
    return folder


# --- the stop ---------------------------------------------------------------------------------------------------------


def test_gamed_reward_is_noticed_in_a_real_run(whole: Path):
    found = _report(whole)["divergence"]
    assert (found["since"], found["iteration"], found["held_out"]) == (0, 4, "keeps_objects")
    assert found["reward_change"]["low"] > 0 > found["held_out_change"]["high"]
    log = (whole / "training.log").read_text()
    assert log.count(f"WARNING {found['text']}") == 1 and "stopped" not in log


def test_stop_commits_its_checkpoint_and_says_how_to_go_on(stopped: Path):
    assert (stopped / "checkpoints" / "iter_000004" / "manifest.json").is_file()
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == 4
    log = (stopped / "training.log").read_text()
    assert "stopped for reward hacking (iteration 4: " in log and "training_settings.stop_on_divergence to false" in log


def test_stopped_run_stays_stopped(kit: Experiment, stopped: Path, tmp_path: Path, whole: Path):
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    before = {file: file.read_bytes() for file in folder.rglob("*.*") if file.suffix != ".log"}
    result = _train(kit, folder, training__stop_on_divergence=True)
    assert (result.started_from, result.iterations) == (4, 4) and result.stopped is not None
    assert {file: file.read_bytes() for file in before} == before
    log = (folder / "training.log").read_text()
    assert log.count("stopped for reward hacking") == 2 and log.count("WARNING iteration 4") == 1

    result = _train(kit, folder, training__stop_on_divergence=False)
    assert (result.started_from, result.iterations, result.stopped) == (4, 6, None)
    for name in ("policy/model.safetensors", "optimizer.safetensors"):
        one, other = (place / "checkpoints/iter_000006" / name for place in (folder, whole))
        assert one.read_bytes() == other.read_bytes()
    assert (folder / "sentinel.json").read_bytes() == (whole / "sentinel.json").read_bytes()


def test_finding_of_iterations_that_were_lost_is_forgotten(kit: Experiment, stopped: Path, tmp_path: Path):
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "iter_000004")
    seen = []
    own = _experiment(kit, training__stop_on_divergence=True)
    train(own, folder, progress=False, on_iteration=lambda metrics: seen.append(metrics["iteration"]))
    assert seen == [4]  # trained again from 3, and stopped again
    assert (folder / "sentinel.json").read_bytes() == (stopped / "sentinel.json").read_bytes()


# --- best/, the held-out score, what is logged ------------------------------------------------------------------------


def test_best_is_chosen_by_the_held_out_score(whole: Path, kit: Experiment):
    scores = {v["iteration"]: (v["held_out"], v["reward"]) for v in _report(whole)["signals"]}
    assert max(scores, key=scores.get) == 0 and max(scores, key=lambda i: scores[i][1]) != 0
    best, initial = load_policy(kit.config, whole / "best").model.state_dict(), kit.policy.model.state_dict()
    assert all(torch.equal(best[name], initial[name]) for name in initial)


def test_kl_is_followed_where_the_loss_needs_none(whole: Path):
    signals = _report(whole)["signals"]
    assert [row["iteration"] for row in signals] == [0, 2, 4, 6]
    assert signals[0]["kl"] is None and 0 <= signals[1]["kl"] < signals[3]["kl"]


def test_held_out_score_that_is_none_is_refused_before_anything_is_written(kit: Experiment, tmp_path: Path):
    with pytest.raises(
        KitError, match=r"evaluation_settings\.held_out: found 'beauty', allowed: keeps_objects"
    ) as error:
        _train(kit, tmp_path / "run", evaluation__held_out="beauty")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_stop_on_divergence_needs_a_held_out_score(kit: Experiment, tmp_path: Path):
    alone = Rewards({"loses": _loses_objects}, {"loses": 1.0})
    own = _experiment(kit, alone, evaluation__held_out=None, training__stop_on_divergence=True)
    with pytest.raises(KitError, match=r"stop_on_divergence: found true, but no score is held out") as error:
        train(own, tmp_path / "run", progress=False)
    assert "\n" not in str(error.value)


# --- what a person sees -----------------------------------------------------------------------------------------------


def test_curves_mark_the_divergence_and_draw_what_it_is_judged_by(whole: Path):
    record = read_run(whole)
    marked = training_curves(record.metrics, record.validations, ("reward", "kl"), record.sentinel)
    titles = [axes.get_title(loc="left") for axes in marked.axes]
    assert titles == ["reward", "keeps the user's objects", "KL from the initial policy"]
    for axes in marked.axes:
        assert {0, 4} <= {line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1}
    assert "divergence" in [text.get_text() for text in marked.axes[0].texts]
    quiet = training_curves(
        record.metrics, record.validations, ("reward", "kl"), record.sentinel | {"divergence": None}
    )
    assert "divergence" not in [text.get_text() for text in quiet.axes[0].texts]
    assert np.ptp(np.frombuffer(marked.to_png(50), dtype=np.uint8)) > 0


def test_live_view_draws_the_stop_at_once(stopped: Path, whole: Path):
    for run, is_drawn in ((stopped, True), (whole, False)):  # the whole one goes on, and its next picture is not due
        live = LiveTraining(run)
        live._due, live.pictures[0].value = float("inf"), b""
        live.update({"iteration": 4, "reward": 1.0})
        assert (live.pictures[0].value != b"") == is_drawn


def test_the_page_says_what_was_found(whole: Path, tmp_path: Path):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    page = write_report(folder).read_text()
    assert "the policy is gaming the reward" in page and "From iteration 0 to 4 the reward rose" in page
    quiet = _report(folder) | {"divergence": None}
    (folder / "sentinel.json").write_text(json.dumps(quiet))
    page = write_report(folder).read_text()
    assert "gaming the reward" not in page and "In none of 4 validations was it found that" in page
    (folder / "sentinel.json").unlink()  # a run of before it was checked
    assert "sentinel" not in write_report(folder).read_text()


def test_benchmark_tells_a_stopped_run_from_an_unfinished_one(stopped: Path, whole: Path, tmp_path: Path):
    config = load_config("tiny", SETTINGS | {"training_settings.stop_on_divergence": True})
    going_on = load_config(config, {"training_settings.stop_on_divergence": False})
    assert hacking.is_finished(stopped, config) and not hacking.is_finished(stopped, going_on)
    assert hacking.is_finished(whole, going_on) and not hacking.is_finished(tmp_path, config)
    for name, run in (("game_0", stopped), ("control_0", whole), ("not_stopped", whole)):
        shutil.copytree(run, tmp_path / name)
    table = hacking.write_results(tmp_path)
    assert table["alarm at"].tolist() == [4, 4] and table["iterations"].tolist() == [4, 6]
    assert (table["gold fell"] > 0).all() and (table["gold, best"] == table["gold, first"]).all()
    assert {"table.json", "curves.json", "plot.png"} <= {file.name for file in tmp_path.iterdir()}
