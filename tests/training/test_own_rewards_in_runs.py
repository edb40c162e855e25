"""A run and its rewards: what is written down, and who goes on with it."""

import copy
import dataclasses
import json
import signal
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from support.grids import write_notebook

from grpo_kit import cli
from grpo_kit.config import PROJECT_ROOT, KitError, load_config
from grpo_kit.evaluation.evaluate import evaluate
from grpo_kit.experiment import Experiment
from grpo_kit.rewards import Rewards, load_rewards
from grpo_kit.runs import notebooks as headless
from grpo_kit.training.branch import branch
from grpo_kit.training.loop import start, train
from grpo_kit.training.replay import replay
from tests.chaos.phases import interrupting, this_process_gets

QUICK = {
    "training_settings.num_iterations": 2,
    "training_settings.prompts_per_iteration": 1,
    "training_settings.group_size": 2,
    "training_settings.validate_every": 2,
    "training_settings.save_every": 1,
    "generation_settings.num_inference_steps": 1,
    "evaluation_settings.validation_prompts": 2,
    "evaluation_settings.num_prompts": 2,
    "evaluation_settings.seeds_per_prompt": 1,
    "evaluation_settings.paraphrases": False,
    "reward_settings.monitors": ["gold"],
}
CODE = """
def redness(images, prompts, enhanced_prompts):
    return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images]
"""


def redness(images, prompts, enhanced_prompts):
    return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images]


class Brightness:
    """A reward with a state."""

    def __call__(self, images: list, prompts: list[str], enhanced_prompts: list[str]) -> list[float]:
        return [image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for image in images]


PASSED = {"redness": redness, "lambda": lambda images, *texts: [1.0] * len(images), "brightness": Brightness()}


def _passed(own_kit: Experiment, name: str = "redness", **settings: object) -> Experiment:
    kit = dataclasses.replace(own_kit, config=load_config(own_kit.config, {**QUICK, **settings}))
    return kit.with_rewards(Rewards({name: PASSED[name]}, {name: 1.0}, {"gold": kit.rewards.monitors["gold"]}))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with a reward of the user's own."""
    (tmp_path / "my_rewards.py").write_text(CODE)
    return tmp_path / "my_rewards.py"


def _named(own_kit: Experiment, file: Path, function: str = "redness", **settings: object) -> Experiment:
    weights = {"reward_settings.weights": {f"{file}:{function}": 1.0}}
    config = load_config(own_kit.config, {**QUICK, **weights, **settings})
    return dataclasses.replace(own_kit, config=config, rewards=load_rewards(config))


def _lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- passed from Python -----------------------------------------------------------------------------------------------


@pytest.mark.field("F1")
@pytest.mark.parametrize("name", PASSED)
def test_reward_from_python_is_written_down_and_who_goes_on_without_it_is_refused(
    own_kit: Experiment, tmp_path: Path, name: str
):
    run = tmp_path / "run"
    train(_passed(own_kit, name), run, progress=False)
    entry = json.loads((run / "config.json").read_text())["rewards"][name]
    assert Path(entry["file"]).name == Path(__file__).name and len(entry["sha256"]) == 64
    assert f"reward 1 · {name} (the function {entry['function']} of" in (run / "best/README.md").read_text()
    before = (run / "metrics.jsonl").read_bytes()
    tried = {
        "train": lambda: start(load_config(run, {"training_settings.num_iterations": 4}), run),
        "evaluate": lambda: evaluate(own_kit, compare=("raw", "trained"), run_dir=run),
        "replay": lambda: replay(run, 1, progress=False),
        "branch": lambda: branch(run, 1, tmp_path / "branch", {"training_settings.beta": 0.1}, progress=False),
    }
    for what, attempt in tried.items():
        if what == "evaluate":
            own_kit = dataclasses.replace(own_kit, config=load_config(run))
        with pytest.raises(
            KitError, match=r"pass them again \(kit\.with_rewards\), or name them in reward_settings"
        ) as error:
            attempt()
        assert name in str(error.value) and "found 1 · clip_similarity" in str(error.value), what
        assert "\n" not in str(error.value)
    assert (run / "metrics.jsonl").read_bytes() == before and not (tmp_path / "branch").exists()


@pytest.mark.field("F1")
def test_same_function_from_python_goes_on_and_so_does_the_same_code_by_name(
    own_kit: Experiment, tmp_path: Path, file: Path
):
    run = tmp_path / "run"
    train(_passed(own_kit), run, progress=False)
    assert train(_passed(own_kit, **{"training_settings.num_iterations": 3}), run, progress=False).started_from == 2
    named = _named(own_kit, file, **{"training_settings.num_iterations": 4})
    assert train(named, run, progress=False).started_from == 3
    assert list(load_config(run).reward_settings.weights) == [f"{file}:redness"]  # a command goes on with it now
    assert train(named, run, progress=False).started_from == 4
    assert all("rewards/redness/mean" in line for line in _lines(run))


