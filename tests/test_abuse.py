"""Abuse (S1, S3, S4, S7, S9): what a file, a name, a value or a text must not be able to do.

What is elsewhere. S5, markup in prompts: tests/support/hostile.py has 200 payloads and the judge; test_widgets.py,
test_compare.py, test_series.py and test_show.py put them through widgets and pages, test_browser.py through a browser.
S6, special tokens in a user's text: trap T26 in tests/models/test_policy.py. S7 for wandb: tests/runs/test_tracking.py.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
from papermill.parameterize import parameterize_notebook
from PIL import Image
from support.abuse import Count
from support.grids import write_notebook

from grpo_kit import cli
from grpo_kit import config as config_module
from grpo_kit.config import PROFILES, PROJECT_ROOT, KitError, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator
from grpo_kit.rewards.composition import Rewards
from grpo_kit.runs import log_file
from grpo_kit.runs import notebooks as headless
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.grid import GridError, grid_trials, plan_trials, read_grid
from grpo_kit.runs.notebooks import NotebookError, Planned, execute, plan, select_notebooks
from grpo_kit.runs.places import new_run_folder
from grpo_kit.runs.record import RunRecord, read_run
from grpo_kit.show import write_report
from grpo_kit.show.curves import training_curves
from grpo_kit.show.images import group_figure, image_grid
from grpo_kit.show.pages import share_pages
from grpo_kit.show.style import STYLE
from grpo_kit.training.loop import train

# --- S1: nothing runs code that comes with data -----------------------------------------------------------------------

RUNS_CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pandas.read_pickle", "pd.read_pickle"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "jsonpickle"}
NAMED_EXCEPTIONS = {
    # the name of an exception, which torch.load(weights_only=True) raises
    ("grpo_kit/rewards/learned.py", "from pickle import UnpicklingError"),
    # a class of the kit's own, derived from yaml.SafeLoader (shown below)
    ("grpo_kit/config/strict.py", "yaml.load(text, _Loader)"),
    # a reward of the user's own, from the file that the user's config names
    ("grpo_kit/config/own_code.py", "compile(source, path, 'exec')"),
    ("grpo_kit/config/own_code.py", "exec(compile(source, path, 'exec'), vars(module))"),
    # the broken losses of exercise 06.4, whose lines are written in that module
    ("grpo_kit/course/exercises_06.py", "exec(text, space)"),
}


def sources() -> Iterator[tuple[str, str]]:
    """Every Python text that the project ships: modules, benchmarks, the code cells of notebooks (without magics)."""
    for folder in ("grpo_kit", "benchmarks"):
        for path in sorted((PROJECT_ROOT / folder).rglob("*.py")):
            yield path.relative_to(PROJECT_ROOT).as_posix(), path.read_text(encoding="utf-8")
    for path in sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        lines = "\n".join(cells).splitlines()
        assert not [line for line in lines if line.startswith("!")], f"{path.name}: a cell calls a shell"
        yield path.name, "\n".join(line for line in lines if not line.startswith("%"))


def unsafe(source: str) -> list[str]:
    """Every call and import in a Python text that could run code which comes with data, as source."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if any(rule(node) for rule in RULES)]


