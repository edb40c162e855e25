"""The run folder: what a crash leaves is cleared up, half a line is none, and what the disk refuses is one line."""

import errno
import json
import logging
import os
import resource
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from grpo_kit.config import load_config
from grpo_kit.runs import durable
from grpo_kit.runs.folder import RunError, RunFolder, decisive_settings


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A folder with three iterations."""
    folder = RunFolder(tmp_path)
    for iteration in (1, 2, 3):
        folder.append_metrics({"iteration": iteration, "reward": 0.5})
        folder.write_json(f"validation_iter_{iteration:06d}.json", {"iteration": iteration})
        for name in (f"iter_{iteration:06d}_row_000", f"validation_{iteration:06d}_000"):
            folder.save_thumbnail(Image.new("RGB", (8, 8)), name)
    return folder


def _files(run: RunFolder) -> set[str]:
    return {file.relative_to(run.path).as_posix() for file in run.path.rglob("*") if file.is_file()}


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_half_a_line_is_left_out_and_dropped_before_the_next_is_written(run: RunFolder):
    with run.metrics_file.open("a") as file:
        file.write('{"iteration": 4, "rew')
    assert [row["iteration"] for row in run.metrics()] == [1, 2, 3]
    run.forget_after(3)
    run.append_metrics({"iteration": 4})
    assert [json.loads(line)["iteration"] for line in run.metrics_file.read_text().splitlines()] == [1, 2, 3, 4]


def test_what_came_after_the_commit_is_forgotten_pictures_included(run: RunFolder):
    run.forget_after(2)
    assert len(run.metrics()) == 2
    assert not [name for name in _files(run) if "000003" in name] and len(_files(run)) == 1 + 2 + 4


def test_lines_are_kept_by_their_iteration_and_missing_ones_are_a_warning(
    run: RunFolder, caplog: pytest.LogCaptureFixture
):
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text(lines[0] + "\0\0\0\n" + lines[2])
    with caplog.at_level(logging.WARNING, "grpo_kit"):
        run.forget_after(3)
    assert [row["iteration"] for row in run.metrics()] == [1, 3]
    assert "1 committed iterations are missing or damaged" in caplog.text


# --- what a crash leaves ----------------------------------------------------------------------------------------------


def test_leftovers_are_gone_once_the_folder_is_held(run: RunFolder):
    before = _files(run)
    for left in (".writing-best/model.safetensors", "checkpoints/.writing-iter_000003/x", "rollouts/.writing-y"):
        (run.path / left).parent.mkdir(parents=True, exist_ok=True)
        (run.path / left).write_text("half")
    with ExitStack() as stack:
        run.hold(stack)
    assert _files(run) - before == {"training.log", ".lock"}


@pytest.mark.parametrize(("there", "expected"), [((".replaced-best",), "old"), ((".replaced-best", "best"), "new")])
def test_best_that_was_being_replaced_is_there(run: RunFolder, there: tuple[str, ...], expected: str):
    for name, content in zip(there, ("old", "new"), strict=False):
        (run.path / name).mkdir()
        (run.path / name / "model").write_text(content)
    with ExitStack() as stack:
        run.hold(stack)
        assert (run.best / "model").read_text() == expected
    assert not (run.path / ".replaced-best").exists()


# --- commit -----------------------------------------------------------------------------------------------------------


def _flushed_at_save(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    flushed: list[Path] = []
    monkeypatch.setattr("grpo_kit.runs.folder.flush", flushed.append)
    at_save: list[set[Path]] = []
    run.commit(lambda: at_save.append(set(flushed)))
    return at_save[0]


def test_all_that_was_written_is_flushed_before_the_checkpoint(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    flushed = _flushed_at_save(run, monkeypatch)
    assert {run.path, run.metrics_file, run.path / "thumbnails"} <= flushed
    assert set((run.path / "thumbnails").iterdir()) <= flushed


def test_nothing_is_flushed_twice(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    run.commit(lambda: None)
    assert _flushed_at_save(run, monkeypatch) == {run.path}


def test_file_is_flushed_before_it_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    replace = os.replace
    monkeypatch.setattr(durable, "flush", lambda path: events.append("flush"))
    monkeypatch.setattr(os, "replace", lambda *places: events.append("rename") or replace(*places))
    durable.replace_file(tmp_path / "file", b"new")
    assert events == ["flush", "rename"] and (tmp_path / "file").read_bytes() == b"new"


# --- what the disk refuses --------------------------------------------------------------------------------------------


def _refuse(number: int) -> Callable[[], None]:
    def save() -> None:
        raise OSError(number, os.strerror(number))

    return save


@pytest.mark.parametrize("committed", [(), (3, 12)])
@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "make room"), (errno.EROFS, "allow writing into it"), (errno.EIO, "mend that")],
)
def test_refusal_says_what_is_committed_and_what_to_do(
    run: RunFolder, number: int, advice: str, committed: tuple[int, ...]
):
    for iteration in committed:
        (run.checkpoints / f"iter_{iteration:06d}").mkdir(parents=True)
    with pytest.raises(RunError) as error:
        run.commit(_refuse(number))
    said = str(error.value)
    assert str(run.path) in said and os.strerror(number) in said and "\n" not in said
    assert ("iteration 12 is committed" if committed else "nothing is committed yet") in said
    if committed or number == errno.ENOSPC:
        assert f"{advice}, then give the same command again" in said
    else:
        assert "choose a folder that can be written to" in said


def test_errors_of_libraries_in_rust_are_told_alike(run: RunFolder):
    def save() -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(RunError, match="No space left on device"):
        run.commit(save)


def test_errors_that_are_not_the_disks_stay_what_they_are(run: RunFolder):
    def save() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run.commit(save)


def test_log_that_cannot_grow_is_told_once_and_stops_nothing(run: RunFolder, capsys: pytest.CaptureFixture):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ExitStack() as stack:
        run.hold(stack)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            for _ in range(5):
                logging.getLogger("grpo_kit").warning("a line that the disk refuses, sooner or later")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert said.count("training.log: File too large; lines are missing in it") == 1 and "Traceback" not in said


# --- which run --------------------------------------------------------------------------------------------------------


def test_decisive_settings_are_what_a_run_computes_and_not_how_long_or_how_it_is_shown():
    def fixed(**training: object) -> dict[str, object]:
        return decisive_settings(
            load_config("tiny", {f"training_settings.{k}": v for k, v in training.items()}).to_dict()
        )

    assert fixed(num_iterations=7, keep_checkpoints=5) == fixed() != fixed(seed=1)
    assert not [name for name in fixed() if name.startswith(("tracking", "evaluation", "versions"))]


def test_config_is_written_by_the_writer_alone(tmp_path: Path):
    config = load_config("tiny")
    first = RunFolder.open(tmp_path, config)
    assert not (tmp_path / "config.json").exists()
    with ExitStack() as stack:
        first.hold(stack)
        longer = RunFolder.open(tmp_path, load_config("tiny", {"training_settings.num_iterations": 999}))
        with pytest.raises(RunError, match="another process writes into it"):
            longer.hold(stack)
        with pytest.raises(RunError, match="another process writes into it"):
            longer.require_free()
        assert load_config(tmp_path).training_settings.num_iterations == config.training_settings.num_iterations
