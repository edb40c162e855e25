"""Several processes: what two of them compute is what one computes, and where one dies the other ends and says so.

Real processes, started through accelerate, on the CPU with gloo. `tests/support/parallel_worker.py` is what they run.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from support.forked import Forked
from support.parallel_worker import SETTINGS, cases, settings

from grpo_kit.cli import main
from grpo_kit.config import PROJECT_ROOT, Config, load_config
from grpo_kit.experiment import load_experiment
from grpo_kit.runs.folder import RunFolder, last_commit
from grpo_kit.training.launch import joined
from grpo_kit.training.loop import make_optimizer, resume, train
from grpo_kit.training.processes import ALONE, ProcessError, Processes, require_sharable

TOLERANCE = 1e-6
SUPPORT = PROJECT_ROOT / "tests" / "support"
TWO = ("--num_processes=2", "--num_machines=1", "--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no")
ENVIRONMENT = {"PYTHONPATH": f"{PROJECT_ROOT}{os.pathsep}{PROJECT_ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def _accelerate(*program: str) -> None:
    """`accelerate launch` of a program in two processes."""
    launch_command(launch_command_parser().parse_args(["--multi_gpu", *TWO, *program]))


def _started(launcher: Callable[[], None], log: Path) -> Forked:
    """A launcher, which starts its processes anew."""
    return Forked(launcher, log, **ENVIRONMENT)


def _work(scratch: Path, worker: str = "parallel_worker.py") -> Forked:
    process = _started(lambda: _accelerate(str(SUPPORT / worker), str(scratch)), scratch / "log")
    process.wait()
    return process


def _train(folder: Path, config: Config) -> None:
    train(load_experiment(config), folder, progress=False)


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Where runs of one process, from one to two and from two to one lie; and what two processes found."""
    scratch = tmp_path_factory.mktemp("parallel")
    half, whole = settings()
    _train(scratch / "from_one", half)
    shutil.copytree(scratch / "from_one", scratch / "one")
    _train(scratch / "one", whole)
    done = _work(scratch)
    assert done.returncode == 0, done.said[-3000:]
    _train(scratch / "from_two", whole)
    return scratch, json.loads((scratch / "found.json").read_text())


# --- two processes against one ----------------------------------------------------------------------------------------


