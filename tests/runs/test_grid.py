"""Grids: which trials a file asks for, what is refused before anything runs, what a failure or a stop leaves behind."""

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.grids import BODY, alive, command, lines, wait_for_number, write_notebook

from grpo_kit.config import PROJECT_ROOT, ConfigError, KitError
from grpo_kit.runs import notebooks as headless
from grpo_kit.runs.grid import (
    MOST,
    NAME_LENGTH,
    GridError,
    finished,
    grid_trials,
    plan_trials,
    read_grid,
    run_trial,
    run_trials,
    trial_folders,
    write_order,
)
from grpo_kit.runs.notebooks import NotebookError, select_notebooks


@pytest.fixture
def series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "notebooks"
    write_notebook(folder / "00_first.ipynb", BODY)
    write_notebook(folder / "01_other.ipynb", parameters='profile: str = "tiny"  # a profile\nsteps: int = 1  # steps')
    monkeypatch.setattr(headless, "NOTEBOOK_FOLDER", folder)
    return folder


# --- which trials -----------------------------------------------------------------------------------------------------


def test_a_mapping_stands_for_every_combination():
    trials = grid_trials({"group_size": [2, 8], "training_settings.beta": 0.04, "seeds": [0, 1]})
    assert [dict(trial.values) for trial in trials] == [
        {"group_size": size, "training_settings.beta": 0.04, "seed": seed} for size in (2, 8) for seed in (0, 1)
    ]
    assert trials[0].name == "group_size=2,beta=0.04,seed=0"


def test_a_list_of_mappings_stands_for_the_combinations_of_each():
    trials = grid_trials([{"group_size": 2, "seeds": [0, 1]}, {"group_size": 8, "label": "wide", "seed": 0}])
    assert [trial.name for trial in trials] == [
        "group_size=2,seed=0",
        "group_size=2,seed=1",
        "group_size=8,label=wide,seed=0",
    ]


YAML = "group_size: [2, 8]\nseeds: [0, 1]\n"
JSON = '{"group_size": [2, 8], "seeds": [0, 1]}'


@pytest.mark.parametrize("text", [YAML, JSON, f"\ufeff{YAML}"])
def test_a_file_is_yaml_or_json(tmp_path: Path, text: str):
    (tmp_path / "grid").write_text(text, encoding="utf-8")
    assert read_grid(tmp_path / "grid") == grid_trials({"group_size": [2, 8], "seeds": [0, 1]})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "found NoneType, allowed: names with lists"),
        ("{}", "found 0 trials"),
        ("[]", "found 0 trials"),
        ("group_size: []", "found no value"),
        ("group_size: null", "found None"),
        ("group_size: [[2]]", "found [2]"),
        ("group_size: {a: 1}", "found {'a': 1}"),
        ("1: [2]", "found the name 1"),
        ("- 3", "found list"),
        ("hello", "found str"),
        ("seeds: [0]\nseed: [1]", "found both seeds and seed"),
        ("seeds: [0, 1, 0]", "the trial 'seed=0' stands twice"),
        ("- seed: 1\n- seeds: [0, 1]", "the trial 'seed=1' stands twice"),
        ("seeds: [0]\nseeds: [1]", ":1: not YAML: 'seeds' stands twice"),
        ("a: [1\nb: 2", "not YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML"),
        ("a: &x [*x]", "allowed: numbers"),
        (
            "a: [" + ",".join(map(str, range(101))) + "]\nb: [" + ",".join(map(str, range(100))) + "]",
            "found 10100 trials",
        ),
    ],
)
def test_what_is_no_grid_is_one_line(tmp_path: Path, text: str, part: str):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(GridError) as error:
        read_grid(tmp_path / "g.yaml")
    assert part in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path):
    (tmp_path / "g.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "g.yaml"):
        with pytest.raises(GridError, match="grid "):
            read_grid(path)


scalars = st.one_of(st.integers(-9, 9), st.booleans(), st.floats(allow_nan=False), st.text(max_size=300))


values = st.lists(scalars, min_size=1, max_size=3)


@given(st.dictionaries(st.text(min_size=1, max_size=8), values, min_size=1, max_size=3))
def test_every_trial_has_a_folder_name_of_its_own_that_stays_in_the_folder(grid: dict):
    try:
        trials = grid_trials(grid)
    except GridError as error:
        assert "\n" not in str(error)
        return
    names = [trial.name.lower() for trial in trials]
    assert len(set(names)) == len(names) <= MOST
    for name in names:
        assert len(name) <= NAME_LENGTH and Path(name).name == name and name[0] not in ".-" and name.isascii()


# --- what is refused before anything runs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "error", "part"),
    [
        ({"gruop_size": [2]}, NotebookError, "did you mean group_size?"),
        ({"group_size": ["x"]}, NotebookError, "found 'x', allowed: int"),
        ({"group_size": [2.5]}, NotebookError, "found 2.5, allowed: int"),
        ({"group_size": [True]}, NotebookError, "found True, allowed: int"),
        ({"label": [8]}, NotebookError, "found 8, allowed: str"),
        ({"group_size": [8, 1]}, ConfigError, "training_settings.group_size: found 1, allowed: integer >= 2"),
        ({"training_settings.beta": [-1]}, ConfigError, "training_settings.beta"),
        ({"training_settings.betta": [0]}, ConfigError, "did you mean beta?"),
        (
            {"training_settings.group_size": 4, "group_size": 4},
            NotebookError,
            "as a setting and as the parameter",
        ),
        ({"beta": [0]}, NotebookError, "in a grid training_settings.beta"),
        ({"steps": [0]}, NotebookError, "not in 00_first, but in 01_other. Add that to --notebooks"),
        ({"profile": ["full"]}, NotebookError, "set it with --profile"),
        ({"run_dir": ["/etc"]}, NotebookError, "set it with --run-dir"),
    ],
)
def test_a_wrong_trial_stops_the_whole_grid(series: Path, tmp_path: Path, grid: dict, error: type, part: str):
    with pytest.raises(error) as caught:
        plan_trials(grid_trials(grid), select_notebooks(["00"]), "tiny", tmp_path / "grid")
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "grid").exists()


