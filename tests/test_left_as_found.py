"""What other libraries and the user's own code have set in a process stays as it was, whatever the kit does there."""

import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from support import left_as_found
from support.wandb_files import parts, records

from grpo_kit.config.quiet import loading_quietly, quiet_libraries
from grpo_kit.experiment import Experiment
from grpo_kit.models.decoding import row_uniforms
from grpo_kit.rollout import Rollout
from grpo_kit.training.loop import make_optimizer
from grpo_kit.training.step import grpo_step


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """A user's process in which the kit worked: its folder, what it found, what it showed on the screen."""
    folder = tmp_path_factory.mktemp("found")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, left_as_found.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return folder, json.loads(line.removeprefix("FOUND ")), done.stderr


@pytest.mark.slow
@pytest.mark.field("F10")
def test_everything_is_left_as_it_was_found(told: tuple[Path, dict, str]):
    assert told[1]["changed"] == {}


@pytest.mark.slow
@pytest.mark.field("F10")
def test_the_users_own_wandb_run_stays_open_and_the_kits_has_its_own(told: tuple[Path, dict, str]):
    folder, seen, _ = told
    assert seen["during"] == [True, True]
    (mine,), (own,) = parts(folder / "mine"), parts(folder / "run")
    lines = [record.history.item for record in records(mine) if record.HasField("history")]
    logged = [{item.key or item.nested_key[0] for item in line} for line in lines]
    assert len(logged) == 1 and "after" in logged[0] and not any("train" in name for name in logged[0])
    assert sum(record.HasField("history") for record in records(own)) >= 2
    assert [record.exit.exit_code for record in records(mine) if record.HasField("exit")] == [0]


@pytest.mark.slow
@pytest.mark.field("F10")
def test_nothing_that_a_user_cannot_act_on_reaches_the_screen(told: tuple[Path, dict, str]):
    *_, screen = told
    assert "Deprecat" not in screen and "FutureWarning" not in screen and "%|" not in screen, screen


def test_other_libraries_are_quiet_for_as_long_as_somebody_is_inside():
    before = transformers.logging.get_verbosity()
    first, second = quiet_libraries(), quiet_libraries()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # in another order than a stack's: two threads
    assert transformers.logging.get_verbosity() == logging.ERROR
    second.__exit__(None, None, None)
    assert transformers.logging.get_verbosity() == before


@pytest.mark.parametrize(
    ("module", "shown"),
    [("transformers.models.auto", False), ("torch.nn.modules", False), ("diffusers", False), ("my_rewards", True)],
)
def test_deprecation_warnings_of_the_libraries_are_hidden_while_they_load(module: str, shown: bool):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        with loading_quietly():
            for kind in (FutureWarning, DeprecationWarning):
                warnings.warn_explicit("going away", kind, "file.py", 1, module=module)
        assert len(told) == 2 * shown and warnings.filters == filters
        warnings.warn_explicit("going away", FutureWarning, "file.py", 1, module=module)  # the user's own use of it
        assert len(told) == 2 * shown + 1


def test_threads_that_come_and_go_leave_the_verbosity_as_it_was():
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()

    def come_and_go() -> None:
        for _ in range(200):
            with quiet_libraries():
                levels.add(transformers.logging.get_verbosity())

    levels: set[int] = set()
    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert levels == {logging.ERROR}
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before


@pytest.mark.field("F10")
def test_a_step_is_made_and_tokens_are_the_same_whatever_torch_is_set_to(own_kit: Experiment, rollout: Rollout):
    before, optimizer = row_uniforms([1, 2], 5), make_optimizer(own_kit, own_kit.config)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(row_uniforms([1, 2], 5), before)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        stats = grpo_step(own_kit.policy, optimizer, rollout, own_kit.config)
        assert not torch.is_grad_enabled()
    assert stats.updates > 0 and stats.metrics["grad_norm"] > 0
