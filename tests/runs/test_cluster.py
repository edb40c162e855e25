"""Grids over Ray, on a real cluster of two workers: what comes back, what is tried again, what a stop leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import nbformat
import pytest
from support.grids import alive, command, lines, wait_for_number, write_notebook

from grpo_kit.config import PROJECT_ROOT
from grpo_kit.runs import cluster as grid_ray
from grpo_kit.runs import notebooks as headless
from grpo_kit.runs.cluster import Cluster, check_machines, connected, probe_file, run_trials_on_ray
from grpo_kit.runs.grid import GridError, PlannedTrial, TrialResult, grid_trials, plan_trials, run_trial
from grpo_kit.runs.notebooks import select_notebooks

ray = pytest.importorskip("ray")
TWO = Cluster(workers=2)
PARAMETERS = """profile: str = "tiny"  # a profile
run_dir: str = ""  # a folder
case: str = "well"  # what happens to it
seed: int = 0  # a seed"""
# What a trial does: note which processes it ran in, then as its case says; Ray's worker is above the warm process.
BODY = """import json, os, pathlib, psutil, random, signal, time
here, worker = pathlib.Path(run_dir), psutil.Process().parent()
worker = worker.parent() if any("warm_process" in part for part in worker.cmdline()) else worker
log = (here / "log.jsonl").open("a")
print(json.dumps([case, seed, os.getpid(), worker.pid]), file=log, flush=True)
first = not (here / "tried").exists()
(here / "tried").touch()
if case == "bad": 1 / 0
if case == "kernel dies once" and first: os.kill(os.getpid(), signal.SIGKILL)
if case == "worker dies" or (case == "worker dies once" and first):
    os.kill(worker.pid, signal.SIGKILL); time.sleep(60)
if case == "waits":
    (here / "pid").write_text(str(os.getpid()))
    while first: time.sleep(0.1)
print(random.Random(seed).random(), file=(here / "result").open("w"))"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster with room for two trials at once; its address, for other processes."""
    with connected(TWO):
        yield ray.get_runtime_context().gcs_address


@pytest.fixture
def series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "notebooks"
    write_notebook(folder / "00_first.ipynb", BODY, parameters=PARAMETERS)
    monkeypatch.setattr(headless, "NOTEBOOK_FOLDER", folder)
    return folder


def planned(folder: Path, **grid: list) -> list[PlannedTrial]:
    return plan_trials(grid_trials(grid), select_notebooks(["00"]), "tiny", folder)


def run_all(trials: list[PlannedTrial], again: list[str] | None = None) -> dict[str, TrialResult]:
    """The results by the trials' names; the names of those that are started again go into `again`."""
    with probe_file(trials[0].folder.parent) as probe, contextlib.redirect_stderr(io.StringIO()) as told:
        results = {result.name: result for result in run_trials_on_ray(trials, probe, TWO)}
    if again is not None:
        again += re.findall(r"(\S+) is started again: ", told.getvalue())
    return results


def start(series: Path, run: Path, address: str, *options: str) -> subprocess.Popen:
    """The command in a process group of its own, as a terminal starts it."""
    code = f"import grpo_kit.runs.notebooks as h, pathlib; h.NOTEBOOK_FOLDER = pathlib.Path({str(series)!r})\n"
    code += "import grpo_kit.cli, sys; grpo_kit.cli.main(['run', '--notebooks', '00', *sys.argv[1:]])"
    given = ["--grid", str(run.parent / "g.yaml"), "--run-dir", str(run), "--ray", address, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *given], cwd=PROJECT_ROOT, process_group=0, **pipes)


def left_behind(folder: Path) -> dict[str, object]:
    """What a trial says of itself, and what it brought, without the minutes."""
    record = json.loads((folder / "trial.json").read_text())
    for notebook in record["ran"]:
        del notebook["minutes"]
    return record | {"result": (folder / "result").read_text() if (folder / "result").exists() else None}


# --- what comes back --------------------------------------------------------------------------------------------------


def stop_in_the_middle(
    process: subprocess.Popen,
    run: Path,
    number: signal.Signals,
    send: Callable[[int, int], None] = os.killpg,
    done: Sequence[str] = ("well",),
) -> tuple[int, str, str]:
    """Signal the group when these trials are done and another runs; the command's exit code and what it said."""
    pid = wait_for_number(run / "case=waits" / "pid")
    deadline = time.monotonic() + 600
    while not all((run / f"case={case}" / "index.html").exists() for case in done) and time.monotonic() < deadline:
        time.sleep(0.1)
    send(process.pid, number)
    out, error = process.communicate(timeout=600)
    assert not alive(pid)
    return process.returncode, out, error


