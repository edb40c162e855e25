"""Checkpoints: whole or not there; every damage is found and named, and the one before serves."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_kit.runs.checkpoint import (
    Checkpoint,
    CheckpointError,
    _digest,
    _flatten,
    _unflatten,
    load_checkpoint,
    load_latest,
    save_checkpoint,
    sha256,
)

FILES = ("policy/model.safetensors", "optimizer.safetensors", "manifest.json")


def _trained(steps: int = 3) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.8, 0.99), weight_decay=0.01)
    for _ in range(steps):
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def _saving(model: torch.nn.Module) -> Callable[[Path], None]:
    """What a policy does: its weights into a folder that it makes."""

    def save(place: Path) -> None:
        place.mkdir()
        save_file(dict(model.state_dict()), place / "model.safetensors")

    return save


def _weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.policy / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two committed iterations, 5 and 10."""
    for iteration in (5, 10):
        model, optimizer = _trained(iteration)
        save_checkpoint(tmp_path, iteration, _saving(model), optimizer.state_dict())
    return tmp_path


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.trap("T24")
def test_policy_and_optimizer_come_back_bit_for_bit(folder: Path):
    model, optimizer = _trained(10)
    found = load_checkpoint(folder / "iter_000010")
    assert found.iteration == 10
    assert all(torch.equal(_weights(found)[name], value) for name, value in model.state_dict().items())
    again, fresh = _trained(1)
    again.load_state_dict(_weights(found))
    fresh.load_state_dict(found.optimizer)
    for one, other in ((model, optimizer), (again, fresh)):
        torch.manual_seed(7)
        one(torch.randn(5, 4)).square().mean().backward()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_rewards_state_comes_back_and_is_no_file_where_there_is_none(tmp_path: Path):
    model, optimizer = _trained(0)
    state = {"clip_similarity": torch.tensor([3.0, 0.1, 0.7], dtype=torch.float64)}
    place = save_checkpoint(tmp_path, 1, _saving(model), optimizer.state_dict(), rewards=state)
    assert torch.equal(load_checkpoint(place).rewards["clip_similarity"], state["clip_similarity"])
    _flip(place, "rewards.safetensors", -1, 0)
    with pytest.raises(CheckpointError, match=r"rewards\.safetensors is damaged"):
        load_checkpoint(place)
    without = save_checkpoint(tmp_path, 2, _saving(model), optimizer.state_dict(), rewards={})
    assert load_checkpoint(without).rewards == {} and not (without / "rewards.safetensors").exists()


def test_optimizer_that_has_not_stepped_comes_back(tmp_path: Path):
    model, optimizer = _trained(0)
    found = load_checkpoint(save_checkpoint(tmp_path, 1, _saving(model), optimizer.state_dict()))
    _trained(1)[1].load_state_dict(found.optimizer)


def test_optimizer_state_is_the_same_after_being_flattened():
    state = _trained(3)[1].state_dict()
    tensors, settings = _flatten(state)
    found = _unflatten(tensors, json.loads(json.dumps(settings)))
    assert found["state"].keys() == state["state"].keys()
    for index, values in state["state"].items():
        assert all(torch.equal(found["state"][index][name], value) for name, value in values.items())


def test_newest_is_loaded_and_only_the_newest_are_kept(tmp_path: Path):
    model, optimizer = _trained()
    assert load_latest(tmp_path) is None and load_latest(tmp_path / "nowhere") is None
    for iteration in (1, 2, 3, 12, 100):
        save_checkpoint(tmp_path, iteration, _saving(model), optimizer.state_dict(), keep=2)
        assert load_latest(tmp_path).iteration == iteration
    assert sorted(place.name for place in tmp_path.iterdir()) == ["iter_000012", "iter_000100"]


def test_iteration_may_be_committed_again(folder: Path):
    model, optimizer = _trained(3)
    save_checkpoint(folder, 10, _saving(model), optimizer.state_dict())
    assert torch.equal(_weights(load_latest(folder))["0.weight"], model[0].weight)


def test_manifest_lists_every_file_with_size_and_hash(folder: Path):
    place = folder / "iter_000010"
    assert sorted(file.relative_to(place).as_posix() for file in place.rglob("*.*")) == sorted(FILES)
    listed = json.loads((place / "manifest.json").read_text())["files"]
    assert listed == {
        name: {"bytes": (place / name).stat().st_size, "sha256": sha256(place / name)} for name in FILES[:2]
    }


# --- damage -----------------------------------------------------------------------------------------------------------


def _flip(place: Path, name: str, offset: int, bit: int) -> None:
    content = bytearray((place / name).read_bytes())
    content[offset] ^= 1 << bit
    (place / name).write_bytes(content)


def _truncate(name: str, left: int) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        (place / name).write_bytes((place / name).read_bytes()[:left])

    damage.__name__ = f"{name} cut to {left} bytes"
    return damage


def _remove(name: str) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        (place / name).unlink()

    damage.__name__ = f"{name} missing"
    return damage


def _from_the_other(name: str) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        shutil.copy(place.parent / "iter_000005" / name, place / name)

    damage.__name__ = f"{name} of another iteration"
    return damage


def _other_content(text: str) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        (place / "manifest.json").write_text(text)

    damage.__name__ = f"manifest {text}"
    return damage


def swapped(place: Path) -> None:
    """The older iteration's folder under the newer one's name."""
    shutil.rmtree(place)
    shutil.copytree(place.parent / "iter_000005", place)


