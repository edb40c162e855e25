"""The commands: what they accept, what they say, and their exit codes."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from support.config_files import save_config
from support.grids import alive, wait_for_number

from grpo_kit import cli
from grpo_kit.config import PROJECT_ROOT, ConfigError, KitError, load_config
from grpo_kit.evaluation import evaluate as evaluation_module
from grpo_kit.preflight import machine as check
from grpo_kit.runs import notebooks as headless
from grpo_kit.runs.notebooks import NotebookError, plan, select_notebooks
from grpo_kit.runs.places import new_run_folder
from grpo_kit.training import loop

PARAMETERS = """profile: str = "tiny"  # a profile
run_dir: str = ""  # empty: the demo run
group_size: int = 0  # 0: as the profile says
rate: float = 0.5  # a rate
deep: bool = False  # more
label: str = "none"  # any text
names: list = ["a"]  # some names"""


def _notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "note{books}"  # papermill formats paths: braces must survive
    _notebook(folder / "00_first.ipynb", "print(group_size, label)")
    _notebook(folder / "07_second.ipynb", "1 / 0", "print('never')")
    _notebook(folder / "scratch.ipynb")
    monkeypatch.setattr(headless, "NOTEBOOK_FOLDER", folder)
    return folder


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return stop.value.code or 0


def _one_line(capsys: pytest.CaptureFixture) -> str:
    captured = capsys.readouterr()
    assert captured.err.startswith("grpo-kit: ") and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


# -- which notebooks, which parameters ---------------------------------------------------------------------------------


def test_notebooks_are_chosen_by_number_or_name_in_their_order(series: Path):
    assert [path.stem for path in select_notebooks()] == ["00_first", "07_second"]
    assert [path.stem for path in select_notebooks(["07", "00_first", "07_second.ipynb"])] == ["00_first", "07_second"]


def test_a_notebook_between_two_numbers_has_a_letter_and_its_place_in_the_order(series: Path):
    for name in ("02b_between", "02_before", "03_behind", "2026_notes", "02bc_draft"):
        _notebook(series / f"{name}.ipynb")
    order = ["00_first", "02_before", "02b_between", "03_behind", "07_second"]
    assert [path.stem for path in select_notebooks()] == order
    assert [path.stem for path in select_notebooks(["02b"])] == ["02b_between"]
    assert [path.stem for path in select_notebooks(["02"])] == ["02_before"]


@pytest.mark.parametrize("wanted", ["09", "7", "first", "../00_first", "scratch", "*", ""])
def test_unknown_notebook_names_those_that_exist(series: Path, wanted: str):
    with pytest.raises(NotebookError, match="allowed: 00_first, 07_second"):
        select_notebooks([wanted])


def test_parameters_are_read_as_the_type_that_the_notebook_declares(series: Path, tmp_path: Path):
    given = {"group_size": "4", "rate": "1e-6", "deep": "true", "label": "1e-6", "names": '["x", "y"]'}
    (notebook,) = plan(select_notebooks(["00"]), "tiny", tmp_path / "run", given)
    assert notebook.parameters == {
        "profile": "tiny",
        "run_dir": str(tmp_path / "run"),
        "group_size": 4,
        "rate": 1e-6,
        "deep": True,
        "label": "1e-6",
        "names": ["x", "y"],
    }


def test_parameter_goes_only_to_notebooks_that_have_it(tmp_path: Path):
    first = _notebook(tmp_path / "00_a.ipynb", parameters="seed: int = 0  # a seed")
    second = _notebook(tmp_path / "01_b.ipynb", parameters="size: int = 0  # a size")
    planned = plan([first, second], "tiny", tmp_path, {"size": "3"})
    assert [dict(notebook.parameters) for notebook in planned] == [{}, {"size": 3}]


def test_profile_given_as_a_file_reaches_the_notebook_as_an_absolute_path(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    (notebook,) = plan(select_notebooks(["00"]), "mine.json", Path("run"), {})
    assert notebook.parameters == {"profile": str(tmp_path / "mine.json"), "run_dir": str(tmp_path / "run")}


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("gruop_size", "8", "did you mean group_size?"),
        ("group_size", "abc", "found 'abc', allowed: int"),
        ("group_size", "4.5", "allowed: int"),
        ("group_size", "", "allowed: int"),
        ("rate", "nan", "allowed: float"),
        ("deep", "1", "allowed: bool"),
        ("names", "x", "allowed: list"),
        ("names", "__import__('os').getcwd()", "allowed: list"),
        ("profile", "full", "set it with --profile"),
        ("run_dir", "/elsewhere", "set it with --run-dir or --name"),
        ("x = 1; import os", "1", "unknown"),
        ("group_size\nimport os", "1", "unknown"),
    ],
)
def test_wrong_parameter_stops_before_anything_runs(series: Path, tmp_path: Path, name: str, value: str, part: str):
    with pytest.raises(NotebookError) as error:
        plan(select_notebooks(), "tiny", tmp_path, {name: value})
    assert part in str(error.value) and "\n" not in str(error.value)