def test_what_all_trials_share_may_not_stand_in_the_grid_too(series: Path, tmp_path: Path):
    trials = grid_trials({"group_size": [2]})
    with pytest.raises(GridError, match="group_size: given for all trials and in the grid"):
        plan_trials(trials, select_notebooks(["00"]), "tiny", tmp_path, {"group_size": "4"})


def test_a_large_grid_wants_a_yes(series: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "g.yaml").write_text(f"seeds: {list(range(25))}")
    assert command("--grid", str(tmp_path / "g.yaml"), "--run-dir", str(tmp_path / "run")) == 2
    assert "25 trials of 1 notebook each, allowed: 24. Give --yes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_planned_trial_can_be_sent_to_another_process(series: Path, tmp_path: Path):
    planned = plan_trials(grid_trials({"seeds": [0]}), select_notebooks(["00"]), "tiny", tmp_path)
    assert pickle.loads(pickle.dumps(planned)) == planned


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failed_trial_ends_itself_and_not_the_others_and_a_second_start_runs_only_it(
    series: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "g.yaml").write_text("training_settings.beta: 0.5\nseeds: [1, 2, 3]")
    run, arguments = tmp_path / "run", ("--grid", str(tmp_path / "g.yaml"), "--run-dir", str(tmp_path / "run"))
    assert command(*arguments, "-p", "label=$x") == 1
    captured = capsys.readouterr()
    assert "[2/3] beta=0.5,seed=2" in captured.out and "comparison: " in captured.out
    assert "beta=0.5,seed=2 failed: 00_first: cell [3]: ZeroDivisionError" in captured.err
    assert "1 of 3 trials failed" in captured.err
    for seed in (1, 2, 3):
        assert lines(run / f"beta=0.5,seed={seed}") == [[0, "$x", seed, 0.5]]
        assert (run / f"beta=0.5,seed={seed}" / "notebooks" / "00_first.html").is_file()
    page = (run / "index.html").read_text()
    assert all(f"./beta%3D0.5%2Cseed%3D{seed}/index.html" in page for seed in (1, 2, 3))

    assert command(*arguments, "-p", "label=$x") == 1
    assert "[1/3] beta=0.5,seed=1, finished before" in capsys.readouterr().out
    assert [len(lines(run / f"beta=0.5,seed={seed}")) for seed in (1, 2, 3)] == [1, 2, 1]


def test_a_folder_that_holds_another_trial_is_left_alone(series: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "g.yaml").write_text("seeds: [0]")
    arguments = ("--grid", str(tmp_path / "g.yaml"), "--run-dir", str(tmp_path / "run"))
    assert command(*arguments) == 0
    assert command(*arguments, "-o", "training_settings.beta=0.5") == 2
    assert "holds another trial (values differs)" in capsys.readouterr().err
    assert command(*arguments, "--profile", "workshop") == 2
    assert "holds another trial (config differs)" in capsys.readouterr().err
    assert len(lines(tmp_path / "run" / "seed=0")) == 1


def test_a_finished_trial_says_again_what_it_brought(series: Path, tmp_path: Path):
    (planned,) = plan_trials(grid_trials({"seeds": [0]}), select_notebooks(["00"]), "tiny", tmp_path / "grid")
    assert finished(planned) is None
    result = run_trial(planned)
    assert finished(planned) == result and result.error is None and result.minutes > 0
    assert trial_folders(tmp_path / "grid") == [planned.folder]


