"""Windows and macOS, as far as they can be had here: missing modules, folders, files in use, encodings, names."""

import ast
import errno
import importlib
import io
import os
import re
import sys
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest
from support.forked import Forked
from support.windows import MISSING_MODULES, pretend

from grpo_kit.config import PROJECT_ROOT, KitError, load_config
from grpo_kit.runs import checkpoint, durable, interrupts, surroundings
from grpo_kit.runs.places import new_run_folder
from grpo_kit.show import comparison

pytestmark = pytest.mark.field("F5")

FEW = {
    "train": "training_settings.num_iterations=1 training_settings.save_every=1 "
    "training_settings.prompts_per_iteration=2 training_settings.group_size=2 evaluation_settings.validation_prompts=2",
    "evaluate": "evaluation_settings.num_prompts=2 evaluation_settings.seeds_per_prompt=1 "
    "evaluation_settings.n_resamples=100",
}


def every_command(run: str, demo: str) -> None:
    """The kit, imported once more where all is as on Windows, and its commands on three kinds of terminals."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "grpo_kit"]:
        del sys.modules[name]
    happened = pretend()
    sys.stdout.reconfigure(encoding="cp1252", errors="strict")
    sys.stderr.reconfigure(encoding="cp1252", errors="backslashreplace")
    cli = importlib.import_module("grpo_kit.cli")

    def command(*given: str, code: int = 0) -> None:
        options = [part for text in FEW.get(given[0], "").split() for part in ("-o", text)]
        try:
            cli.main([*given, *options])
            found = 0
        except SystemExit as stop:
            found = stop.code or 0
        assert found == code, (given, found)

    command("train", "--run-dir", run)
    command("evaluate", run)
    for encoding in ("cp1252", "cp949"):
        sys.stdout.reconfigure(encoding=encoding, errors="strict")
        command("report", run)
        command("compare", run, demo, "--html", run + "/compare.html")
        command("doctor", "grpo_kit.preflight.loss_checks.examples:classic_loss", code=1)
        command("plan", "--profile", "🦔→.json", code=2)
    print(happened["folder"] > 0, happened["in use"] > 3)


@pytest.mark.slow
def test_every_command_works_without_what_windows_lacks_on_terminals_of_few_letters(tmp_path: Path) -> None:
    run, demo = str(tmp_path / "run"), str(PROJECT_ROOT / "data" / "demo_run")
    process = Forked(lambda: every_command(run, demo), tmp_path / "said", PYTHONIOENCODING="cp1252")
    assert process.wait() == 0, process.said[-4000:]
    assert process.said.splitlines()[-1] == "True True"
    assert (tmp_path / "run" / "checkpoints" / "iter_000001" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("cp1252", "−0.5 → 1.0 … “a” é 🦔", "-0.5 -> 1.0 … “a” é ?"),
        ("cp949", "−0.5 ≥ café", "-0.5 ≥ cafe"),
        ("ascii", "5 × 3 · 97 % − 한", "5 x 3 * 97 % - ?"),
        ("utf-8", "−0.5 → 🦔", "−0.5 → 🦔"),
    ],
)
def test_characters_that_a_terminal_lacks_are_shown_by_those_that_look_alike(
    encoding: str, text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)  # pythonw has none
    surroundings.prepare()
    stream.write(text)
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) == shown


# --- files ------------------------------------------------------------------------------------------------------------


def failing_error(number: int, **more: object) -> OSError:
    error = OSError(number, os.strerror(number))
    for name, value in more.items():
        setattr(error, name, value)
    return error


def failing(number: int, times: int, real: object, **more: object) -> object:
    """A function of `os` that fails so often, and works then."""
    left = [times]

    def call(*given: object) -> object:
        if left[0]:
            left[0] -= 1
            raise failing_error(number, **more)
        return real(*given)

    return call


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_folder_that_cannot_be_flushed_is_left_and_a_file_is_not(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(os, "fsync", failing(number, 9, os.fsync))
    durable.flush(tmp_path)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        durable.flush(file)


def test_a_full_disk_is_told_of_for_folders_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC, 1, os.fsync))
    with pytest.raises(OSError, match="No space left"):
        durable.flush(tmp_path)


@pytest.mark.parametrize("winerror", [5, 32, 33])
def test_a_file_in_use_is_replaced_when_it_is_free(
    winerror: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", failing(errno.EACCES, 3, os.replace, winerror=winerror))
    durable.replace_file(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"


def test_a_checkpoint_that_is_open_is_left_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def save(iteration: int) -> None:
        checkpoint.save_checkpoint(
            tmp_path, iteration, lambda folder: folder.mkdir(), {"state": {}, "param_groups": []}
        )

    def drop(place: Path) -> None:
        raise failing_error(errno.EACCES, winerror=5)

    monkeypatch.setattr(checkpoint, "_drop", drop)
    for iteration in (1, 2, 3):
        save(iteration)
    assert len(checkpoint.checkpoints_of(tmp_path)) == 3
    assert caplog.messages == ["checkpoint iter_000001: another program has it open; it is left"]


def test_what_is_not_allowed_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", failing(errno.EACCES, 1, os.replace))
    with pytest.raises(PermissionError):
        durable.replace_file(tmp_path / "a.json", b"new")


# --- names and paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CON", "nul", "aux.txt", "Com1", "lpt9.run", "ends.with.", "a:b", "a\\b"])
def test_a_run_has_no_name_that_windows_lacks(name: str) -> None:
    with pytest.raises(KitError, match="run name"):
        new_run_folder("tiny", None, name)


def test_names_that_only_begin_like_those_are_fine() -> None:
    for name in ("console", "nullable", "com", "aux-1", "lpt10"):
        assert new_run_folder("tiny", None, name).name == name


def test_the_command_that_goes_on_is_quoted_as_its_shell_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["train", "--run-dir", r"C:\my runs\a"]
    assert interrupts.command_line(given) == r"grpo-kit train --run-dir 'C:\my runs\a'"
    monkeypatch.setattr(interrupts, "os", SimpleNamespace(name="nt", environ=os.environ))
    assert interrupts.command_line(given) == r'grpo-kit train --run-dir "C:\my runs\a"'


def test_a_page_on_another_drive_is_linked_by_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").touch()
    monkeypatch.setattr(os.path, "relpath", failing_with(ValueError("path is on mount 'D:', start on mount 'C:'")))
    link = comparison._run_link(SimpleNamespace(path=tmp_path), tmp_path)
    assert link["link"] == (tmp_path / "index.html").as_uri()


def failing_with(error: Exception) -> object:
    def call(*_: object) -> None:
        raise error

    return call


def test_saved_paths_have_slashes_and_no_drive() -> None:
    saved = load_config("tiny").to_dict()
    for text in (saved["model_settings"]["vlm_model"], saved["training_settings"]["train_prompts"]):
        assert "\\" not in text and not PureWindowsPath(text).is_absolute()


# --- sources ----------------------------------------------------------------------------------------------------------

POSIX = {
    "os": set(
        "fork geteuid getuid getegid killpg getpgid setsid sched_getaffinity sysconf uname mkfifo statvfs nice".split()
    ),
    "signal": set("SIGHUP SIGALRM SIGUSR1 SIGUSR2 SIGKILL SIGQUIT alarm setitimer pause sigwait".split()),
}
SOURCES = [path for folder in ("grpo_kit", "tools") for path in sorted((PROJECT_ROOT / folder).rglob("*.py"))]


def assumptions(source: str) -> list[str]:
    """Names that Windows lacks, and texts that are read or written in whatever encoding the system has."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.partition(".")[0] in MISSING_MODULES]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [node.attr] if node.attr in POSIX.get(node.value.id, ()) else []
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            text = ast.unparse(node)
            is_text = name in ("read_text", "write_text") or (
                name == "open" and "'rb'" not in text and "b'" not in text
            )
            opens = name != "open" or isinstance(node.func, ast.Name) or re.search(r"\b(file|path|place)\.open", text)
            if is_text and opens and "encoding" not in text and "proc" not in text:
                found.append(text)
    return found


def test_the_kit_assumes_no_posix_and_no_encoding() -> None:
    missed = {path.name: found for path in SOURCES if (found := assumptions(path.read_text(encoding="utf-8")))}
    # the one reads Linux's /proc, and says where there is none; the other forks kernels, on Linux alone
    assert missed.keys() <= {"image_batch.py", "warm_process.py"}
    assert assumptions("import resource\nos.fork()\nsignal.SIGHUP\nplace.read_text()\npath.open('a')\n")