def test_parameter_that_its_setting_does_not_allow_stops_before_anything_runs(series: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"training_settings.group_size: found 1, allowed: integer >= 2"):
        plan(select_notebooks(), "tiny", tmp_path, {"group_size": "1"})
    plan(select_notebooks(), "tiny", tmp_path, {"group_size": "0"})  # the notebook's own default


@pytest.mark.parametrize(("name", "value"), [("seeds_per_prompt", "0"), ("temperature", "-1"), ("seed", "-1")])
def test_a_parameter_named_like_any_setting_is_held_against_it(tmp_path: Path, name: str, value: str):
    kind = "float" if name == "temperature" else "int"
    declared = f'profile: str = "tiny"  # a profile\n{name}: {kind} = {7 if kind == "int" else 0.7}  # a setting'
    notebook = _notebook(tmp_path / "00_a.ipynb", parameters=declared)
    with pytest.raises(ConfigError, match=rf"_settings\.{name}: found {value}"):
        plan([notebook], "tiny", tmp_path, {name: value})


def test_a_parameter_that_only_other_notebooks_have_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = _notebook(tmp_path / "00_a.ipynb", parameters="seed: int = 0  # a seed")
    _notebook(tmp_path / "01_b.ipynb", parameters="size: int = 0  # a size")
    with pytest.raises(NotebookError, match=r"parameter size: not in 00_a, but in 01_b\. Add that to --notebooks"):
        plan([first], "tiny", tmp_path, {"size": "3"})


def test_settings_reach_the_notebooks_as_a_profile_of_the_run(series: Path, tmp_path: Path):
    settings = {"training_settings.beta": "0.5"}
    (notebook,) = plan(select_notebooks(["00"]), "tiny", tmp_path / "run", {}, settings)
    assert not (tmp_path / "run").exists()
    headless.write_profile(tmp_path / "run", "tiny", settings)
    assert notebook.parameters["profile"] == str(tmp_path / "run" / "profile.json")
    assert load_config(notebook.parameters["profile"]) == load_config("tiny", settings)


def test_a_file_that_is_no_notebook_is_named(tmp_path: Path):
    (tmp_path / "00_a.ipynb").write_text("{")
    with pytest.raises(NotebookError, match=r"00_a\.ipynb: not a notebook"):
        plan([tmp_path / "00_a.ipynb"], "tiny", tmp_path, {})


# -- grpo-kit run ------------------------------------------------------------------------------------------------------

PAYLOAD = '"); open("escaped.txt", "w"); ("\\'