@pytest.mark.field("F1")
def test_another_function_under_the_same_name_is_refused(
    own_kit: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(_passed(own_kit), tmp_path / "run", progress=False)
    monkeypatch.setitem(PASSED, "redness", Brightness())
    with pytest.raises(KitError, match=r"found 1 · redness \(the function Brightness of test_own_rewards_in_runs"):
        train(_passed(own_kit, **{"training_settings.num_iterations": 3}), tmp_path / "run", progress=False)


def test_runs_of_the_kits_own_rewards_are_as_before(own_kit: Experiment, tmp_path: Path):
    kit = dataclasses.replace(own_kit, config=load_config(own_kit.config, QUICK))
    kit = dataclasses.replace(kit, rewards=load_rewards(kit.config))
    train(kit, tmp_path / "run", progress=False)
    with pytest.raises(KitError, match="its rewards are 1 · clip_similarity, watched: gold; found 1 · redness"):
        train(_passed(own_kit, **{"training_settings.num_iterations": 3}), tmp_path / "run", progress=False)
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["rewards"]  # as an older version of the kit wrote it
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    more = dataclasses.replace(kit, config=load_config(kit.config, {"training_settings.num_iterations": 3}))
    assert train(more, tmp_path / "run", progress=False).started_from == 2


# --- by name, whose file changes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of_two_files(kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a reward in a file beside it, which imports another one; who changes them puts them back."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "helper.py").write_text("WEIGHT = 1\n")
    (folder / "my_rewards.py").write_text(f"import helper\n{CODE}")
    sys.modules.pop("helper", None)
    own = dataclasses.replace(kit, policy=copy.deepcopy(kit.policy))
    train(_named(own, folder / "my_rewards.py"), folder / "run", progress=False)
    return folder / "run"


@pytest.mark.field("F1")
@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda file: file.rename(file.with_name("gone.py")), r"my_rewards\.py: cannot be read: No such file"),
        (lambda file: file.write_text(CODE.replace("[0] / 255", "[1] / 255")), r"has changed .*\(my_rewards\.py\)"),
        (lambda file: file.with_name("helper.py").write_text("WEIGHT = 2\n"), r"has changed .*\(helper\.py\)"),
        (lambda file: file.write_text(CODE.replace("redness", "reddish")), "found no function 'redness'"),
    ],
)
def test_code_that_changed_under_a_run_is_one_line_before_models_are_loaded(
    run_of_two_files: Path, change: object, part: str, monkeypatch: pytest.MonkeyPatch
):
    run, file = run_of_two_files, run_of_two_files.with_name("my_rewards.py")
    before = {place: place.read_text() for place in run.parent.glob("*.py")}
    change(file)
    monkeypatch.setattr("grpo_kit.training.loop.load_experiment", lambda config: pytest.fail("models were loaded"))
    with pytest.raises(KitError, match=part) as error:
        start(load_config(run, {"training_settings.num_iterations": 3}), run)
    assert "\n" not in str(error.value)
    for place in run.parent.glob("*.py"):
        place.unlink()
    for place, text in before.items():
        place.write_text(text)


@pytest.mark.field("F1")
def test_file_that_was_moved_goes_on_by_its_new_place_and_changed_code_in_a_branch(
    own_kit: Experiment, tmp_path: Path, file: Path
):
    train(_named(own_kit, file), tmp_path / "run", progress=False)
    moved = file.rename(tmp_path / "moved.py")
    more = {"training_settings.num_iterations": 3}
    assert train(_named(own_kit, moved, **more), tmp_path / "run", progress=False).started_from == 2
    moved.write_text(CODE + "# changed\n")
    branch(tmp_path / "run", 3, tmp_path / "branch", {"training_settings.num_iterations": 4}, progress=False)
    kit = _named(own_kit, moved, **{"training_settings.num_iterations": 4})
    assert train(kit, tmp_path / "branch", progress=False).iterations == 4


# --- one file, all commands -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.field("F1")
def test_reward_in_a_file_is_the_same_in_every_command(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    sections: dict[str, dict] = {"reward_settings": {"weights": {"my_rewards.py:redness": 1.0}}}
    for key, value in QUICK.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    (tmp_path / "c.json").write_text(json.dumps(sections))
    run = tmp_path / "run"

    def command(*arguments: str, code: int = 0, folder: Path = PROJECT_ROOT) -> str:
        monkeypatch.chdir(folder)
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        done = capsys.readouterr()
        assert (stop.value.code or 0) == code, done.err
        return done.out + done.err

    with interrupting("rewards", 0.5, this_process_gets(signal.SIGINT)):
        command("train", "--config", "c.json", "--run-dir", str(run), code=130, folder=tmp_path)
    reached = len(_lines(run))
    command("train", "--run-dir", str(run), "-o", f"training_settings.num_iterations={reached + 2}")
    assert reached and len(_lines(run)) == reached + 2 and all("rewards/redness/mean" in line for line in _lines(run))
    command("evaluate", str(run))
    rows = pd.read_parquet(run / "evaluation/rows.parquet")
    assert (rows["reward/redness"] == rows["reward"]).all()
    assert "reward 1 · redness (my_rewards.py:redness)" in (run / "best/README.md").read_text()
    assert "equal bit for bit" in command("replay", str(run), "--iteration", str(reached + 1))
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"seeds": [1]}))
    train_it = "import grpo_kit as gk\ncfg = gk.load_config(profile, {'training_settings.seed': seed})"
    write_notebook(tmp_path / "series" / "00_train.ipynb", f"{train_it}\ngk.train(gk.load_experiment(cfg), run_dir)")
    monkeypatch.setattr(headless, "NOTEBOOK_FOLDER", tmp_path / "series")
    grid = ("--grid", "grid.yaml", "--run-dir", "grid")
    command("run", "--config", "c.json", "--notebooks", "00", *grid, folder=tmp_path)
    trials = [place.parent for place in (tmp_path / "grid").glob("*/metrics.jsonl")]
    assert len(trials) == 1 and all("rewards/redness/mean" in line for trial in trials for line in _lines(trial))