@pytest.mark.slow
def test_a_grid_brings_the_same_as_without_ray_and_after_ctrl_c_the_same_command_goes_on(
    cluster: str, series: Path, tmp_path: Path
):
    """A failed trial leaves the others alone; what is done when Ctrl-C comes is kept."""
    (tmp_path / "g.yaml").write_text("case: [well, waits, bad]")
    run = tmp_path / "run"
    first = start(series, run, cluster)
    here = {trial.name: run_trial(trial).error for trial in planned(tmp_path / "turn", case=["well", "bad"])}
    code, out, error = stop_in_the_middle(first, run, signal.SIGINT, done=("well", "bad"))
    assert code == 130 and re.search(r"\[\d/3\] case=well, \d", out) and f"--ray {cluster}" in error
    for name, said in here.items():
        assert (said is not None) == ("bad" in name) and (said is None or f" failed: {said}\n" in error)
        assert left_behind(run / name) == left_behind(tmp_path / "turn" / name) and len(lines(run / name)) == 1
    workers = {lines(run / f"case={case}")[0][3] for case in ("well", "waits", "bad")}
    assert len(workers) == 2 and first.pid not in workers

    second = start(series, run, cluster)
    out, error = second.communicate(timeout=600)
    assert second.returncode == 1 and "1 of 3 trials failed" in error and "Traceback" not in error
    assert f"case=bad failed: {here['case=bad']} (as far" in error
    assert "[1/3] case=well, finished before" in out and re.search(r"\[[23]/3\] case=waits", out)
    assert {f"[{number}/3] " in out for number in (1, 2, 3)} == {True} and "comparison: " in out
    assert [len(lines(run / f"case={case}")) for case in ("well", "waits", "bad")] == [1, 2, 2]
    assert "started again" not in error and left_behind(run / "case=waits")["result"]


@pytest.mark.slow
def test_a_result_comes_when_it_is_there_and_a_closed_grid_ends_its_kernels_and_goes_on_later(
    cluster: str, series: Path, tmp_path: Path
):
    waits, well, later = planned(tmp_path / "grid", case=["waits", "well"], seeds=[0])[:2] + planned(
        tmp_path / "grid", case=["waits"], seeds=[5]
    )
    with probe_file(tmp_path / "grid") as probe:
        coming = run_trials_on_ray([waits, well, later], probe, TWO)
        assert next(coming).name == well.name  # the one that was asked for first still waits
        pids = [wait_for_number(trial.folder / "pid") for trial in (waits, later)]
        coming.close()
    assert not any(alive(pid) for pid in pids)
    assert left_behind(well.folder)["status"] == "done" and left_behind(waits.folder)["status"] == "started"
    stopped = nbformat.read(waits.folder / "notebooks" / "00_first.ipynb", as_version=4)
    assert stopped.metadata["grpo_kit"] == {"stopped": "interrupted"}
    assert not any(result.error for result in run_all([waits, later]).values())
    assert list((tmp_path / "grid").glob(".*")) == []