def test_run_executes_the_notebooks_and_reports_the_run(
    series: Path, synthetic_run: Path, capsys: pytest.CaptureFixture
):
    code = _run(
        "run", "--notebooks", "00", "--run-dir", str(synthetic_run), "-p", "group_size=4", "-p", f"label={PAYLOAD}"
    )
    printed = capsys.readouterr().out
    assert code == 0, printed
    executed = nbformat.read(synthetic_run / "notebooks" / "00_first.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == f"4 {PAYLOAD}\n"  # a value stays a value
    assert not list(PROJECT_ROOT.glob("escaped.txt"))
    assert executed.metadata.papermill.duration > 0
    assert (synthetic_run / "index.html").is_file()
    for part in ("run folder:", "minutes per notebook", "00_first", "index.html"):
        assert part in printed


def test_failed_notebook_is_named_with_its_error_and_keeps_what_it_did(
    series: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    _notebook(series / "08_third.ipynb")
    folder = tmp_path / "run"
    assert _run("run", "--notebooks", "07,08", "--run-dir", str(folder)) == 1
    captured = capsys.readouterr()
    assert "07_second failed: " in captured.err and "ZeroDivisionError: division by zero" in captured.err
    assert (folder / "notebooks" / "07_second.ipynb").is_file()
    assert not (folder / "notebooks" / "08_third.ipynb").exists()  # nothing goes on after a failure
    page = (folder / "index.html").read_text()
    assert "stopped: ZeroDivisionError: division by zero" in page and 'href="notebooks/07_second.html"' in page


def test_notebook_that_takes_too_long_is_stopped(series: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    _notebook(series / "08_third.ipynb", "import time; time.sleep(60)")
    assert _run("run", "--notebooks", "08", "--run-dir", str(tmp_path / "run"), "--minutes-per-cell", "0.02") == 1
    assert "08_third failed: a cell ran longer than 0.02 minutes" in capsys.readouterr().err
    assert "stopped: a cell ran longer than 0.02 minutes" in (tmp_path / "run" / "index.html").read_text()


def test_kernel_that_dies_is_named_and_what_was_done_is_kept(
    series: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    _notebook(series / "08_third.ipynb", "print('before')", "import os; os._exit(1)")
    assert _run("run", "--notebooks", "08", "--run-dir", str(tmp_path / "run")) == 1
    assert "08_third failed: its kernel died" in capsys.readouterr().err
    kept = nbformat.read(tmp_path / "run" / "notebooks" / "08_third.ipynb", as_version=4)
    assert kept.cells[2].outputs[0].text == "before\n"
    assert "stopped: its kernel died" in (tmp_path / "run" / "index.html").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ("-p", "gruop_size=8"),
        ("-p", "group_size=abc"),
        ("-p", "group_size=1"),
        ("-p", "group_size"),
        ("-p", "seeds_per_prompt=2"),
        ("-p", "=8"),
        ("-o", "training_settings.group_size=1"),
        ("-o", "training_settings.gruop_size=4"),
        ("-o", "group_size=4"),
        ("--grid", "no_such_file.yaml"),
        ("-p", "rate=1", "-p", "rate=2"),
        ("--notebooks", "99"),
        ("--profile", "tinny"),
        ("--name", "a", "--run-dir", "b"),
    ],
)
def test_mistake_is_one_line_exit_code_2_and_nothing_runs(
    series: Path, arguments: tuple, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(headless, "execute", lambda *_: pytest.fail("a notebook was run"))
    assert _run("run", *arguments) == 2
    _one_line(capsys)


NAMES = ["../x", "a/b", "..", ".", "/etc", "a\\b", ".hidden", "-x", "a b", "a\0b", "é", "x" * 101, "a\n", "{pm}", "~"]


@pytest.mark.parametrize("name", NAMES)
def test_run_name_that_could_leave_the_reports_folder_is_refused(name: str):
    with pytest.raises(KitError, match="run name"):
        new_run_folder("tiny", None, name)


def test_run_folder_is_in_reports_unless_asked_otherwise(tmp_path: Path):
    assert new_run_folder("tiny", None, "first-1.0_b") == PROJECT_ROOT / "reports" / "first-1.0_b"
    assert new_run_folder("tiny", tmp_path / "x", "") == tmp_path / "x"
    unnamed = new_run_folder("tiny", None, "")
    assert unnamed.parent == PROJECT_ROOT / "reports" and unnamed.name.startswith("tiny-2")


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow)])
def test_terminated_run_takes_its_kernel_along(tmp_path: Path, name: str):
    number = getattr(signal, name, None) or pytest.skip(f"no {name} here")
    _notebook(
        tmp_path / "00_a.ipynb",
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))",
        "time.sleep(120)",
    )
    code = f"import grpo_kit.runs.notebooks as h, pathlib; h.NOTEBOOK_FOLDER = pathlib.Path({str(tmp_path)!r})\n"
    code += f"import grpo_kit.cli; grpo_kit.cli.main(['run', '--run-dir', {str(tmp_path / 'run')!r}])"
    code = f"import signal; signal.signal({int(number)}, signal.SIG_DFL)\n{code}"  # nohup ignores it, and so would this
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL)
    pid = wait_for_number(tmp_path / "pid")
    process.send_signal(number)
    assert process.wait(600) == 128 + number
    deadline = time.monotonic() + 600
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


# -- the other commands ------------------------------------------------------------------------------------------------


def test_train_hands_settings_and_folder_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = {}
    monkeypatch.setattr(loop, "load_experiment", lambda config: seen.setdefault("config", config))
    monkeypatch.setattr(loop, "train", lambda kit, run_dir, processes: seen.setdefault("run_dir", run_dir))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"user_prompt": "a"}')
    overrides = ["-o", "training_settings.seed=5", "-o", "training_settings.train_prompts=mine.jsonl"]
    assert _run("train", *overrides, "--run-dir", "here") == 0
    assert seen["config"].training_settings.seed == 5
    assert seen["config"].training_settings.train_prompts == str(tmp_path / "mine.jsonl")  # from where it was called
    assert seen["run_dir"] == tmp_path / "here"


def test_interrupted_training_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "load_experiment", lambda config: None)
    monkeypatch.setattr(loop, "train", interrupt)
    assert _run("train", "--run-dir", str(tmp_path / "r")) == 130
    assert f"grpo-kit train --run-dir {tmp_path / 'r'}" in capsys.readouterr().err


