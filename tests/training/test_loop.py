"""Training: a run that was stopped is the run that was not, and a folder holds what the documentation says."""

import copy
import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from support.broken_twins import broken_versions
from support.policy_forms import LORA

from grpo_kit.config import Config, KitError, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator
from grpo_kit.models.policy import Policy, load_policy
from grpo_kit.rewards.clip import ClipSimilarity
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rewards.shaping import Shaping
from grpo_kit.rollout import Rollout
from grpo_kit.runs.folder import RunError, RunFolder
from grpo_kit.training.iteration import run_iteration
from grpo_kit.training.loop import TrainResult, train

QUICK = {
    "training_settings.num_iterations": 4,
    "training_settings.prompts_per_iteration": 2,
    "training_settings.group_size": 4,
    "training_settings.learning_rate": 1e-3,
    "training_settings.validate_every": 2,
    "training_settings.save_every": 2,
    "generation_settings.num_inference_steps": 1,
    "evaluation_settings.validation_prompts": 3,
    "evaluation_settings.paraphrases": False,
}


def _config(kit: Experiment, **training: object) -> Config:
    return load_config(kit.config, QUICK | {f"training_settings.{name}": value for name, value in training.items()})


def _fresh(kit: Experiment, **training: object) -> Experiment:
    """The experiment as a new process would load it: untrained, nothing encoded yet."""
    clip = kit.rewards.parts["clip_similarity"]
    own = ClipSimilarity(clip.model, clip.preprocess, clip.tokenizer, clip.device)
    return dataclasses.replace(
        kit,
        config=_config(kit, **training),
        policy=copy.deepcopy(kit.policy),
        generator=Generator(kit.generator.pipeline, num_inference_steps=1, guidance_scale=1.0, batch_size=24),
        rewards=dataclasses.replace(kit.rewards, parts={"clip_similarity": own}),
        train_prompts=kit.train_prompts[:5],  # some prompts come again, so that kept features are used
    )


def _train(kit: Experiment, folder: Path, **training: object) -> TrainResult:
    return train(_fresh(kit, **training), folder, progress=False)


def _without_times(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "time" not in name} for row in rows]


