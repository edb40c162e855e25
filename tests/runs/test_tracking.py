"""Mirrors show what the run folder holds, under the right names and steps; when they fail, the run goes on."""

import copy
import dataclasses
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import pytest
from support.wandb_files import parts, records

from grpo_kit.config import load_config
from grpo_kit.experiment import Experiment
from grpo_kit.runs import tracking
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.tracking import Tracker, exit_code, group_pictures
from grpo_kit.training.loop import train

OFFLINE = {"tracking_settings.wandb": "offline"}
BOTH = OFFLINE | {"tracking_settings.tensorboard": True}
QUICK = BOTH | {
    "training_settings.prompts_per_iteration": 2,
    "training_settings.group_size": 4,
    "training_settings.validate_every": 2,
    "training_settings.save_every": 1,
    "generation_settings.num_inference_steps": 2,
    "evaluation_settings.validation_prompts": 3,
}
CANARY = "c4n4ry" * 7


# --- reading a .wandb file back ---------------------------------------------------------------------------------------
def _history(run_dir: Path) -> list[dict]:
    """Everything that was logged, in order, over all parts of the run; a picture or table is a dict of its own."""
    found = [record.history for part in parts(run_dir) for record in records(part) if record.HasField("history")]
    return [_line(record) for record in found]


def _line(record: object) -> dict:
    line = {}
    for item in record.item:
        name, *inner = item.nested_key or [item.key]
        value = json.loads(item.value_json)
        if inner:
            line.setdefault(name, {})[inner[0]] = value
        else:
            line[name] = value
    return line


def _lines(history: list[dict], prefix: str) -> list[dict]:
    """The lines of numbers under a prefix, without it."""
    lines = [
        {
            name.removeprefix(f"{prefix}/"): value
            for name, value in line.items()
            if name.startswith(f"{prefix}/") and not isinstance(value, dict)
        }
        for line in history
    ]
    return [line for line in lines if "reward" in line]


def _shown(history: list[dict], name: str) -> dict[int, dict]:
    """What was shown under a name → by iteration."""
    return {line[f"{name.split('/')[0]}/iteration"]: line[name] for line in history if name in line}


def _media(run_dir: Path, place: str) -> Path:
    (found,) = run_dir.glob(f"wandb/offline-run-*/files/{place}")
    return found


# --- a run with both mirrors, stopped and continued -------------------------------------------------------------------


def _experiment(kit: Experiment, iterations: int) -> Experiment:
    config = load_config(kit.config, QUICK | {"training_settings.num_iterations": iterations})
    return dataclasses.replace(kit, config=config, policy=copy.deepcopy(kit.policy))


