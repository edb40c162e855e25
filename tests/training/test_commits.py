"""F4: a run is committed by iterations or by minutes, and an interrupt costs none of its complete iterations."""

import json
import signal
from pathlib import Path

import pytest
import torch
from support.config_files import save_config
from support.grids import command, write_notebook
from support.quick_runs import committed, fresh, left

from grpo_kit.config import load_config
from grpo_kit.experiment import Experiment
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rewards.shaping import Shaping
from grpo_kit.runs import notebooks as headless
from grpo_kit.training import accumulation
from grpo_kit.training.loop import train
from tests.chaos import signals as r4

pytestmark = pytest.mark.field("F4")


@pytest.fixture(scope="module")
def whole(kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What four iterations leave that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(fresh(kit), folder, progress=False)
    assert committed(folder) == [0, 4]
    return left(folder)


def _interrupted_in_scoring(own: Experiment, call: int, stop: type[BaseException], folder: Path) -> None:
    """Train, with an interrupt in the n-th scoring, as Ctrl-C makes it."""
    right, calls = Rewards.score, []

    def score(self: Rewards, *args: object, **options: object) -> dict[str, torch.Tensor]:
        calls.append(right(self, *args, **options))
        if len(calls) == call:
            raise stop
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(stop):
        patch.setattr(Rewards, "score", score)
        train(own, folder, progress=False)


# pictures are scored once in each validation (0, 2, 4) and once an iteration: calls 1 | 2, 3, 4 | 5, 6, 7
@pytest.mark.parametrize(
    ("call", "stop", "kept"),
    [
        (5, KeyboardInterrupt, [0, 2]),
        (6, SystemExit, [0, 3]),
        (4, SystemExit, [0]),  # in a validation: the weights are the second iteration's, whose files are not all there
    ],
)
def test_interrupt_commits_the_last_complete_iteration_and_the_run_goes_on_to_the_same_bytes(
    kit: Experiment, whole: dict[str, str], tmp_path: Path, call: int, stop: type[BaseException], kept: list[int]
):
    _interrupted_in_scoring(fresh(kit), call, stop, tmp_path)
    assert committed(tmp_path) == kept
    assert train(fresh(kit), tmp_path, progress=False).started_from == kept[-1]
    assert left(tmp_path) == whole


def test_a_notebook_s_stop_between_iterations_commits_and_the_same_objects_go_on(
    kit: Experiment, whole: dict[str, str], tmp_path: Path
):
    def stop(metrics: dict[str, float]) -> None:
        if metrics["iteration"] == 3:
            raise KeyboardInterrupt

    own = fresh(kit)
    with pytest.raises(KeyboardInterrupt):
        train(own, tmp_path, progress=False, on_iteration=stop)
    assert committed(tmp_path) == [0, 3]
    train(own, tmp_path, progress=False)
    assert left(tmp_path) == whole


def test_half_a_step_is_not_committed(
    kit: Experiment, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    right, steps = accumulation.step_or_restore, []

    def stopped(optimizer: torch.optim.Optimizer, agreed: object) -> bool:
        steps.append(right(optimizer, agreed))
        if len(steps) == 3:  # the weights are the third iteration's, and nothing says so yet
            raise KeyboardInterrupt
        return steps[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(accumulation, "step_or_restore", stopped)
        train(fresh(kit), tmp_path, progress=False)
    assert committed(tmp_path) == [0]
    train(fresh(kit), tmp_path, progress=False)
    assert left(tmp_path) == whole


def test_statistics_of_rewards_are_committed_as_the_complete_iteration_left_them(
    kit: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def own() -> Experiment:
        shaped = Rewards(kit.rewards.parts, kit.rewards.weights, shaping={"clip_similarity": Shaping("running")})
        return fresh(kit, num_iterations=3, advantage_eps=1.0).with_rewards(shaped)

    train(own(), tmp_path / "whole", progress=False)
    right, rollouts = Rewards.combined, []

    def stopped(self: Rewards, *args: object) -> torch.Tensor:
        rollouts.append(right(self, *args))  # the third rollout's scores are in the statistics
        if len(rollouts) == 3:
            raise KeyboardInterrupt
        return rollouts[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Rewards, "combined", stopped)
        train(own(), tmp_path / "run", progress=False)
    assert committed(tmp_path / "run") == [0, 2]
    train(own(), tmp_path / "run", progress=False)
    assert left(tmp_path / "run") == left(tmp_path / "whole")


def test_minutes_commit_too_and_change_nothing_but_the_checkpoints(
    kit: Experiment, whole: dict[str, str], tmp_path: Path
):
    seen = []
    own = fresh(kit, save_minutes=1e-9)
    train(own, tmp_path, progress=False, on_iteration=lambda metrics: seen.append(committed(tmp_path)))
    assert seen == [[0, 1], [1, 2], [2, 3], [3, 4]] and left(tmp_path) == whole


def test_by_iterations_alone_and_until(kit: Experiment, whole: dict[str, str], tmp_path: Path):
    own = fresh(kit, save_minutes=None)
    assert train(own, tmp_path, progress=False, until=3).iterations == 3 and committed(tmp_path) == [0, 3]
    assert not (tmp_path / "validation_iter_000003.json").exists()  # as if it had been interrupted
    assert train(own, tmp_path, progress=False, until=2).iterations == 3
    train(own, tmp_path, progress=False)
    assert left(tmp_path) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_interrupted_says_what_it_committed(tmp_path: Path, number: signal.Signals):
    settings = r4.SETTINGS | {"training_settings.save_every": 120}
    profile = save_config(load_config("tiny", settings), tmp_path / "quick.json")
    ended = r4.interrupted_train(profile, tmp_path / "run", "images", 0.5, number)
    assert not r4.problems(ended, number, tmp_path / "run") and committed(tmp_path / "run") == [0, 1]
    assert "interrupted; iteration 1 is committed" in (tmp_path / "run" / "training.log").read_text()


@pytest.mark.slow
def test_a_cell_s_time_limit_costs_no_iterations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    settings = dict.fromkeys(
        [f"training_settings.{n}" for n in ("num_iterations", "save_every", "validate_every")], 999
    )
    profile = save_config(load_config("tiny", r4.SETTINGS | settings), tmp_path / "quick.json")
    load = ("import grpo_kit as gk\nload = gk.load_experiment", "kit = load(gk.load_config(profile))")  # each is short
    write_notebook(tmp_path / "series" / "00_train.ipynb", *load, "gk.train(kit, run_dir, progress=False)")
    monkeypatch.setattr(headless, "NOTEBOOK_FOLDER", tmp_path / "series")
    run, minutes, lengths = tmp_path / "run", 0.05, [0]
    while len({*lengths}) < 3:  # until it has come further twice
        options = ["--run-dir", str(run), "--minutes-per-cell", str(minutes)]
        assert minutes < 4 and command("--profile", str(profile), *options) == 1
        assert "a cell ran longer than" in capsys.readouterr().err
        lengths.append(max(committed(run), default=0))
        minutes *= 1 if lengths[-1] > lengths[-2] else 2  # a busy machine may need all its time to load
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lengths == sorted(lengths)
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
