"""W9 and W10: what a commit takes of an iteration, and one run by two processes."""

import json
from pathlib import Path

import pytest
from support.config_files import save_config
from support.quick_runs import QUICK

from benchmarks.speed import checkpoints, measure, two_processes
from benchmarks.speed.results import BenchmarkError, Settings
from grpo_kit.config import load_config


@pytest.mark.slow
def test_a_commit_is_timed_apart_from_its_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "RESAMPLES", 99)
    profile = save_config(load_config("tiny", QUICK), tmp_path / "quick.json")
    found = checkpoints.checkpoints(Settings(pairs=1), str(profile))
    rows = found.cases[0]["raw"]
    assert len(rows) == 4 + checkpoints.SKIPPED + 1  # and the last one, at the end of the run
    assert all(0 < row["commit"] < row["iteration"] for row in rows[:-1])
    assert 0 < found.figures[0].value < 100 and found.figures[0].must == 3


def recorded(run: Path, seconds: float, reward: float) -> None:
    run.mkdir(parents=True)
    lines = [{"iteration": n, "reward": reward, "step_time": seconds} for n in range(1, 11)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("reward", [0.5, 0.6])
def test_efficiency_counts_only_where_both_do_the_same(monkeypatch: pytest.MonkeyPatch, reward: float):
    found = {1: (3.6, 0.5), 2: (2.0, reward)}  # processes → seconds of an iteration, mean reward
    monkeypatch.setattr(two_processes, "_train", lambda run, count: recorded(run, *found[count]))
    if reward == 0.5:
        assert two_processes.two_processes(Settings(quick=True)).figures[0].value == pytest.approx(0.9)
    else:
        with pytest.raises(BenchmarkError, match="metrics of the first iteration"):
            two_processes.two_processes(Settings(quick=True))