@pytest.fixture(scope="module")
def run(kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations, and two more in a second part; look, do not touch."""
    folder = tmp_path_factory.mktemp("mirrored") / "run"
    train(_experiment(kit, 2), folder, progress=False)
    assert train(_experiment(kit, 4), folder, progress=False).started_from == 2
    return folder


@pytest.fixture(scope="module")
def history(run: Path) -> list[dict]:
    return _history(run)


def _same(mirrored: Mapping, kept: Mapping) -> bool:
    return {name: value for name, value in mirrored.items() if not name.startswith("_")}.keys() == kept.keys() and all(
        mirrored[name] == value or (value is None and math.isnan(float(mirrored[name]))) for name, value in kept.items()
    )


def test_wandb_has_every_line_of_metrics_under_its_own_iteration(run: Path, history: list[dict]):
    lines, kept = _lines(history, "train"), RunFolder(run).metrics()
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert all(_same(line, row) for line, row in zip(lines, kept, strict=True))
    assert not _same(lines[0], kept[1])  # the comparison tells iterations apart


def test_wandb_has_every_validation_under_its_own_iteration(run: Path, history: list[dict]):
    lines, kept = _lines(history, "eval"), RunFolder(run).validations()
    assert [line["iteration"] for line in lines] == [0, 2, 4]
    for line, validation in zip(lines, kept, strict=True):
        scores = {"reward": validation["reward"], **validation["rewards"]}
        assert {name: line[name] for name in scores} == scores


def test_train_and_eval_have_their_own_steps(run: Path):
    for part in parts(run):
        metrics = [record.metric for record in records(part) if record.HasField("metric")]
        steps = {metric.glob_name: metric.step_metric for metric in metrics if metric.glob_name}
        assert steps == {"train/*": "train/iteration", "eval/*": "eval/iteration"}


def test_an_iteration_is_one_step_over_both_parts(history: list[dict]):
    assert [line["_step"] for line in history] == [0, 1, 2, 3, 4]
    assert all(
        line[name] == line["_step"]
        for line in history
        for name in ("train/iteration", "eval/iteration")
        if name in line
    )


def test_wandb_has_the_resolved_settings(run: Path):
    (found,) = [record.run for record in records(parts(run)[1]) if record.HasField("run")]
    settings = {item.key: json.loads(item.value_json) for item in found.config.update}
    kept = json.loads((run / "config.json").read_text())
    assert settings["training_settings"] == kept["training_settings"]
    assert settings["training_settings"]["num_iterations"] == 4


def test_pictures_of_the_newest_group_say_what_was_asked_written_and_earned(run: Path, history: list[dict]):
    shown = _shown(history, "train/samples")
    assert sorted(shown) == [2, 4]
    for iteration, pictures in shown.items():
        rollout = pd.read_parquet(run / f"rollouts/iter_{iteration:06d}.parquet")
        group = rollout[rollout["group_id"] == rollout["group_id"].max()].to_dict("records")
        assert len(pictures["captions"]) == tracking.PICTURES
        for caption, place, row in zip(pictures["captions"], pictures["filenames"], group, strict=False):
            assert caption.startswith(f"{row['user_prompt']} → {row['enhanced_prompt']} | reward {row['reward']:.3f}")
            assert caption.endswith(f"advantage {row['advantage']:+.2f}")
            assert _media(run, place).read_bytes() == (run / row["thumbnail"]).read_bytes()


@pytest.mark.parametrize("name, iterations", [("train/completions", [2, 4]), ("eval/samples", [0, 2, 4])])
def test_tables_hold_prompt_rewrite_and_reward_parts(run: Path, history: list[dict], name: str, iterations: list[int]):
    shown = _shown(history, name)
    assert sorted(shown) == iterations
    table = json.loads(_media(run, shown[4]["path"]).read_text(encoding="utf-8"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    if name == "eval/samples":
        kept = RunFolder(run).validations()[-1]["samples"]
        part, value = "rewards/clip_similarity", [row["rewards"]["clip_similarity"] for row in kept]
    else:
        kept = pd.read_parquet(run / "rollouts/iter_000004.parquet").to_dict("records")
        part, value = "reward/clip_similarity", [row["reward/clip_similarity"] for row in kept]
        assert [row["advantage"] for row in rows] == pytest.approx([row["advantage"] for row in kept])
    for column in ("user_prompt", "enhanced_prompt", "reward"):
        assert [row[column] for row in rows] == [row[column] for row in kept]
    assert [row[part] for row in rows] == value


def test_a_continued_run_is_the_same_wandb_run(run: Path):
    found = [record.run.run_id for part in parts(run) for record in records(part) if record.HasField("run")]
    assert found == [json.loads((run / "tracking.json").read_text())["wandb_id"]] * 2


def test_wandb_sync_finds_both_parts(run: Path):
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", str(run / "wandb")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0
    assert "Would sync 2 run(s)" in done.stdout + done.stderr


def test_tensorboard_has_the_same_numbers_pictures_and_tables(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    rewards = {event.step: event.value for event in events.Scalars("train/reward")}
    assert rewards == pytest.approx({row["iteration"]: row["reward"] for row in RunFolder(run).metrics()})
    assert [event.step for event in events.Scalars("eval/reward")] == [0, 2, 4]
    assert [event.step for event in events.Images("train/samples/0")] == [2, 4]
    text = events.Tensors("eval/samples/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert all(sample["enhanced_prompt"] in text for sample in RunFolder(run).validations()[-1]["samples"])


# --- ends -------------------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


@pytest.mark.parametrize(
    "error, code", [(None, 0), (Broken(), 1), (KeyboardInterrupt(), 130), (SystemExit(143), 143), (SystemExit("x"), 1)]
)
def test_the_exit_code_says_how_a_run_ended(error: BaseException | None, code: int):
    assert exit_code(error) == code


@pytest.mark.parametrize("error, code", [(None, 0), (Broken(), 1), (KeyboardInterrupt(), 130)])
def test_the_wandb_run_is_finished_however_it_ends(tmp_path: Path, error: BaseException | None, code: int):
    def body() -> None:
        with Tracker(load_config("tiny", OFFLINE), tmp_path) as tracker:
            tracker.log({"iteration": 1, "reward": 0.25})
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(type(error)):
            body()
    (part,) = parts(tmp_path)
    for _ in range(100):  # wandb's own process may write the last record a moment after `finish` has returned
        if exits := [record.exit.exit_code for record in records(part) if record.HasField("exit")]:
            break
        time.sleep(0.1)
    assert exits == [code]


# --- a mirror that fails ----------------------------------------------------------------------------------------------


class Failing:
    """A service that is down from its n-th call on."""

    name = "service"

    def __init__(self, calls: int) -> None:
        self.left, self.finished = calls, []

    def _call(self, *_: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("no route to host\nand much more text")

    start = whole_until = log = _call

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)
        self._call()


@pytest.mark.parametrize("calls", range(8))
def test_a_mirror_that_fails_is_one_warning_and_the_others_go_on(
    synthetic_run: Path, caplog: pytest.LogCaptureFixture, calls: int
):
    tracker = Tracker(load_config("tiny"), synthetic_run)
    failing, other = Failing(calls), Failing(10**6)
    tracker._mirrors = [failing, other]
    iteration = int(sorted(synthetic_run.glob("rollouts/*.parquet"))[-1].stem.split("_")[1])
    with caplog.at_level(logging.WARNING, logger="grpo_kit"), tracker:
        tracker.log({"iteration": iteration, "reward": 0.5})
        tracker.log_samples(iteration)
        tracker.log({"iteration": iteration, "reward": 0.5})
    made = 10**6 - other.left
    assert other.finished == [0] and made >= 6
    assert [record.message for record in caplog.records] == (
        ["service: not mirrored (no route to host and much more text); the run goes on, its folder has everything"]
        if calls < made
        else []
    )
    assert failing.finished[-1] == (1 if calls < made else 0)


class Unguarded(Tracker):
    """The broken twin: a service that is down takes the run with it."""

    def _each(self, call: Callable) -> None:
        for mirror in self._mirrors:
            call(mirror)


def test_without_the_guard_the_run_would_stop(synthetic_run: Path):
    tracker = Unguarded(load_config("tiny"), synthetic_run)
    tracker._mirrors = [Failing(1)]
    with pytest.raises(ConnectionError), tracker:
        tracker.log({"iteration": 1, "reward": 0.5})


def test_a_damaged_file_of_the_run_is_a_warning_too(synthetic_run: Path, caplog: pytest.LogCaptureFixture):
    place = sorted(synthetic_run.glob("rollouts/*.parquet"))[-1]
    place.write_bytes(b"no parquet")
    tracker = Tracker(load_config("tiny"), synthetic_run)
    tracker._mirrors = [Failing(100)]
    tracker.log_samples(int(place.stem.split("_")[1]))
    assert len(caplog.records) == 1


PROCESS = """
import sys
from contextlib import ExitStack
from pathlib import Path
from grpo_kit.config import load_config
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.tracking import Tracker
for mode in sys.argv[1].split():
    config = load_config("tiny", {"tracking_settings.wandb": mode})
    folder = RunFolder.open(Path(sys.argv[2]) / mode, config)
    with ExitStack() as stack:
        folder.hold(stack)
        tracker = stack.enter_context(Tracker(config, folder.path))
        for iteration in (1, 2):
            tracker.log({"iteration": iteration, "reward": 0.25})
            tracker.log_samples(iteration)
    print(mode, bool({"wandb", "tensorboard"} & sys.modules.keys()))
"""


def _run_apart(modes: str, folder: Path, *arguments: str, **variables: str) -> tuple[list[str], list[str]]:
    """What runs in a process of their own print and warn; its home is empty, so that no key of this machine counts."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    known |= {"WANDB_HTTP_TIMEOUT": "1"}  # seconds; wandb's own 10 would only make the test slow
    environment = known | {"HOME": str(folder), "NETRC": str(folder / "none")} | variables
    command = [sys.executable, "-c", PROCESS, modes, str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.strip().splitlines()


def _is_one_warning(lines: list[str], folder: Path, said: str) -> None:
    """Exactly one line on the screen, and the same in `training.log`."""
    (line,) = lines
    assert line.startswith("wandb: not mirrored (") and said in line
    (logged,) = (folder / "online" / "training.log").read_text().splitlines()
    assert logged.endswith(f"WARNING {line}")


def test_without_a_key_there_is_one_warning(tmp_path: Path):
    printed, warned = _run_apart("online", tmp_path)
    assert printed == ["online True"]  # it went on to its end
    _is_one_warning(warned, tmp_path, "no key on this machine")


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """Runs with secrets around them and a network that does not answer: their folder, what they print and warn."""
    folder = tmp_path_factory.mktemp("apart")
    secrets = {"WANDB_API_KEY": CANARY, "HF_TOKEN": CANARY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    return folder, *_run_apart("disabled offline online", folder, f"--token={CANARY}", **secrets)


def test_without_network_there_is_one_warning(apart: tuple[Path, list[str], list[str]]):
    folder, printed, warned = apart
    assert printed[1:] == ["offline True", "online True"]
    _is_one_warning(warned, folder, "127.0.0.1:9")


def test_disabled_tracking_neither_imports_a_service_nor_writes(apart: tuple[Path, list[str], list[str]]):
    folder, printed, _ = apart
    assert printed[0] == "disabled False"
    assert {place.name for place in (folder / "disabled").iterdir()} <= {"config.json", "training.log", ".lock"}


def test_neither_key_nor_command_line_is_written(apart: tuple[Path, list[str], list[str]]):
    folder = apart[0]
    assert _holding(folder / "offline" / "wandb", "reward")  # the search sees into wandb's files
    assert not _holding(folder, CANARY)


def _holding(folder: Path, text: str) -> list[Path]:
    return [place for place in folder.rglob("*") if place.is_file() and text.encode() in place.read_bytes()]


# --- off --------------------------------------------------------------------------------------------------------------


def test_a_missing_tensorboard_says_how_to_get_it(tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Tracker(load_config("tiny", {"tracking_settings.tensorboard": True}), tmp_path) as tracker:
        tracker.log({"iteration": 1, "reward": 0.5})
    (record,) = caplog.records
    assert "not installed. Run: pip install tensorboard" in record.message


def test_the_pictures_are_those_of_one_group(synthetic_run: Path):
    rollout = pd.read_parquet(sorted(synthetic_run.glob("rollouts/*.parquet"))[-1])
    last = rollout[rollout["group_id"] == rollout["group_id"].iloc[-1]]
    pictures = group_pictures(rollout, synthetic_run, count=100)
    assert [place for place, _ in pictures] == [synthetic_run / name for name in last["thumbnail"]]
