"""What `wandb sync` sends of an offline run, read by wandb's own reader: all of it, once, also after a kill."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from support.wandb_server import Received, wandb_server

from grpo_kit.config import PROJECT_ROOT, load_config
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.tracking import Tracker, WandbMirror, show_again

OFFLINE = {"tracking_settings.wandb": "offline"}


def _show(run: Path, first: int, last: int) -> None:
    """Mirror what a run's folder keeps of some iterations, as the part of the run that computes them does."""
    with Tracker(load_config("tiny", OFFLINE), run) as tracker:
        tracker.go_on(max(first - 1, 0))
        tracker._each(lambda mirror: show_again(mirror, run, first - 1, last))


def _newest(run: Path) -> int:
    return RunFolder(run).metrics()[-1]["iteration"]


def _without_wandb() -> dict[str, str]:
    """This process's environment; its wandb shares the process beside it with those that find its address there."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}


def _synced(run: Path, home: Path) -> Received:
    """What the real `wandb sync` sends of all parts of a run to a server."""
    with wandb_server() as received:
        environment = _without_wandb() | {"WANDB_BASE_URL": received.url, "WANDB_API_KEY": "k" * 40, "HOME": str(home)}
        parts = sorted(map(str, run.glob("wandb/offline-run-*")))
        command = [sys.executable, "-m", "wandb", "sync", *parts]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return received


def _sent_once(received: Received, run: Path) -> bool:
    """Every line of metrics.jsonl and every validation, once and in order."""
    lines = [line for _, line in sorted(received.history.items())]
    trained = [(line["train/iteration"], line["train/reward"]) for line in lines if "train/reward" in line]
    validated = [(line["eval/iteration"], line["eval/reward"]) for line in lines if "eval/reward" in line]
    folder = RunFolder(run)
    return trained == [(row["iteration"], row["reward"]) for row in folder.metrics()] and validated == [
        (kept["iteration"], kept["reward"]) for kept in folder.validations()
    ]


def test_sync_sends_every_line_picture_and_table_of_both_parts(synthetic_run: Path, tmp_path: Path):
    newest = _newest(synthetic_run)
    _show(synthetic_run, 0, newest // 2)
    _show(synthetic_run, newest // 2 + 1, newest)
    received = _synced(synthetic_run, tmp_path)
    assert set(received.run_ids) == {json.loads((synthetic_run / "tracking.json").read_text())["wandb_id"]}
    assert _sent_once(received, synthetic_run)
    thumbnails = {place.read_bytes() for place in synthetic_run.glob("thumbnails/*.jpg")}
    pictures = [content for name, content in received.files.items() if name.endswith(".jpg")]
    assert pictures and thumbnails.issuperset(pictures)
    tables = {name: json.loads(content) for name, content in received.files.items() if name.endswith(".table.json")}
    completions = [table for name, table in tables.items() if "train/completions" in name]
    kept = [pd.read_parquet(place) for place in sorted(synthetic_run.glob("rollouts/*.parquet"))]
    texts = {tuple(row[table["columns"].index("enhanced_prompt")] for row in table["data"]) for table in completions}
    assert texts and texts <= {tuple(rollout["enhanced_prompt"]) for rollout in kept}
    assert any("eval/samples" in name for name in tables) and len(received.tables) == len(tables)


# --- a process that was killed ----------------------------------------------------------------------------------------


KILLED = """
import sys
from pathlib import Path
from grpo_kit.config import load_config
from grpo_kit.runs.tracking import Tracker, show_again
run, last = Path(sys.argv[1]), int(sys.argv[2])
with Tracker(load_config("tiny", {"tracking_settings.wandb": "offline"}), run) as tracker:
    tracker.go_on(0)
    tracker._each(lambda mirror: show_again(mirror, run, -1, last))
    print("shown", flush=True)
    sys.stdin.read()
"""


def _show_and_be_killed(run: Path, last: int) -> None:
    """The first iterations in a process of its own, with wandb's own process beside it, which then is killed."""
    command = [sys.executable, "-c", KILLED, str(run), str(last)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, env=_without_wandb(), **pipes)
    assert process.stdout.readline() == "shown\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()


def _show_and_lose(run: Path, committed: int, last: int) -> Path:
    """The same without a process: an end that is no good one, and a file that breaks off; returns its part."""
    with pytest.raises(ValueError, match="a fault"), Tracker(load_config("tiny", OFFLINE), run) as tracker:
        tracker.go_on(committed)
        tracker._each(lambda mirror: show_again(mirror, run, committed or -1, last))
        raise ValueError("a fault")
    part = run / "wandb" / json.loads((run / "tracking.json").read_text())["open"]["part"]
    (file,) = part.glob("*.wandb")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return part


def test_what_a_killed_process_lost_is_sent_after_all(synthetic_run: Path, tmp_path: Path):
    third = _newest(synthetic_run) // 3
    _show_and_be_killed(synthetic_run, third + 2)
    _show_and_lose(synthetic_run, third, 2 * third + 2)
    _show(synthetic_run, 2 * third + 1, _newest(synthetic_run))
    assert len(list(synthetic_run.glob("wandb/offline-run-*"))) == 1
    assert _sent_once(_synced(synthetic_run, tmp_path), synthetic_run)


def _trusts_what_is_there(mirror: WandbMirror, committed: int) -> int:
    """A killed part has everything up to the commit."""
    return committed


def _keeps_what_is_there(mirror: WandbMirror, committed: int) -> int:
    """A killed part has nothing."""
    return -1


@pytest.mark.parametrize("broken", [_trusts_what_is_there, _keeps_what_is_there])
def test_a_mirror_that_goes_on_from_a_killed_part_is_caught(
    synthetic_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable
):
    newest = _newest(synthetic_run)
    _show_and_lose(synthetic_run, 0, newest // 2)
    monkeypatch.setattr(WandbMirror, "whole_until", broken)
    _show(synthetic_run, newest // 2 + 1, newest)
    assert not _sent_once(_synced(synthetic_run, tmp_path), synthetic_run)


def test_a_part_that_was_sent_already_is_kept_and_another_replaced(synthetic_run: Path):
    part = _show_and_lose(synthetic_run, 0, 2)
    next(part.glob("*.wandb")).with_suffix(".wandb.synced").touch()
    other = _show_and_lose(synthetic_run, 2, 4)
    _show(synthetic_run, 5, 6)
    assert part.is_dir() and not other.exists()


@pytest.mark.parametrize(
    ("ends", "stays"), [(None, False), (KeyboardInterrupt(), False), (ValueError("a fault"), True)]
)
def test_a_part_stays_open_where_it_may_lack_something(synthetic_run: Path, ends: BaseException | None, stays: bool):
    tracker = Tracker(load_config("tiny", OFFLINE), synthetic_run)
    tracker.__enter__()
    tracker.go_on(3)
    opened = json.loads((synthetic_run / "tracking.json").read_text())["open"]
    assert opened["since"] == -1 and (synthetic_run / "wandb" / opened["part"]).is_dir()
    tracker.__exit__(ends and type(ends), ends, None)
    assert (json.loads((synthetic_run / "tracking.json").read_text())["open"] is not None) == stays


def test_a_run_that_is_mirrored_from_half_way_on_has_its_first_half_too(synthetic_run: Path, tmp_path: Path):
    newest = _newest(synthetic_run)
    _show(synthetic_run, newest // 2 + 1, newest)
    assert _sent_once(_synced(synthetic_run, tmp_path), synthetic_run)