def _assert_equal(steps: dict[str, dict[str, float]]) -> None:
    for case, distances in steps.items():
        assert distances["norm"] > 0.01, case
        assert distances["advantages"] == 0.0, case
        assert max(distances["gradient"], distances["gradient, relative"] / 2) <= TOLERANCE, (case, distances)
        assert distances["metrics"] <= 3 * TOLERANCE, (case, distances)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_find_the_advantages_gradient_and_metrics_of_one_with_any_two_settings(
    worked: tuple[Path, dict], kind: str
):
    found = worked[1]
    assert found["processes"] == 2 and len(found[kind]["steps"]) == 8 * 3 // 2 + 2
    assert {str(case) for case in cases()} <= found["ddp"]["steps"].keys() | found["fsdp"]["steps"].keys()
    _assert_equal(found[kind]["steps"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("broken", ["weights", "mean", "statistics"])
def test_a_broken_sharing_is_caught(worked: tuple[Path, dict], kind: str, broken: str):
    assert worked[1][kind]["broken"][broken]["gradient, relative"] > 0.1


@pytest.mark.slow
def test_two_processes_collect_the_rollout_of_one(worked: tuple[Path, dict]):
    found = worked[1]["rollouts"]
    assert all(found[name] for name in ("texts", "ids", "mask", "seeds", "groups"))
    assert found["pictures"] == 12
    assert found["rewards"] < 1e-3 and found["old_logprobs"] < 1e-4  # another batch, another order of adding up
    assert found["local seeds are seen"]  # the broken version: every process counts its prompts from 0


@pytest.mark.slow
def test_an_error_in_one_process_is_heard_in_all(worked: tuple[Path, dict]):
    assert worked[1]["heard"] == [["process 1 of 2: broken in 1", "broken in 0"]] * 2


@pytest.mark.slow
def test_two_processes_draw_the_groups_again_that_one_does(worked: tuple[Path, dict]):
    found = worked[1]["again"]
    assert found["attempts"] == found["several"] and len(set(found["attempts"])) > 1  # one group alone at last
    assert found["texts"] and found["rewards"] and found["pictures"] == 12


@pytest.mark.slow
def test_two_processes_find_the_rollout_and_the_metrics_of_one_in_two_turns(worked: tuple[Path, dict]):
    found = worked[1]["turns"]
    assert found["turns"] == 2 and all(found[name] for name in ("texts", "rows", "contexts"))
    assert found["logged"] < 1e-3  # pictures of another batch
    assert found["step"]["norm"] > 0.01 and max(found["step"][name] for name in ("gradient", "metrics")) < 1e-5
    assert found["mixed"]["gradient, relative"] > 0.1  # the broken version: later turns stand behind others' contexts


def _weights(folder: Path) -> torch.Tensor:
    """Of the newest checkpoint."""
    kit = load_experiment(load_config("tiny", SETTINGS))
    assert resume(kit, make_optimizer(kit, kit.config), RunFolder(folder)) == 2
    return torch.cat([p.detach().flatten() for p in kit.policy.trainable_parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("other", ["from_one", "from_two"])
def test_a_run_goes_on_with_another_number_of_processes(worked: tuple[Path, dict], other: str):
    scratch, _ = worked
    for number in (1, 2):
        one, found = (
            pd.read_parquet(scratch / run / "rollouts" / f"iter_{number:06d}.parquet") for run in ("one", other)
        )
        assert list(one["user_prompt"]) == list(found["user_prompt"])
        assert list(one["enhanced_prompt"]) == list(found["enhanced_prompt"])
        assert list(one["image_seed"]) == list(found["image_seed"]) and found["thumbnail"].notna().all()
    first = load_experiment(load_config("tiny", SETTINGS)).policy.trainable_parameters()
    trained = _weights(scratch / "one")
    assert float((trained - torch.cat([p.detach().flatten() for p in first])).abs().max()) > 5e-4
    assert float((_weights(scratch / other) - trained).abs().max()) < 5e-5
    assert len(RunFolder(scratch / other).metrics()) == 2 and len(RunFolder(scratch / other).validations()) == 3


# --- who has what -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "count"), [(1, 1), (4, 2), (3, 2), (7, 3), (5, 5)])
def test_shards_are_contiguous_and_as_even_as_can_be(items: int, count: int):
    processes = Processes()
    processes.count = count
    shards = processes.shards(items)
    assert [place for shard in shards for place in shard] == list(range(items)) and len(shards) == count
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_more_processes_than_prompts_are_refused_before_anything_starts(tmp_path: Path, capsys):
    with pytest.raises(ProcessError, match="found 3, allowed: at most 2"):
        require_sharable(load_config("tiny", {"training_settings.prompts_per_iteration": 2}), 3)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--launch", "9", "--run-dir", str(tmp_path / "run")])
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err.count("\n") == 1


def test_weights_in_8_bits_are_not_shared():
    config = load_config("tiny", {"model_settings.base_8bit": True, "model_settings.lora": {"r": 2, "alpha": 4}})
    require_sharable(config, 1)
    with pytest.raises(ProcessError, match="base_8bit: found true, allowed with one process"):
        require_sharable(config, 2)


def test_one_process_needs_no_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: pytest.fail("not needed"))
    with joined(load_config("tiny"), tmp_path) as processes:
        assert processes is ALONE


# --- the end of one of them -------------------------------------------------------------------------------------------


def _options(run: Path) -> list[str]:
    long = SETTINGS | {"training_settings.num_iterations": 1000, "training_settings.save_every": 1}
    long |= {"training_settings.validate_every": 1000, "training_settings.prompts_per_iteration": 2}
    return ["--run-dir", str(run), *(part for name, value in long.items() for part in ("-o", f"{name}={value}"))]


@pytest.fixture
def started(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Forked, Path]]:
    """A run of two processes that has committed an iteration, and its folder; by `--launch` or by accelerate."""
    run = tmp_path / "run"
    options = [value.replace("False", "false") for value in _options(run)]
    starts = {
        "launch": lambda: main(["train", "--launch", "2", *options]),
        "accelerate": lambda: _accelerate("-m", "grpo_kit.cli", "train", *options),
    }
    process = _started(starts[request.param], tmp_path / "log")
    until = time.monotonic() + 600
    while last_commit(run) in (None, 0):
        assert process.poll() is None and time.monotonic() < until, process.said[-3000:]
        time.sleep(0.2)
    yield process, run
    for left in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
        left.kill()
    process.kill()
    process.wait()


def _workers(process: Forked) -> dict[int, psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    ranks = {int(child.environ().get("RANK", -1)): child for child in found if "grpo_kit.cli" in child.cmdline()}
    return {rank: child for rank, child in ranks.items() if rank >= 0}


def _ends(process: Forked, workers: dict[int, psutil.Process]) -> None:
    process.wait(timeout=WAIT)
    assert not psutil.wait_procs(workers.values(), timeout=WAIT)[1]


def _told(run: Path) -> list[str]:
    lines = (run.parent / "log").read_text().replace("\r", "\n").splitlines()
    return [line[line.index("grpo-kit: ") :] for line in lines if "grpo-kit: " in line]


SLOW, LONG = pytest.mark.slow, [pytest.mark.slow, pytest.mark.long]
WAIT = 600  # seconds: a third of what the library waits for a process, long enough for a busy machine


@pytest.mark.parametrize(
    ("started", "rank"),
    [
        pytest.param("launch", 0, marks=SLOW),
        pytest.param("accelerate", 1, marks=LONG),  # as the process that hangs, below, in a real run
        pytest.param("launch", 1, marks=LONG),  # these two: what the others show, the other way round
        pytest.param("accelerate", 0, marks=LONG),
    ],
    indirect=["started"],
)
def test_where_one_process_is_killed_the_other_ends_and_one_line_says_so(started: tuple[Forked, Path], rank: int):
    process, run = started
    workers = _workers(process)
    assert workers.keys() == {0, 1}
    workers[rank].send_signal(signal.SIGKILL)
    _ends(process, workers)
    assert process.returncode not in (0, None)
    (line,) = _told(run)
    committed = last_commit(run)
    assert (
        f"process {rank} of 2" in line
        and f"iteration {committed} is committed" in line
        and f"--run-dir {run} goes on" in line
    )
    RunFolder(run).require_free()
    assert committed >= 1


@SLOW
@pytest.mark.parametrize("started", ["launch"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_stopped_launch_stops_all_and_says_how_to_go_on(started: tuple[Forked, Path], number: int):
    process, run = started
    workers = _workers(process)
    process.send_signal(number)
    _ends(process, workers)
    text = (run.parent / "log").read_text()
    assert process.returncode == 128 + number and "goes on where it stopped with: grpo-kit train" in text
    assert not _told(run) and "Traceback" not in text


@SLOW
def test_a_process_that_hangs_in_a_collective_ends_too(tmp_path: Path):
    started = time.monotonic()
    done = _work(tmp_path, "hanging_worker.py")
    assert done.returncode != 0 and time.monotonic() - started < WAIT
    assert "grpo-kit: process 1 of 2 ended early; nothing is committed yet" in done.said