def half_copied(place: Path) -> None:
    """A folder without anything in it."""
    shutil.rmtree(place)
    place.mkdir()


def a_file_in_its_place(place: Path) -> None:
    """A file where the folder was."""
    shutil.rmtree(place)
    place.write_text("")


DAMAGES = [
    *(_remove(name) for name in FILES),
    *(_truncate(name, left) for name in FILES for left in (0, 40)),
    *(_from_the_other(name) for name in FILES),
    *(
        _other_content(text)
        for text in ('{"files": []}', "{}", "null", "[]", '"text"', '{"iteration": 10, "files": {}}')
    ),
    swapped,
    half_copied,
    a_file_in_its_place,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_named_and_the_one_before_serves(
    folder: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    assert load_latest(folder).iteration == 10
    damage(folder / "iter_000010")
    with pytest.raises(CheckpointError, match="checkpoint iter_000010: ") as error:
        load_checkpoint(folder / "iter_000010")
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING, "grpo_kit"):
        assert load_latest(folder).iteration == 5
    assert "iter_000010" in caplog.text


@pytest.mark.parametrize("name", FILES[:2])
def test_every_flipped_bit_is_found(folder: Path, name: str):
    place, rng = folder / "iter_000010", random.Random(0)
    size = (place / name).stat().st_size
    for offset in [*range(0, 60, 7), *(rng.randrange(size) for _ in range(60)), size - 1]:
        bit = rng.randrange(8)
        _flip(place, name, offset, bit)
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            load_checkpoint(place)
        _flip(place, name, offset, bit)
    assert load_checkpoint(place).iteration == 10


def test_every_flipped_bit_of_the_manifest_is_found(folder: Path):
    place, rng = folder / "iter_000010", random.Random(0)
    size, missed = (place / "manifest.json").stat().st_size, []
    for offset in range(size):
        bit = rng.randrange(7)
        _flip(place, "manifest.json", offset, bit)
        try:
            load_checkpoint(place)
            missed.append((offset, bit))
        except CheckpointError:
            pass
        _flip(place, "manifest.json", offset, bit)
    text = (place / "manifest.json").read_text()
    assert not missed, [text[max(0, offset - 12) : offset + 4] for offset, _ in missed]


def test_a_run_of_which_nothing_can_be_trusted_is_not_started_afresh(folder: Path):
    for place in folder.iterdir():
        _flip(place, FILES[0], -1, 0)
    with pytest.raises(
        CheckpointError, match=r"iter_000010: policy/model\.safetensors is damaged.*none of 2 verifies"
    ) as error:
        load_latest(folder)
    assert "\n" not in str(error.value)


def test_a_damaged_checkpoint_does_not_count_as_kept(folder: Path):
    model, optimizer = _trained(3)
    _flip(folder / "iter_000010", "optimizer.safetensors", -1, 0)
    save_checkpoint(folder, 15, _saving(model), optimizer.state_dict(), keep=2)
    assert load_checkpoint(folder / "iter_000005").iteration == 5, "with 10 damaged, 5 is the second that verifies"
    save_checkpoint(folder, 20, _saving(model), optimizer.state_dict(), keep=2)
    assert sorted(place.name for place in folder.iterdir()) == ["iter_000015", "iter_000020"]


def test_states_may_go_by_parameter_names(tmp_path: Path):
    model, optimizer = _trained(3)
    state = optimizer.state_dict()
    named = {"state": {f"0.layer.{i}.weight": values for i, values in state["state"].items()}, "param_groups": []}
    found = load_checkpoint(save_checkpoint(tmp_path, 1, _saving(model), named)).optimizer
    assert found["state"].keys() == named["state"].keys()
    assert torch.equal(found["state"]["0.layer.1.weight"]["exp_avg"], state["state"][1]["exp_avg"])


def test_a_checkpoint_of_an_earlier_form_says_so(folder: Path):
    place = folder / "iter_000010"
    manifest = json.loads((place / "manifest.json").read_text())
    shutil.move(place / FILES[0], place / "policy.safetensors")
    (place / "policy").rmdir()
    manifest["files"]["policy.safetensors"] = manifest["files"].pop(FILES[0])
    del manifest["sha256"]
    manifest["sha256"] = _digest(manifest)
    (place / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="has no policy/ folder; go on with the version of the kit that wrote it"):
        load_checkpoint(place)


@pytest.mark.trap("T24", broken="hashes_not_compared")
def test_a_checkpoint_without_its_manifests_check_would_load_damaged_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("grpo_kit.runs.checkpoint.sha256", lambda file: "anything")
    model, optimizer = _trained(3)
    place = save_checkpoint(folder, 20, _saving(model), optimizer.state_dict())
    _flip(place, FILES[0], -1, 6)
    found = load_checkpoint(place)
    assert not all(torch.equal(_weights(found)[name], value) for name, value in model.state_dict().items())


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["save_file", "flush_tree", "replace"])
def test_writing_that_is_cut_leaves_the_checkpoints_before(folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str):
    def cut(*args: object) -> None:
        raise KeyboardInterrupt

    model, optimizer = _trained(3)
    with monkeypatch.context() as patch:
        patch.setattr(f"grpo_kit.runs.checkpoint.{moment}", cut)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(folder, 15, _saving(model), optimizer.state_dict())
    assert load_latest(folder).iteration == 10
    save_checkpoint(folder, 15, _saving(model), optimizer.state_dict())
    assert load_latest(folder).iteration == 15
    assert not list(folder.glob(".writing*"))