def test_a_grids_folder_lists_its_trials_in_the_grids_order(series: Path, tmp_path: Path):
    grids = [grid_trials({"seeds": seeds}) for seeds in ([3, 1], [0, 3, 1])]  # the second start is of a larger grid
    for planned in [plan_trials(grid, select_notebooks(["00"]), "tiny", tmp_path / "grid") for grid in grids]:
        write_order(tmp_path / "grid", planned)
        for trial in planned:
            trial.folder.mkdir(exist_ok=True)
            (trial.folder / "trial.json").write_text("{}")
    assert [path.name for path in trial_folders(tmp_path / "grid")] == ["seed=3", "seed=1", "seed=0"]
    (tmp_path / "grid" / "grid.json").unlink()
    assert [path.name for path in trial_folders(tmp_path / "grid")] == ["seed=0", "seed=1", "seed=3"]


def test_a_damaged_record_is_named(series: Path, tmp_path: Path):
    trials = grid_trials({"seeds": [0]})
    (planned,) = plan_trials(trials, select_notebooks(["00"]), "tiny", tmp_path)
    planned.folder.mkdir(parents=True)
    for content in ("{", "[]"):
        (planned.folder / "trial.json").write_text(content)
        with pytest.raises(KitError, match=r"trial\.json: .* delete it"):
            plan_trials(trials, select_notebooks(["00"]), "tiny", tmp_path)


def test_trials_run_only_when_they_are_asked_for(series: Path, tmp_path: Path):
    planned = plan_trials(grid_trials({"seeds": [0, 1]}), select_notebooks(["00"]), "tiny", tmp_path)
    results = run_trials(planned)
    assert next(results).name == "seed=0" and not planned[1].folder.exists()


@pytest.mark.slow
def test_a_grid_that_is_terminated_takes_its_kernel_along_and_goes_on_later(series: Path, tmp_path: Path):
    write_notebook(
        series / "00_first.ipynb",
        "import os, time, pathlib\npathlib.Path(run_dir, 'pid').write_text(str(os.getpid()))\n"
        "if seed == 1 and not pathlib.Path(run_dir, 'again').exists(): time.sleep(120)",
    )
    (tmp_path / "g.yaml").write_text("seeds: [0, 1]")
    run = tmp_path / "run"
    code = f"import grpo_kit.runs.notebooks as h, pathlib; h.NOTEBOOK_FOLDER = pathlib.Path({str(series)!r})\n"
    code += "import grpo_kit.cli; grpo_kit.cli.main(['run', '--notebooks', '00', "
    code += f"'--grid', {str(tmp_path / 'g.yaml')!r}, '--run-dir', {str(run)!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL)
    pid = wait_for_number(run / "seed=1" / "pid")
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) == 143
    deadline = time.monotonic() + 600
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)
    assert json.loads((run / "seed=0" / "trial.json").read_text())["status"] == "done"
    assert json.loads((run / "seed=1" / "trial.json").read_text())["status"] == "started"
    stopped = nbformat.read(run / "seed=1" / "notebooks" / "00_first.ipynb", as_version=4)
    assert stopped.metadata["grpo_kit"] == {"stopped": "interrupted"}
    (run / "seed=1" / "again").touch()
    assert command("--grid", str(tmp_path / "g.yaml"), "--run-dir", str(run)) == 0


# --- the recorded grid ------------------------------------------------------------------------------------------------


def test_the_recorded_grid_holds_what_its_file_asks_for():
    folder = PROJECT_ROOT / "data" / "demo_grid"
    asked = [trial.values for trial in read_grid(folder / "grid.yaml")]
    runs = pd.read_json(folder / "runs.jsonl", lines=True)
    assert sorted(runs["seed"]) == sorted(values["seed"] for values in asked)
    assert set(runs["iterations"]) == {60} and not runs[["gold/trained", "reward/trained"]].isna().any(axis=None)
    for values in asked:
        changed = {name.split(".")[-1]: value for name, value in values.items()}
        assert len(runs[(runs[list(changed)] == pd.Series(changed)).all(axis=1)]) >= 1, changed
    curves = pd.read_parquet(folder / "curves.parquet")
    assert len(curves) == 60 * len(runs) and set(curves["setting"]) == set(runs["setting"])


def test_the_recorded_grid_can_be_run_again_by_the_command_in_its_readme():
    folder = PROJECT_ROOT / "data" / "demo_grid"
    common = {"num_iterations": "60", "seeds_per_prompt": "2"}
    settings = {"evaluation_settings.num_prompts": "64"}
    for name, value in {**common, **settings}.items():
        assert f"{name}={value}" in (folder / "README.md").read_text(encoding="utf-8")
    trials = read_grid(folder / "grid.yaml")
    planned = plan_trials(
        trials, select_notebooks(["07", "08"]), "tiny", PROJECT_ROOT / "reports" / "x", common, settings
    )
    assert len(planned) == len(trials)