def _is_pickle(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(name.name.split(".")[0] in PICKLES for name in node.names)
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES


def _hides_a_loader(node: ast.AST) -> bool:
    """A loader imported by its bare name, or a module under another one, would pass the rules below unseen."""
    if isinstance(node, ast.Import):
        return any(name.asname and name.name in ("torch", "yaml", "os", "subprocess") for name in node.names)
    hidden = {"torch": {"load"}, "yaml": {"load", "load_all", "unsafe_load"}, "os": {"system", "popen"}}
    return isinstance(node, ast.ImportFrom) and any(name.name in hidden.get(node.module, ()) for name in node.names)


def _is_call_that_runs_code(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in RUNS_CODE


def _is_unsafe_load(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name, options = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
    if name in ("yaml.load", "yaml.load_all"):
        return ast.unparse(node.args[1]) != "yaml.SafeLoader" if len(node.args) > 1 else True
    if name in ("yaml.unsafe_load", "yaml.full_load"):
        return True
    return name == "torch.load" and options.get("weights_only") != "True"


def _is_shell_or_pickled_array(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle") and ast.unparse(node.value) != "False"
    )


def _is_trust_without_the_setting(node: ast.AST) -> bool:
    """`trust_remote_code` may be passed on from a variable or setting of that name; never be decided in code."""
    if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
        return not ast.unparse(node.value).endswith("trust_remote_code")
    if isinstance(node, ast.Dict):
        pairs = [(key, value) for key, value in zip(node.keys, node.values, strict=True) if key is not None]
        values = [ast.unparse(value) for key, value in pairs if ast.unparse(key) == "'trust_remote_code'"]
        return any(not value.endswith("trust_remote_code") for value in values)
    if isinstance(node, ast.arguments):
        names = [argument.arg for argument in [*node.posonlyargs, *node.args]][::-1]
        defaults = dict(zip(names, node.defaults[::-1], strict=False))
        defaults |= dict(zip([argument.arg for argument in node.kwonlyargs], node.kw_defaults, strict=True))
        found = defaults.get("trust_remote_code")
        return found is not None and ast.unparse(found) != "False"
    return False


RULES: list[Callable[[ast.AST], bool]] = [
    _is_pickle,
    _hides_a_loader,
    _is_call_that_runs_code,
    _is_unsafe_load,
    _is_shell_or_pickled_array,
    _is_trust_without_the_setting,
]


@pytest.mark.abuse("S1")
def test_nothing_shipped_runs_code_that_comes_with_data(attempts: Count) -> None:
    texts = list(sources())
    assert len(texts) > 100
    with attempts(len(texts)) as got_through:
        found = {(name, node) for name, source in texts for node in unsafe(source)}
        got_through += found - NAMED_EXCEPTIONS
        assert found == NAMED_EXCEPTIONS


@pytest.mark.abuse("S1")
def test_the_grids_yaml_loader_makes_plain_values_only(tmp_path: Path, attempts: Count) -> None:
    place = tmp_path / "g.yaml"
    place.write_text(f"seed: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']")
    with attempts(1):
        with pytest.raises(GridError):
            read_grid(place)
        assert not (tmp_path / "ran").exists()


def test_remote_code_is_off_unless_a_setting_says_otherwise() -> None:
    assert not any(load_config(name).model_settings.trust_remote_code for name in PROFILES)


@pytest.mark.abuse("S1", broken="a_line_that_runs_code")
@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(place)",
        "from torch import load",
        "import yaml as y",
        "torch.load(place, weights_only=False)",
        "eval('1')",
        "exec(text)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "np.load(place, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "def load(name, trust_remote_code=True): ...",
        "def load(name, *, trust_remote_code=True): ...",
    ],
)
def test_the_scan_sees_each_way(line: str) -> None:
    assert unsafe(line)
    assert not unsafe("model.eval(); re.compile('x'); torch.load(p, weights_only=True); yaml.load(t, yaml.SafeLoader)")


# --- S3: papermill writes a parameter's name into code as it stands ---------------------------------------------------

CODE = [
    "__import__('os').system('touch {0}')",
    "open('{0}', 'w').close()",
    "exec(\"open('{0}', 'w')\")",
    "import os; os.mkdir('{0}')",
    "!touch {0}",
    "%run {0}",
    "eval('1')",
    "[].__class__.__base__.__subclasses__()",
    "raise SystemExit",
    "breakpoint()",
]
AS_NAME = ["{0}", "x = {0}; y", "seed; {0}; x", "seed\n{0}\nx", "seed={0}#", "seed: {0}", "seed\r{0}\r", "\f{0}\nseed"]
AS_NAME += ["s\u0435ed = {0}; a", "x\x00{0}", "seed\u2028{0}\u2028x", "*{0},", "a[{0}]", "seed if {0} else seed"]
AS_VALUE = ["{0}", '"; {0}; "', "'; {0}; '", '"""\n{0}\n"""', '\\"; {0}; \\"', "\n{0}\n", "\r{0}\r", '\\"\n{0}\n#']
AS_VALUE += [
    "\u2028{0}\u2028",
    "{{{0}}}",
    "f'{{{0}}}'",
    '\\\\"; {0} #',
    "\x00{0}",
    "\ud800{0}",
    "%({0})s",
    "\\N{{DIGIT ONE}}",
]
AS_VALUE += ["\\x22; {0} #", "[{0}]", "({0},)", "{{'a': {0}}}", "lambda: {0}", "1 if {0} else 2", "`{0}`", "#{0}"]
TARGETS = ["escaped-a", "../escaped-b", "/tmp/escaped-c"]
ALL_KINDS = """profile: str = "tiny"
run_dir: str = ""
seed: int = 0
rate: float = 1.0
flag: bool = True
label: str = ""
steps: list = []
extra: dict = {}"""


def texts(shapes: list[str], count: int) -> list[str]:
    """That many different payloads of these shapes."""
    made = [shape.format(code.format(to)) for to, code, shape in itertools.product(TARGETS, CODE, shapes)]
    made += [f"{text} #{number}" for number, text in enumerate(made)]
    return list(dict.fromkeys(made))[:count]


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    return write_notebook(tmp_path / "notebooks" / "00_all_kinds.ipynb", "1", parameters=ALL_KINDS)


def injected(planned: Planned) -> str:
    """The code that papermill puts into the notebook."""
    made = parameterize_notebook(papermill.iorw.load_notebook_node(str(planned.path)), dict(planned.parameters))
    (cell,) = [cell for cell in made.cells if "injected-parameters" in cell.metadata.tags]
    return cell.source


def assigned(code: str) -> dict[str, object]:
    """The values of code that only assigns literals to names; anything else is an error."""
    found = {}
    for line in ast.parse(code).body:
        assert isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name), ast.unparse(line)
        found[line.targets[0].id] = ast.literal_eval(line.value)
    return found


def accepted_names(notebooks: list[Path], names: list[str], run: Path) -> list[str]:
    accepted = []
    for name in names:
        try:
            plan(notebooks, "tiny", run, {name: "1"})
        except NotebookError as error:
            assert len(str(error).splitlines()) == 1
        else:
            accepted.append(name)
    return accepted


@pytest.mark.abuse("S3")
@pytest.mark.abuse("S3", broken="names_unchecked")
def test_400_names_with_code_are_no_parameters(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: Count
) -> None:
    names = texts(AS_NAME, 400)
    assert len(names) == 400
    with attempts(420) as got_through:
        got_through += accepted_names([notebook], names, tmp_path / "run")
        got_through += accepted_names(select_notebooks(), names[:20], tmp_path / "run")
        assert got_through == []
    monkeypatch.setattr(headless, "_check_name", lambda *_: None)  # papermill alone only warns of such a name
    assert accepted_names([notebook], names, tmp_path / "run") == names


@pytest.mark.abuse("S3")
def test_600_values_with_code_stay_values(notebook: Path, tmp_path: Path, attempts: Count) -> None:
    outcomes = {"literal": 0, "refused": 0}
    kinds = itertools.cycle(["label", "label", "label", "seed", "rate", "flag", "steps", "extra"])
    with attempts(600):
        for value, name in zip(texts(AS_VALUE, 600), kinds, strict=False):
            try:
                (planned,) = plan([notebook], "tiny", tmp_path / "run", {name: value})
            except NotebookError as error:
                assert name != "label" and len(str(error).splitlines()) == 1
                outcomes["refused"] += 1
                continue
            assert assigned(injected(planned)) == planned.parameters, value
            outcomes["literal"] += 1
    print(outcomes)
    assert sum(outcomes.values()) == 600 and min(outcomes.values()) > 100
    assert not list(tmp_path.rglob("escaped*")) and not list(PROJECT_ROOT.glob("escaped*"))


@pytest.mark.parametrize("value", ["[" * 100_000, "(" * 3_000, "-" * 10_000 + "1", "{[]: 1}", "\0", "[1", "9" * 5_000])
def test_a_value_that_python_cannot_read_is_one_line(notebook: Path, tmp_path: Path, value: str) -> None:
    for name in ("steps", "extra", "seed"):
        with pytest.raises(NotebookError, match=f"parameter {name}: found"):
            plan([notebook], "tiny", tmp_path / "run", {name: value})


@pytest.mark.abuse("S3", broken="value_as_code")
def test_a_value_that_becomes_code_is_seen(notebook: Path) -> None:
    with pytest.raises(AssertionError):
        assigned("label = '' ; print(1)")
    with pytest.raises(ValueError, match="malformed"):
        assigned("label = __import__('os').name")
    with pytest.raises((AssertionError, SyntaxError)):  # what papermill does with a name that nobody checked
        assigned(injected(Planned(notebook, {"x = 1; print(2); y": 3})))


# --- S4: names that lead out of a folder ------------------------------------------------------------------------------

UP = ["../{0}", "../../{0}", "a/../../{0}", "./../{0}", "{1}/{0}", "//{1}/{0}", "a/b/../../../{0}", "../run/../{0}"]
UP += [
    "..\\{0}",
    "~/{0}",
    "~root/{0}",
    "..//{0}",
    "\x00../{0}",
    "../{0}\x00.jpg",
    "%2e%2e/{0}",
    ".\u200b./{0}",
    "../../../{0}",
]
UP += ["\uff0e\uff0e/{0}", "file://{1}/{0}", "..;/{0}", "thumbnails/../../{0}", "../thumbnails/../../{0}", "C:\\{0}"]
UP += ["{0}/../../{0}", "....//....//{0}", "../{0}/../{0}", "/{0}"]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with a run in it; nothing but the run may change."""
    (tmp_path / "outer" / "run").mkdir(parents=True)
    (tmp_path / "outer" / "victim.jpg").write_bytes(b"as it was")
    (tmp_path / "victim.jpg").write_bytes(b"as it was")
    return tmp_path


def names_that_lead_out(outside: Path, count: int = 125) -> list[str]:
    victims = ["victim", "victim.jpg", "victim.json", "new/victim", "v i"]
    return [up.format(victim, outside) for up, victim in itertools.product(UP, victims)][:count]


def strangers(outside: Path) -> dict[Path, bytes]:
    """Every file that is not the run's, with its content."""
    run = outside / "outer" / "run"
    files = [path for path in outside.rglob("*") if path.is_file() and not path.is_relative_to(run)]
    return {path: path.read_bytes() for path in files}


def attempt(write: Callable[[], object]) -> str:
    """What an attempt came to: "done", or "refused" with one line or by the system (a NUL, a missing folder)."""
    try:
        write()
    except KitError as error:
        assert len(str(error).splitlines()) == 1
        return "refused"
    except (OSError, ValueError):
        return "refused"
    return "done"


def save_pictures(outside: Path) -> list[str]:
    """Write thumbnails and JSON files of a run under names that lead out of it."""
    run, picture = RunFolder(outside / "outer" / "run"), Image.new("RGB", (4, 4))
    names = names_that_lead_out(outside)
    written = [attempt(lambda name=name: run.save_thumbnail(picture, name)) for name in names]
    return written + [attempt(lambda name=name: run.write_json(name, {})) for name in names]


@pytest.mark.abuse("S4")
def test_250_names_of_pictures_and_files_stay_in_the_run(outside: Path, attempts: Count) -> None:
    before = strangers(outside)
    with attempts(250) as got_through:
        outcomes = save_pictures(outside)
        got_through += dict(strangers(outside).items() ^ before.items())
        assert got_through == []
    assert len(outcomes) == 250 and outcomes.count("refused") > 100


@pytest.mark.abuse("S4", broken="any_name_taken")
def test_a_run_that_takes_any_name_is_caught(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "_inside", lambda self, name: self.path / name)
    before = strangers(outside)
    save_pictures(outside)
    assert strangers(outside) != before


def read_outside(run: Path, names: list[str]) -> list[Path]:
    """The files outside of a run that its rows can name."""
    record, found = read_run(run), []
    for name in names:
        with contextlib.suppress(KitError):
            found.append(record.file(name).resolve())
    return [path for path in found if not path.is_relative_to(run.resolve())]


@pytest.mark.abuse("S4")
@pytest.mark.abuse("S4", broken="any_picture_read")
def test_125_pictures_named_in_rows_are_read_from_the_run_only(
    outside: Path, monkeypatch: pytest.MonkeyPatch, attempts: Count
) -> None:
    names = names_that_lead_out(outside)
    assert len(names) == 125
    with attempts(125) as got_through:
        got_through += read_outside(outside / "outer" / "run", names)
        assert got_through == []
    monkeypatch.setattr(RunRecord, "file", lambda self, name: self.path / name.replace("\0", ""))
    assert outside / "victim.jpg" in read_outside(outside / "outer" / "run", names)


def misplaced(folder_of: Callable[[str], Path], names: list[str], parent: Path) -> list[str]:
    """The names whose folder does not lie directly in its parent; a name that is refused has none."""
    found = []
    for name in names:
        with contextlib.suppress(KitError):
            folder = folder_of(name)
            if os.path.normpath(folder) != str(folder) or folder.parent != parent:
                found.append(name)
    return found


@pytest.mark.abuse("S4")
@pytest.mark.abuse("S4", broken="run_name_as_it_is")
def test_125_run_names_lie_directly_in_the_reports(outside: Path, attempts: Count) -> None:
    names, reports = names_that_lead_out(outside), PROJECT_ROOT / "reports"
    with attempts(len(names)) as got_through:
        got_through += misplaced(lambda name: new_run_folder("tiny", None, name), names, reports)
        assert got_through == []
    assert new_run_folder("tiny", None, "a-name.1").parent == reports
    assert len(misplaced(lambda name: reports / name, names, reports)) > 90


@pytest.mark.abuse("S4")
@pytest.mark.abuse("S4", broken="grid_value_as_it_is")
def test_125_grid_values_make_folders_in_the_grid(outside: Path, attempts: Count) -> None:
    notebook = write_notebook(outside / "outer" / "run" / "00_kinds.ipynb", "1", parameters=ALL_KINDS)
    before, grid, names = strangers(outside), outside / "outer" / "run" / "grid", names_that_lead_out(outside)
    trials = plan_trials(grid_trials({"label": names}), [notebook], "tiny", grid)
    folders = {trial.values["label"]: trial.folder for trial in trials}
    assert len(set(folders.values())) == len(names)
    with attempts(len(names)) as got_through:
        got_through += misplaced(folders.__getitem__, names, grid)
        assert got_through == [] and strangers(outside) == before
    assert len(misplaced(lambda name: grid / name, names, grid)) > 90


def test_pages_are_shared_into_the_folder_that_was_named(outside: Path) -> None:
    run, shared = outside / "outer" / "run", outside / "outer" / "run" / "shared"
    (run / "notebooks").mkdir()
    names = [re.sub(r"[/\x00]", "_", name)[:60] for name in names_that_lead_out(outside)]
    for page in [run / "index.html", *(run / "notebooks" / f"{name}.html" for name in names)]:
        page.write_text("<p>page</p>", encoding="utf-8")
    before = strangers(outside)
    written = share_pages(run, shared)
    assert len(written) == 1 + len(set(names))
    assert all(page.resolve().is_relative_to(shared.resolve()) for page in written)
    assert strangers(outside) == before
    with pytest.raises(KitError, match="the run's own folder"):
        share_pages(run, run / "notebooks" / "..")


# --- S7: keys in the environment stay there ---------------------------------------------------------------------------

CANARIES = {
    "WANDB_API_KEY": "canary" + "0123456789abcdef" * 2,
    "HF_TOKEN": "hf_canaryCANARYcanaryCANARYcanary",
    "HUGGING_FACE_HUB_TOKEN": "hf_secondcanarySECONDcanary",
    "AWS_SECRET_ACCESS_KEY": "aws/canary+CANARY",
}
SMALLEST = {
    "training_settings.num_iterations": 1,
    "training_settings.prompts_per_iteration": 1,
    "training_settings.group_size": 2,
    "training_settings.validate_every": 1,
    "training_settings.save_every": 1,
    "generation_settings.num_inference_steps": 1,
    "evaluation_settings.validation_prompts": 2,
    "tracking_settings.log_level": "DEBUG",
}


def hits(folder: Path) -> list[str]:
    """Each file that holds a canary, in its bytes or (compressed) in a table's cells."""
    found = []
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        if path.suffix == ".parquet":
            content += pd.read_parquet(path).to_json(default_handler=str).encode()
        found += [f"{path.name}: {name}" for name, value in CANARIES.items() if value.encode() in content]
    return found


@pytest.fixture
def keyed_run(kit: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of one iteration with its page, a shared copy and an executed notebook, where the environment has keys."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    small = dataclasses.replace(
        kit,
        config=load_config(kit.config, SMALLEST),
        policy=copy.deepcopy(kit.policy),
        generator=Generator(kit.generator.pipeline, num_inference_steps=1, guidance_scale=1.0),
        train_prompts=kit.train_prompts[:2],
        val_prompts=kit.val_prompts[:2],
    )
    train(small, tmp_path / "run", progress=False)
    notebook = write_notebook(tmp_path / "00_one.ipynb", "print(seed)", parameters=ALL_KINDS)
    (planned,) = plan([notebook], "tiny", tmp_path / "run", {"seed": "7"})
    assert execute(planned, tmp_path / "run" / "notebooks").error is None
    write_report(tmp_path / "run")
    share_pages(tmp_path / "run", tmp_path / "run" / "shared")
    return tmp_path / "run"


@pytest.mark.abuse("S7")
@pytest.mark.abuse("S7", broken="environment_in_a_log")
def test_no_key_of_the_environment_is_in_a_run(keyed_run: Path, attempts: Count) -> None:
    written = {path.relative_to(keyed_run).as_posix() for path in keyed_run.rglob("*") if path.is_file()}
    for kind in ("config.json", "training.log", "rollouts/", "checkpoints/", "best/", "notebooks/", "index.html"):
        assert any(name.startswith(kind) for name in written), kind
    with attempts(len(written)) as got_through:
        got_through += hits(keyed_run)
        assert got_through == []
    key = CANARIES["HF_TOKEN"]
    (keyed_run / "leak.log").write_text(f"{dict(os.environ)}")
    pd.DataFrame({"note": [f"token={key}"] * 500}).to_parquet(keyed_run / "leak.parquet")
    assert {hit.split(":")[0] for hit in hits(keyed_run)} == {"leak.log", "leak.parquet"}


# --- S9: formulas and escape codes ------------------------------------------------------------------------------------

FORMULAS = ["$\\frac{$", "$x_{y$", "$$", "$\\undefined{1}$", "a $ b", "\\$5 and $6", "$\\input{/etc/passwd}$", "$^^M$"]


def draw_titles(text: str) -> None:
    """Draw a user's text as title, as caption and as the name of a reward."""
    picture = Image.new("RGB", (8, 8))
    group_figure([picture] * 2, [text, text], [0.1, 0.2], [-1.0, 1.0], text).to_png(40)
    image_grid([picture], [text]).to_svg()
    training_curves(pd.DataFrame({"iteration": [1, 2], "reward": [0.1, 0.2], f"reward/{text}": [0.1, 0.2]})).to_png(40)


@pytest.mark.abuse("S9")
def test_formulas_in_titles_are_text(attempts: Count) -> None:
    assert STYLE["text.parse_math"] is False and STYLE["text.usetex"] is False
    with attempts(len(FORMULAS)):
        for text in FORMULAS:
            draw_titles(text)


@pytest.mark.abuse("S9", broken="style_that_reads_mathematics")
def test_a_style_that_reads_mathematics_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STYLE, "text.parse_math", True)
    with pytest.raises(ValueError, match=r"ParseException|Expected"):
        draw_titles(FORMULAS[0])


