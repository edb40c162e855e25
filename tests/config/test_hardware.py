"""Devices, dtypes with reasons, seeds."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_kit.config import ConfigError, hardware
from grpo_kit.config.hardware import choose_device, choose_dtype
from grpo_kit.config.seeds import derive_seed

PARTS = st.lists(st.one_of(st.integers(), st.text(max_size=8)), min_size=1, max_size=4)


@given(PARTS)
def test_seeds_are_63_bits_and_repeatable(parts: list):
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(*parts)


def test_seed_values_never_change():
    # a run that is resumed by a later version must draw the same streams
    assert derive_seed(0, 1, "x") == 6109816102651259927


def test_streams_that_differ_in_one_part_differ():
    seeds = [
        derive_seed(run, step, purpose) for run in range(5) for step in range(50) for purpose in ("images", "text")
    ]
    assert len(set(seeds)) == len(seeds)


def test_numbers_and_texts_name_different_streams():
    assert derive_seed(1, "2") != derive_seed("1", 2)
    assert derive_seed("a", "b") != derive_seed("ab")


def test_cpu_can_always_be_asked_for():
    device, reason = choose_device("cpu")
    assert device == torch.device("cpu") and reason == "asked for"


def test_automatic_choice_prefers_cuda_and_says_why(monkeypatch: pytest.MonkeyPatch):
    class Properties:
        name, total_memory = "A GPU", 24 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert choose_device() == (torch.device("cuda", 0), "A GPU with 24 GiB found")


def test_automatic_choice_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device() == (torch.device("cpu"), "no CUDA or Apple GPU found")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "cuda:99", "CPU"])
def test_unknown_or_absent_device_is_one_clear_line(device: str):
    with pytest.raises(ConfigError) as error:
        choose_device(device)
    assert "\n" not in str(error.value) and ("allowed" in str(error.value) or "Set auto" in str(error.value))


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float32)]
)
def test_gpu_computes_bfloat16_only_where_it_is_native(monkeypatch: pytest.MonkeyPatch, capability: tuple, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("cuda")[0] is expected


@pytest.mark.parametrize(("amx", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_cpu_computes_bfloat16_only_with_amx(monkeypatch: pytest.MonkeyPatch, amx: bool, expected: torch.dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    dtype, reason = choose_dtype("cpu")
    assert dtype is expected and "AMX" in reason


def test_named_dtype_is_taken_and_unknown_one_refused():
    assert choose_dtype("cpu", "float16") == (torch.float16, "asked for")
    with pytest.raises(ConfigError, match="allowed: auto, float32"):
        choose_dtype("cpu", "int8")


def test_release_takes_anything_and_moves_models_off_the_gpu(monkeypatch: pytest.MonkeyPatch):
    moved = []

    class Model(torch.nn.Linear):
        def to(self, *args, **kwargs):
            moved.append(args)
            return self

    class Policy:
        def __init__(self) -> None:
            self.model = Model(1, 1)

    class Kit:
        def __init__(self) -> None:
            self.policy, self.name = Policy(), "kit"

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: moved.append("emptied"))
    hardware.release(Kit(), None, 3)
    assert moved == [("cpu",), "emptied"]


def test_versions_are_reported():
    versions = hardware.library_versions()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"] == torch.__version__.split("+")[0]
    assert "no_such_library" not in versions
