"""Policy, generator and rewards on devices of their own: what is named, what is chosen, and what is said of it."""

from pathlib import Path

import pytest
import torch

from grpo_kit.config import ConfigError, hardware, load_config
from grpo_kit.config.hardware import computing_machine, placement
from grpo_kit.experiment import Experiment, load_experiment
from grpo_kit.models import generator as generator_module
from grpo_kit.models.generator import load_generator
from grpo_kit.preflight.machine import check_machine
from grpo_kit.rewards.loading import load_rewards
from grpo_kit.rollout import collect_rollout, score_rows
from grpo_kit.training import launch
from grpo_kit.training.processes import ProcessError

PARTS = ["device", "generator_device", "reward_device"]
CPU = {"model_settings.device": "cpu"}


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has two GPUs, of different kinds."""

    class Properties:
        total_memory = 24 * 2**30

        def __init__(self, index: int) -> None:
            self.name = f"GPU {index}"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")


def _placed(**named: str) -> dict[str, str]:
    config = load_config("tiny", {f"model_settings.{name}": device for name, device in named.items()})
    return {name: str(device) for name, (device, _) in placement(config.model_settings).items()}


@pytest.mark.usefixtures("two_gpus")
def test_a_part_without_a_device_of_its_own_is_where_the_policy_is():
    assert _placed(device="cuda:0") == dict.fromkeys(PARTS, "cuda:0")
    found = _placed(device="cuda:0", generator_device="cuda:1", reward_device="cpu")
    assert found == {"device": "cuda:0", "generator_device": "cuda:1", "reward_device": "cpu"}
    assert _placed(device="cuda", generator_device="auto", reward_device="cuda:1") == dict.fromkeys(PARTS, "cuda:1")


@pytest.mark.parametrize("setting", PARTS)
def test_a_device_that_is_not_there_is_one_line_before_any_model_is_loaded(setting: str, tmp_path: Path):
    settings = CPU | {f"model_settings.{setting}": "cuda:7", "model_settings.sd_model": str(tmp_path / "no model")}
    with pytest.raises(ConfigError, match=f"^{setting}: found cuda:7, but this machine has 0 CUDA devices") as error:
        load_experiment(load_config("tiny", settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", PARTS)
def test_a_device_of_no_kind_is_refused_with_the_settings(setting: str):
    with pytest.raises(ConfigError, match=f"model_settings.{setting}: found 'gpu', allowed: auto, cpu, mps, cuda"):
        load_config("tiny", {f"model_settings.{setting}": "gpu"})


@pytest.mark.parametrize("setting", PARTS)
def test_several_processes_cannot_share_one_numbered_device(
    setting: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    config = load_config("tiny", CPU | {f"model_settings.{setting}": "cuda:1"})
    with pytest.raises(ProcessError, match=f"model_settings.{setting}: found cuda:1, several processes cannot"):
        launch.joined(config, tmp_path).__enter__()


def test_each_part_is_loaded_onto_its_own_device(monkeypatch: pytest.MonkeyPatch):
    """A CPU may be called cpu and cpu:0; torch tells them apart, so that one can see who was told which."""
    config = load_config("tiny", CPU)
    devices = dict(zip(PARTS, map(torch.device, ("meta", "cpu:0", "cpu")), strict=True))
    told = []
    monkeypatch.setattr(hardware, "placement", lambda settings: {k: (v, "so") for k, v in devices.items()})
    for module in ("grpo_kit.models.generator", "grpo_kit.rewards.loading"):
        monkeypatch.setattr(f"{module}.placement", hardware.placement)
    to = generator_module.DiffusionPipeline.to
    monkeypatch.setattr(generator_module.DiffusionPipeline, "to", lambda pipe, *a: told.append(a) or to(pipe, *a))
    generator = load_generator(config)
    assert told == [(torch.device("cpu:0"),)]
    assert load_rewards(config, generator).parts["clip_similarity"].device == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("generator", "reward", "overlap", "expected"),
    [
        ("cuda:0", None, None, True),  # the rewards stay with the policy, on cuda:1
        ("cuda:1", "cuda", None, False),
        ("cuda:1", "cpu", None, True),
        (None, None, None, False),
        (None, None, True, True),  # rewards that wait for a server
        ("cuda:0", "cpu", False, False),
    ],
)
def test_scores_overlap_where_devices_differ_or_the_settings_say_so(
    kit: Experiment, generator: str | None, reward: str | None, overlap: bool | None, expected: bool
):
    models = {"device": "cuda:1", "generator_device": generator, "reward_device": reward}
    settings = {f"model_settings.{name}": device for name, device in models.items()}
    config = load_config("tiny", settings | {"reward_settings.overlap": overlap})
    assert Experiment(**vars(kit) | {"config": config}).overlap is expected


@pytest.mark.usefixtures("two_gpus")
def test_what_a_run_records_of_the_machine_names_other_kinds_only():
    def recorded(**named: str) -> dict[str, str]:
        return computing_machine(
            load_config("tiny", {f"model_settings.{k}": v for k, v in named.items()}).model_settings
        )

    assert recorded(device="cuda:1").keys() == {"device", "threads"}
    assert recorded(device="cuda:1", generator_device="cuda").keys() == {"device", "threads"}
    found = recorded(device="cuda:1", generator_device="cuda:0", reward_device="cpu")
    assert (found["device"], found["generator_device"]) == ("cuda GPU 1", "cuda GPU 0")
    assert found["reward_device"].startswith("cpu ")


@pytest.mark.usefixtures("two_gpus")
def test_the_check_says_where_each_part_computes_and_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def said(**named: str) -> str:
        config = load_config("tiny", {f"model_settings.{name}": device for name, device in named.items()})
        return next(finding.text for finding in check_machine(config) if finding.name == "device")

    plain = said(device="cuda:0")
    assert "generator" not in plain and "reward" not in plain
    found = said(device="cuda:0", generator_device="cuda:1", reward_device="cpu")
    assert found.startswith(plain)
    assert found.endswith("; generator on cuda:1 (asked for; GPU 1 with 24 GiB found); reward on cpu (asked for)")


def _released(thing: object, monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    moved: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *place: moved.append(module))
    hardware.release(thing)
    return moved


def test_releasing_a_kit_gives_back_policy_generator_and_rewards(kit: Experiment, monkeypatch: pytest.MonkeyPatch):
    wrapped = {"reward_settings.weights": {"gain": 1.0}, "reward_settings.monitors": []}
    wrapped |= {"reward_settings.timeout": {"gain": 60}, "reward_settings.threads": {"clip_similarity": 2}}
    rewards = load_rewards(load_config(kit.config, wrapped), kit.generator)
    moved = _released(kit.with_rewards(rewards), monkeypatch)
    pipeline = kit.generator.pipeline
    wanted = [kit.policy.model, kit.policy.reference, pipeline.transformer, pipeline.vae, pipeline.text_encoder]
    wanted.append(rewards.parts["gain"].__wrapped__.reward.__wrapped__.model)  # a time limit, a gain, threads, a CLIP
    held = {id(part) for one in moved for part in one.modules()}
    assert all(id(model) in held for model in wanted)


_needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
MIXED = [("cuda", "cpu", "cuda"), ("cpu", "cuda", "cpu"), ("cuda", "cuda", "cpu")]


@pytest.mark.parametrize("parts", [("cpu", "cpu", "cpu"), *(pytest.param(mixed, marks=_needs_gpu) for mixed in MIXED)])
def test_a_rollout_and_its_scores_go_from_device_to_device(parts: tuple[str, str, str]):
    settings = {f"model_settings.{name}": device for name, device in zip(PARTS, parts, strict=True)}
    weights = {"clip_similarity": 1.0, "diversity": 0.1, "gain": 0.1, "consistency": 0.1}
    kit = load_experiment(load_config("tiny", settings | {"reward_settings.weights": weights}))
    found = collect_rollout(
        kit.policy, kit.generator, kit.rewards, kit.train_prompts[:2], 3, use_image=True, overlap=kit.overlap
    )
    assert kit.overlap == (parts[1] != parts[2])
    assert found.rewards.isfinite().all()
    logprobs = score_rows(kit.policy, found, torch.arange(len(found.rewards))).logprobs.cpu()[found.completion_mask]
    torch.testing.assert_close(logprobs, found.old_logprobs[found.completion_mask], rtol=0, atol=0.1)