def test_the_kit_writes_no_csv_whose_cells_a_spreadsheet_could_run() -> None:
    """Tables are parquet, JSON and HTML; who adds CSV or Excel has to make =cmd|' /C calc'!A0 harmless, and test it."""
    writes = re.compile(r"\bto_csv\b|\bto_excel\b|csv\.(writer|DictWriter)", re.MULTILINE)
    assert [name for name, source in sources() if writes.search(source)] == []
    assert writes.search("frame.to_csv(place)")


ESCAPES = ["\x1b[31mred", "\x1b]0;title\x07", "\x1b[2J", "\x9b2J", "\rover", "\x08\x08", "\u202eback", "\ud800", "\x00"]


def logged(folder: Path, texts: list[str], capsys: pytest.CaptureFixture) -> tuple[str, str]:
    """What a run's log file and the screen hold after each of these texts was warned of."""
    run = RunFolder(folder)
    folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        run.hold(stack)
        for text in texts:
            logging.getLogger("grpo_kit.rewards").warning("reward failed: %s", text)
    return (folder / "training.log").read_bytes().decode("utf-8"), capsys.readouterr().err


def is_plain(text: str, lines: int) -> bool:
    """So many lines, of characters that a terminal only shows."""
    return all(line.isprintable() for line in text.split("\n")) and text.count("\n") == lines