def _bytes(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


WEIGHTS = (
    "checkpoints/iter_000004/policy/model.safetensors",
    "checkpoints/iter_000004/optimizer.safetensors",
    "checkpoints/iter_000004/manifest.json",
    "best/model.safetensors",
    "validation_iter_000004.json",
)


@pytest.fixture(scope="module")
def told() -> list[tuple[float, int]]:
    """What the run below told: an iteration, and how many lines its metrics had then."""
    return []


@pytest.fixture(scope="module")
def run(kit: Experiment, told: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations without a stop; look, do not touch."""
    folder = tmp_path_factory.mktemp("run") / "whole"

    def on_iteration(metrics: dict[str, float]) -> None:
        told.append((metrics["iteration"], len((folder / "metrics.jsonl").read_text().splitlines())))

    result = train(_fresh(kit), folder, progress=False, on_iteration=on_iteration)
    assert (result.run_dir, result.iterations, result.started_from) == (folder, 4, 0)
    return folder


@pytest.fixture(scope="module")
def first_half(kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first two iterations; look, do not touch."""
    folder = tmp_path_factory.mktemp("run") / "half"
    _train(kit, folder, num_iterations=2)
    return folder


# --- a stopped run (T24) ----------------------------------------------------------------------------------------------


@pytest.mark.trap("T24")
def test_two_and_two_iterations_are_four_byte_for_byte(run: Path, first_half: Path, kit: Experiment, tmp_path: Path):
    folder = Path(shutil.copytree(first_half, tmp_path / "run"))
    result = _train(kit, folder)
    assert (result.started_from, result.iterations) == (2, 4)
    assert _bytes(folder, *WEIGHTS) == _bytes(run, *WEIGHTS)
    assert _without_times(folder) == _without_times(run)


def _adapted(kit: Experiment, iterations: int) -> Experiment:
    """An experiment as a new process would load it, whose policy sees pictures and has an adapter with dropout."""
    fresh = _fresh(kit, num_iterations=iterations, save_every=1)
    config = load_config(fresh.config, {"model_settings.lora": LORA, "model_settings.use_image": True})
    return dataclasses.replace(fresh, config=config, policy=load_policy(config))


@pytest.mark.trap("T24")
def test_an_adapter_with_dropout_that_sees_pictures_goes_on_byte_for_byte_too(kit: Experiment, tmp_path: Path):
    train(_adapted(kit, 2), tmp_path / "whole", progress=False)
    train(_adapted(kit, 1), tmp_path / "parts", progress=False)
    assert train(_adapted(kit, 2), tmp_path / "parts", progress=False).started_from == 1
    names = [f"checkpoints/iter_000002/{name}.safetensors" for name in ("policy/adapter_model", "optimizer")]
    assert _bytes(tmp_path / "parts", *names) == _bytes(tmp_path / "whole", *names)
    assert _without_times(tmp_path / "parts") == _without_times(tmp_path / "whole")


def _with_running_statistics(kit: Experiment, **training: object) -> Experiment:
    """An experiment whose reward is normalised by all that was seen so far: state that must be saved."""
    fresh = _fresh(kit, **training)
    shaping = {"clip_similarity": Shaping(normalize="running")}
    return fresh.with_rewards(dataclasses.replace(fresh.rewards, shaping=shaping))


@pytest.mark.trap("T24")
def test_rewards_with_running_statistics_go_on_byte_for_byte_and_would_not_without_them(
    kit: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"save_every": 1, "advantage_eps": 1.0}  # an eps that does not cancel the reward's own scale
    train(_with_running_statistics(kit, num_iterations=2, **settings), tmp_path / "whole", progress=False)
    train(_with_running_statistics(kit, num_iterations=1, **settings), tmp_path / "parts", progress=False)
    shutil.copytree(tmp_path / "parts", tmp_path / "forgetful")
    train(_with_running_statistics(kit, num_iterations=2, **settings), tmp_path / "parts", progress=False)
    names = [f"checkpoints/iter_000002/{name}.safetensors" for name in ("policy/model", "optimizer", "rewards")]
    assert _bytes(tmp_path / "parts", *names) == _bytes(tmp_path / "whole", *names)

    forgetful = _with_running_statistics(kit, num_iterations=2, **settings)
    monkeypatch.setattr(Rewards, "load_state_dict", lambda self, state: None)
    train(forgetful, tmp_path / "forgetful", progress=False)
    assert _bytes(tmp_path / "forgetful", names[0]) != _bytes(tmp_path / "whole", names[0])


class Stop(Exception):
    """Somebody pulls the plug."""


@pytest.mark.trap("T24")
@pytest.mark.parametrize("iteration", [1, 3, 4])
def test_run_that_was_killed_goes_on_from_its_last_checkpoint(
    run: Path, first_half: Path, kit: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iteration: int
):
    folder, append = tmp_path / "run", RunFolder.append_metrics
    if iteration > 2:
        shutil.copytree(first_half, folder)

    def pull_the_plug(self: RunFolder, metrics: dict[str, float]) -> None:
        append(self, metrics)
        if metrics["iteration"] == iteration:
            with self.metrics_file.open("a") as file:
                file.write('{"iteration": 5, "los')  # torn in the middle of a line
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", pull_the_plug)
        with pytest.raises(Stop):
            _train(kit, folder)
    result = _train(kit, folder)
    assert result.started_from == (0 if iteration == 1 else 2)
    assert _bytes(folder, *WEIGHTS) == _bytes(run, *WEIGHTS)
    assert _without_times(folder) == _without_times(run)


@pytest.mark.trap("T24")
def test_damaged_checkpoint_costs_iterations_and_nothing_else(run: Path, kit: Experiment, tmp_path: Path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / WEIGHTS[0]).write_bytes(b"")
    assert _train(kit, folder).started_from == 2
    assert _bytes(folder, *WEIGHTS) == _bytes(run, *WEIGHTS)
    assert "skipped: checkpoint iter_000004" in (folder / "training.log").read_text()


def optimizer_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The moments of Adam begin at 0 again."""
    patch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)


def weights_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The resumed run trains the policy that the first one started from."""
    patch.setattr(Policy, "load_pretrained", lambda self, folder: None)


def randomness_counted_from_the_start_of_the_process(patch: pytest.MonkeyPatch) -> None:
    """The resumed run draws again what the first one drew, as with a generator that is seeded when a process starts."""
    patch.setattr(
        sys.modules[train.__module__],
        "run_iteration",
        lambda kit, optimizer, i, *_: run_iteration(kit, optimizer, i - 2),
    )


FORGETTING = dict.fromkeys(
    (optimizer_forgotten, weights_forgotten, randomness_counted_from_the_start_of_the_process), "T24"
)


@pytest.mark.parametrize("forget", broken_versions(FORGETTING))
def test_resume_that_forgets_something_would_be_noticed(
    run: Path, first_half: Path, kit: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: Callable
):
    folder = Path(shutil.copytree(first_half, tmp_path / "run"))
    forget(monkeypatch)
    _train(kit, folder)
    assert _bytes(folder, WEIGHTS[0]) != _bytes(run, WEIGHTS[0])


def test_finished_run_stays_as_it_is(run: Path, kit: Experiment, tmp_path: Path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    result = _train(kit, folder)
    assert (result.started_from, result.iterations) == (4, 4) and result.metrics["iteration"] == 4
    assert _bytes(folder, *WEIGHTS, "metrics.jsonl") == _bytes(run, *WEIGHTS, "metrics.jsonl")


def test_iteration_depends_on_seed_and_number_alone(kit: Experiment):
    def rollout(iteration: int, **training: object) -> Rollout:
        own = _fresh(kit, **training)
        optimizer = torch.optim.SGD(own.policy.trainable_parameters(), lr=0.0)
        return run_iteration(own, optimizer, iteration)[0]

    third = rollout(3)
    assert third.enhanced_prompts == rollout(3).enhanced_prompts
    assert third.image_seeds.tolist() != rollout(4).image_seeds.tolist()
    assert third.image_seeds.tolist() != rollout(3, seed=1).image_seeds.tolist()


# --- the folder -------------------------------------------------------------------------------------------------------


def test_run_folder_holds_what_is_documented(run: Path):
    found = {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}
    expected = {"config.json", "training.log", "metrics.jsonl", "best/model.safetensors", "best/config.json"}
    expected |= {f"validation_iter_00000{i}.json" for i in (0, 2, 4)}
    expected |= {"sentinel.json"} | {f"rollouts/iter_00000{i}.parquet" for i in (1, 2, 4)}
    for iteration in (2, 4):
        names = ("policy/model.safetensors", "optimizer.safetensors", "manifest.json")
        expected |= {f"checkpoints/iter_00000{iteration}/{name}" for name in names}
    assert expected <= found
    assert not [name for name in found if ".writing" in name or name.endswith(".tmp")]


def test_every_iteration_logs_one_line_with_the_documented_metrics(run: Path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    names = {
        "loss", "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "grad_norm", "learning_rate",
        "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "completions/mean_length",
        "completions/clipped_ratio", "step_time", "time/sampling", "time/images", "time/rewards", "time/scoring",
        "time/backward", "time/rest",
    }  # fmt: skip
    for reward in ("clip_similarity", "gold", "keeps_objects", "grammatical"):
        names |= {f"rewards/{reward}/mean", f"rewards/{reward}/std"}
    for row in rows:
        assert names <= set(row)
        parts = sum(value for name, value in row.items() if name.startswith("time/"))
        assert parts == pytest.approx(row["step_time"]) and row["time/rest"] >= -1e-3


def test_rollouts_are_kept_a_row_a_sample(run: Path):
    rows = pd.read_parquet(run / "rollouts" / "iter_000002.parquet")
    assert list(rows.columns) == [
        "iteration", "group_id", "sample", "user_prompt", "category", "difficulty", "enhanced_prompt", "image_seed",
        "reward", "advantage", "reward/clip_similarity", "reward/gold", "reward/keeps_objects", "reward/grammatical",
        "thumbnail", "completion_ids", "tokens", "old_logprobs", "ref_logprobs", "new_logprobs",
    ]  # fmt: skip
    assert len(rows) == 8 and rows["group_id"].tolist() == [0] * 4 + [1] * 4
    assert rows["sample"].tolist() == [0, 1, 2, 3] * 2
    per_token = ["completion_ids", "tokens", "old_logprobs", "ref_logprobs", "new_logprobs"]
    assert (rows[per_token].map(len).nunique(axis=1) == 1).all()
    moved = [np.abs(row.new_logprobs - row.old_logprobs).max() for row in rows.itertuples()]
    assert min(moved) > 1e-5  # scored again after the step
    assert all((run / name).is_file() for name in rows["thumbnail"])
    assert rows.groupby("group_id")["advantage"].mean().abs().max() < 1e-6


def test_validation_shows_its_samples(run: Path):
    for iteration in (0, 2, 4):
        found = json.loads((run / f"validation_iter_00000{iteration}.json").read_text())
        assert found["iteration"] == iteration and found["num_prompts"] == len(found["samples"]) == 3
        rewards = [sample["reward"] for sample in found["samples"]]
        assert found["reward"] == pytest.approx(sum(rewards) / 3)
        assert set(found["rewards"]) == {"clip_similarity", "gold", "keeps_objects", "grammatical"}
        assert all((run / sample["thumbnail"]).is_file() for sample in found["samples"])


def test_each_iteration_is_told_when_it_is_on_disk(run: Path, told: list[tuple[float, int]]):
    assert told == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_config_in_the_folder_loads_and_names_versions(run: Path, kit: Experiment):
    assert load_config(run).to_dict() == _config(kit).to_dict()
    assert "torch" in json.loads((run / "config.json").read_text())["versions"]


def test_best_holds_the_policy_of_the_validation_with_the_best_gold(run: Path, kit: Experiment):
    validations = {i: json.loads((run / f"validation_iter_00000{i}.json").read_text()) for i in (0, 2, 4)}
    scores = {i: (found["rewards"]["gold"], found["reward"]) for i, found in validations.items()}
    best = max(scores, key=scores.get)
    committed = None if best == 0 else run / "checkpoints" / f"iter_{best:06d}" / "policy"
    loaded, expected = (load_policy(kit.config, place).model.state_dict() for place in (run / "best", committed))
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert f"after iteration {best}" in (run / "best" / "README.md").read_text()


def test_log_tells_what_happened_and_the_library_logger_is_left_as_it_was(run: Path):
    text = (run / "training.log").read_text()
    assert "iteration 4: validation reward" in text
    logger = logging.getLogger("grpo_kit")
    assert logger.propagate and not [h for h in logger.handlers if isinstance(h, logging.FileHandler)]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("learning_rate", 5e-4), ("group_size", 3), ("beta", 0.0), ("seed", 1)])
def test_folder_of_a_run_with_other_settings_is_refused_in_one_line(
    run: Path, kit: Experiment, name: str, value: float
):
    before = _bytes(run, "config.json", "metrics.jsonl")
    with pytest.raises(RunError, match=rf"training_settings\.{name}: found .* in the run, {value!r} in") as error:
        _train(kit, run, **{name: value})
    assert "\n" not in str(error.value)
    assert _bytes(run, "config.json", "metrics.jsonl") == before


def test_more_iterations_are_no_other_settings(kit: Experiment, tmp_path: Path):
    for settings in ({"num_iterations": 2}, {"num_iterations": 9, "keep_checkpoints": 5}):
        with ExitStack() as stack:
            RunFolder.open(tmp_path, _config(kit, **settings)).hold(stack)
    assert load_config(tmp_path).training_settings.num_iterations == 9


def test_second_writer_is_refused_in_one_line(kit: Experiment, tmp_path: Path):
    with FileLock(tmp_path / ".lock"), pytest.raises(RunError, match="another process writes into it") as error:
        _train(kit, tmp_path, num_iterations=1)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_folder_is_free_again_after_a_failure(kit: Experiment, tmp_path: Path):
    broken = _fresh(kit, on_bad_reward="raise").with_rewards(Rewards({"bad": lambda *args: [1.0]}, {"bad": 1.0}))
    for _ in range(2):
        with pytest.raises(KitError, match="reward 'bad'"):
            train(broken, tmp_path, progress=False)


def test_place_that_is_no_folder_is_refused_in_one_line(kit: Experiment, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="choose a folder that can be written to") as error:
        _train(kit, tmp_path / "file" / "run", num_iterations=1)
    assert "\n" not in str(error.value)


# --- other rewards ----------------------------------------------------------------------------------------------------


def _noise(images: list, prompts: list[str], enhanced_prompts: list[str]) -> torch.Tensor:
    return torch.rand(len(images), generator=torch.Generator().manual_seed(len("".join(enhanced_prompts))))


def test_control_on_random_rewards_trains_on_them_and_still_watches_gold(kit: Experiment, tmp_path: Path):
    control = _fresh(kit, num_iterations=2).with_rewards(
        Rewards({"noise": _noise}, {"noise": 1.0}, {"gold": kit.rewards.monitors["gold"]})
    )
    start = _weights(control.policy)
    result = train(control, tmp_path, progress=False)
    assert not torch.equal(_weights(control.policy), start)
    assert 0 < result.metrics["rewards/noise/mean"] < 1 and "rewards/gold/mean" in result.metrics
    assert "rewards/clip_similarity/mean" not in result.metrics
    assert result.metrics["reward"] == pytest.approx(result.metrics["rewards/noise/mean"])


def _weights(policy: Policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()]).clone()


def test_training_on_a_reward_that_a_program_knows_raises_it(kit: Experiment, tmp_path: Path):
    def sharp(images: list, prompts: list[str], enhanced_prompts: list[str]) -> list[float]:
        return [float("sharp" in text or "crisp" in text or "clean" in text) for text in enhanced_prompts]

    often = {"validate_every": 8, "save_every": 8, "learning_rate": 2e-3}
    learner = _fresh(kit, num_iterations=8, prompts_per_iteration=4, beta=0.0, **often)
    train(learner.with_rewards(Rewards({"sharp": sharp}, {"sharp": 1.0})), tmp_path, progress=False)
    rewards = [row["reward"] for row in _without_times(tmp_path)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