# --- what is tried again ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trial_that_dies_is_started_again_twice_and_one_that_fails_is_not(cluster: str, series: Path, tmp_path: Path):
    cases = ["worker dies once", "kernel dies once", "worker dies", "bad"]
    trials = planned(tmp_path / "grid", case=cases)
    again: list[str] = []
    results = run_all(trials, again)
    starts = {case: len(lines(trial.folder)) for case, trial in zip(cases, trials, strict=True)}
    assert starts == {"worker dies once": 2, "kernel dies once": 2, "worker dies": 3, "bad": 1}
    assert len(again) == 4 and not results[trials[0].name].error and not results[trials[1].name].error
    assert results[trials[2].name].error.startswith("its worker died: ") and "\n" not in results[trials[2].name].error
    assert results[trials[3].name].error == "00_first: cell [3]: ZeroDivisionError: division by zero"
    deadline = time.monotonic() + 600
    while any(alive(line[2]) for trial in trials for line in lines(trial.folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(line[2]) for trial in trials for line in lines(trial.folder))  # kernels of dead workers


@pytest.mark.slow
def test_a_trial_that_is_not_started_again_is_caught(
    cluster: str, series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grid_ray, "RETRIES", 0)
    (result,) = run_all(planned(tmp_path / "grid", case=["worker dies once"])).values()
    assert result.error


# --- what a cluster must have -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_machine_that_sees_another_folder_is_named(cluster: str, series: Path, tmp_path: Path):
    notebooks, (trial,) = select_notebooks(["00"]), planned(tmp_path / "grid", seeds=[0])
    with probe_file(tmp_path / "grid") as probe:
        check_machines(TWO, probe, notebooks)
        for other in (probe.with_name(".seen-another"), tmp_path / "absent" / probe.name):
            with pytest.raises(GridError, match=r"does not see the grid's folder .*Give --run-dir a folder on a disk"):
                check_machines(TWO, other, notebooks)
            with pytest.raises(GridError, match="does not see the grid's folder"):  # of a machine that came later
                list(run_trials_on_ray([trial], other, TWO))
        with pytest.raises(GridError, match=r"has no .*absent\.ipynb"):
            check_machines(TWO, probe, [tmp_path / "absent.ipynb"])
        probe.write_text("0.0.0")
        with pytest.raises(GridError, match=r"allowed: 0\.0\.0, as here"):
            check_machines(TWO, probe, notebooks)
    assert not trial.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [Cluster(gpus=64), Cluster(cpus=4096)])
def test_what_no_machine_has_is_refused(cluster: str, tmp_path: Path, asked: Cluster):
    with (
        probe_file(tmp_path) as probe,
        pytest.raises(GridError, match=r"no machine .* has that .*allowed: up to 2 CPUs"),
    ):
        check_machines(asked, probe, [])


@pytest.mark.slow
def test_a_trial_that_breaks_outside_of_its_notebook_leaves_the_others_alone(
    cluster: str, series: Path, tmp_path: Path
):
    broken, well = planned(tmp_path / "grid", seeds=[1, 2])
    broken.folder.parent.mkdir()
    broken.folder.write_text("a file where its folder should be")
    results = run_all([broken, well])
    assert re.match("(FileExists|NotADirectory)Error: ", results[broken.name].error) and not results[well.name].error


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--workers", "2"], "--workers: only with --ray"),
        (["--gpus", "1", "--grid", "{}"], "--gpus: only with --ray"),
        (["--ray", "local"], "--ray: only with --grid"),
    ],
)
def test_rays_options_want_a_grid_and_ray(
    series: Path, tmp_path: Path, options: list[str], part: str, capsys: pytest.CaptureFixture
):
    (tmp_path / "g.yaml").write_text("seeds: [0]")
    given = [option.format(tmp_path / "g.yaml") for option in options]
    assert command(*given, "--run-dir", str(tmp_path / "run")) == 2
    assert part in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_without_ray_a_line_says_how_to_install_it(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "g.yaml").write_text("seeds: [0]")
    assert command("--grid", str(tmp_path / "g.yaml"), "--run-dir", str(tmp_path / "run"), "--ray", "local") == 2
    assert re.search(r"Ray is not installed\. Install it: pip install 'ray>=", capsys.readouterr().err)


def of_ray() -> set[int]:
    """The processes of any Ray cluster here."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    marks = ("ray::", "/raylet", "gcs_server", "ray/dashboard", "ray/_private", "ray/autoscaler")
    return {int(line.split()[0]) for line in found if any(mark in line for mark in marks)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "send", "expected"),
    [
        (signal.SIGTERM, os.kill, 143),  # to the command alone: what a service manager sends
        pytest.param(signal.SIGTERM, os.killpg, 143, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, os.killpg, 130, marks=pytest.mark.long),  # Ctrl-C
    ],
)
def test_a_local_cluster_ends_with_the_command(
    series: Path, tmp_path: Path, number: signal.Signals, send: Callable[[int, int], None], expected: int
):
    (tmp_path / "g.yaml").write_text("case: [well, waits]")
    before, run = of_ray(), tmp_path / "run"
    process = start(series, run, "local", "--workers", "2", "--cpus", "0.5")
    code, out, _ = stop_in_the_middle(process, run, number, send)
    assert code == expected and "Ray: 1 machine, 1 CPUs" in out
    deadline = time.monotonic() + 600
    while of_ray() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert of_ray() - before == set()
    assert json.loads((run / "case=well" / "trial.json").read_text())["status"] == "done"