FORGED = "x\n2026-01-01 00:00:00,000 INFO all is well"


@pytest.mark.abuse("S9")
def test_escape_codes_and_line_ends_in_logs_are_written_out(
    tmp_path: Path, capsys: pytest.CaptureFixture, attempts: Count
) -> None:
    file, screen = logged(tmp_path / "run", [*ESCAPES, FORGED], capsys)
    with attempts(len(ESCAPES) + 1):
        assert is_plain(file, len(ESCAPES) + 1) and is_plain(screen, len(ESCAPES) + 1)
    assert "\\x1b[31mred" in file and "\\n2026-01-01" in file


@pytest.mark.abuse("S9", broken="log_as_it_is")
def test_a_log_that_keeps_escape_codes_is_caught(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "OneLineFormatter", logging.Formatter)
    file, _screen = logged(tmp_path / "run", ["\x1b[31mred", FORGED], capsys)
    assert not is_plain(file, 2)


def test_a_rewards_own_error_reaches_the_log_without_its_escape_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def broken(images: list, prompts: list, enhanced_prompts: list) -> list:
        raise RuntimeError(f"cannot score {enhanced_prompts[0]}")

    run, picture = RunFolder(tmp_path), Image.new("RGB", (8, 8))
    with contextlib.ExitStack() as stack:
        run.hold(stack)
        rewards = Rewards({"mine": broken}, {"mine": 1.0}, {}, on_error="nan")
        rewards.score([picture], ["a"], ["\x1b[31mred \x07"])
    text = (tmp_path / "training.log").read_text(encoding="utf-8")
    assert is_plain(text, 1) and "\\x1b[31mred" in text


def errors_of_the_command(folder: Path, texts: list[str], capsys: pytest.CaptureFixture) -> str:
    """What the command says on the screen of files with such names."""
    for text in texts:
        with pytest.raises(SystemExit):
            cli.main(["run", "--notebooks", "00", "--grid", str(folder / text.replace("\ud800", "\udcff"))])
    return capsys.readouterr().err


@pytest.mark.abuse("S9")
@pytest.mark.abuse("S9", broken="error_as_it_is")
def test_escape_codes_in_a_commands_errors_are_written_out(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, attempts: Count
) -> None:
    texts = [text for text in ESCAPES if "\0" not in text]  # no command line can hold that one
    with attempts(len(texts)):
        assert is_plain(errors_of_the_command(tmp_path, [*texts, "line\nend"], capsys), len(texts) + 1)
    monkeypatch.setattr(config_module, "printable", str)
    assert not is_plain(errors_of_the_command(tmp_path, texts[:1], capsys), 1)