def test_run_that_is_there_goes_on_with_its_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    seen = []
    monkeypatch.setattr(loop, "load_experiment", seen.append)
    monkeypatch.setattr(loop, "train", lambda kit, run_dir, processes: None)
    config = load_config("workshop", {"training_settings.seed": 5})
    save_config(config, tmp_path / "config.json")
    assert _run("train", "--run-dir", str(tmp_path)) == 0
    assert _run("train", "--run-dir", str(tmp_path), "--profile", "tiny") == 2  # before models are loaded
    assert "training_settings.seed: found 5 in the run, 0 in the config" in capsys.readouterr().err
    assert seen == [config]


def test_evaluate_compares_the_trained_policy_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    seen = {}
    monkeypatch.setattr(evaluation_module, "load_experiment", lambda config, trained: (config.profile, trained))
    monkeypatch.setattr(evaluation_module, "evaluate", lambda kit, **options: seen.update(kit=kit, **options))
    save_config(load_config("workshop"), tmp_path / "config.json")
    assert _run("evaluate", str(tmp_path)) == 2
    assert "no trained policy" in _one_line(capsys)
    (tmp_path / "best").mkdir()
    assert _run("evaluate", str(tmp_path)) == 0
    assert seen["kit"] == ("workshop", tmp_path / "best") and seen["run_dir"] == tmp_path
    assert seen["compare"] == ("raw", "initial", "trained", "oracle")


@pytest.mark.parametrize("command", ["evaluate", "report"])
@pytest.mark.parametrize("run", ["no_such_run", "../..", "/", "a\0b", "x" * 5000, "x" * 400, "~nobody_at_all"])
def test_unknown_run_is_one_line(command: str, run: str, capsys: pytest.CaptureFixture):
    assert _run(command, run) == 2
    assert "no run folder" in _one_line(capsys)


def test_report_writes_the_page_and_prints_the_table(synthetic_run: Path, capsys: pytest.CaptureFixture):
    assert _run("report", str(synthetic_run)) == 0
    assert str(synthetic_run / "index.html") in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("run", "--no-such-option"), ("fly",), ("train", "-o"), ("evaluate",)])
def test_wrong_usage_is_exit_code_2(arguments: tuple):
    assert _run(*arguments) == 2


# -- grpo-kit check ----------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "policy"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "model.safetensors").write_bytes(b"w" * 1000)
    digest = hashlib.sha256(b"w" * 1000).hexdigest()
    (folder / "card.json").write_text(json.dumps({"sha256": {"inner/model.safetensors": digest}}))
    return folder


def test_intact_weights_match_their_card(weights: Path):
    assert "1 files match their card" in check.weights_text(str(weights))


def test_flipped_bit_is_found_and_named(weights: Path):
    file = weights / "inner" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)
    with pytest.raises(KitError, match=r"model\.safetensors: damaged: sha256 .* Fetch or copy it again"):
        check.weights_text(str(weights))


def test_missing_weights_are_named(weights: Path):
    (weights / "inner" / "model.safetensors").unlink()
    with pytest.raises(KitError, match=r"model\.safetensors: missing"):
        check.weights_text(str(weights))
    (weights / "card.json").unlink()
    with pytest.raises(KitError, match="no weight file"):
        check.weights_text(str(weights))
    with pytest.raises(KitError, match="no such folder"):
        check.weights_text(str(weights / "elsewhere"))


def test_model_that_is_not_on_this_machine_says_what_to_do():
    with pytest.raises(KitError, match="--profile tiny"):
        check.weights_text("no-such-organisation/no-such-model")


def test_check_reports_each_problem_in_one_line_and_exits_with_1(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture
):
    settings = {
        "profile": "tiny",
        "model_settings": {"vlm_model": str(weights), "sd_model": str(tmp_path / "gone")},
        "training_settings": {"train_prompts": "broken.jsonl"},
    }
    (tmp_path / "broken.jsonl").write_text('{"user_prompt": "a"}\n{"user_prompt": \n')
    (tmp_path / "c.json").write_text(json.dumps(settings))
    assert _run("check", "--config", str(tmp_path / "c.json")) == 1
    lines = {line[9:22].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["policy"].startswith("OK") and lines["python"].startswith("OK") and lines["kernel"].startswith("OK")
    assert lines["generator"].startswith("PROBLEM") and "Fetch or copy it again" in lines["generator"]
    assert lines["train prompts"].startswith("PROBLEM") and "broken.jsonl:2: not JSON" in lines["train prompts"]
    assert "models load" not in lines  # nothing to load where files are missing


def test_check_reports_any_failure_as_a_line():
    def fail() -> str:
        raise RuntimeError("first\nsecond")

    finding = check._found("kernel", fail)
    assert not finding.ok and "RuntimeError: first" in str(finding) and "\n" not in str(finding)
