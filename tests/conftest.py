"""Fixtures that several tests share, and the tables that `make traps` and `make abuse` end with."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import abuse, traps
from support.synthetic_run import write_synthetic_run

if TYPE_CHECKING:
    from support.policy_forms import Form

    from grpo_kit.experiment import Experiment
    from grpo_kit.models.policy import Policy
    from grpo_kit.rollout import Rollout

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported; test processes share the cores
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's background; stopped commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


# --- the tables of `make traps` and `make abuse` ----------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--traps` and `--abuse` end a run with their tables, and make it fail where something is not wholly covered."""
    parser.addoption("--traps", action="store_true", help="print which trap each test excludes; fail where one is open")
    parser.addoption("--abuse", action="store_true", help="print how often each abuse was tried, and got through")


def pytest_configure(config: pytest.Config) -> None:
    """Gather the results where the reports arrive: in the process that xdist's workers report to."""
    if config.getoption("--traps") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(traps.TrapReport(), "traps")
    if config.getoption("--abuse") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(abuse.AbuseReport(), "abuse")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let a test's report say what it shows, so that a worker's report does too."""
    item.user_properties.extend(("trap", claim) for claim in traps.claims(item))
    item.user_properties.extend(("abuse", claim) for claim in abuse.claims(item))


@pytest.hookimpl(trylast=True)  # when what is not asked for has been left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: those with slow tests, notebooks first, so that none is the last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, "notebook" not in item.path.stem))


def pytest_runtest_teardown() -> None:
    """Give back the locks of logging that a test's interrupt left held: other threads would wait for them for ever."""
    handlers = [reference() for reference in logging._handlerList]
    for lock in (logging._lock, *(handler.lock for handler in handlers if handler is not None)):
        while lock is not None and lock._is_owned():
            lock.release()


@pytest.fixture
def attempts(request: pytest.FixtureRequest) -> abuse.Count:
    """`with attempts(200) as got_through:` counts abuse for the table; what got through is added to the list."""
    return functools.partial(abuse.counted, request.node)


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def synthetic_run_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder in the documented schema, written once; do not change it."""
    return write_synthetic_run(tmp_path_factory.mktemp("template") / "run")


@pytest.fixture
def synthetic_run(synthetic_run_template: Path, tmp_path: Path) -> Path:
    """A run folder of one's own."""
    return Path(shutil.copytree(synthetic_run_template, tmp_path / "run"))


@pytest.fixture(scope="session")
def kit() -> Experiment:
    """The embedded world's models, rewards and prompts; do not train its policy."""
    from grpo_kit import load_config, load_experiment

    return load_experiment(load_config("tiny", {"model_settings.device": "cpu"}))


@pytest.fixture
def own_policy(kit: Experiment) -> Policy:
    """The embedded policy, to be changed at will."""
    return copy.deepcopy(kit.policy)


@pytest.fixture
def own_kit(kit: Experiment, own_policy: Policy) -> Experiment:
    """The embedded world with a policy that may be trained."""
    return dataclasses.replace(kit, policy=own_policy)


@pytest.fixture(scope="session")
def rollout(kit: Experiment) -> Rollout:
    """Four rewrites of each of three prompts, drawn and scored."""
    from grpo_kit.rollout import collect_rollout

    return collect_rollout(kit.policy, kit.generator, kit.rewards, kit.train_prompts[:3], 4, seed=0)


@pytest.fixture(scope="session", params=["words", "pictures", "adapter", "adapter-pictures"])
def sampled_form(request: pytest.FixtureRequest, kit: Experiment) -> Form:
    """The embedded policy in each of its forms, and what it sampled; do not train it."""
    from support import policy_forms

    return policy_forms.sampled_form(kit, request.param)


@pytest.fixture
def form(sampled_form: Form) -> Form:
    """The embedded policy in each of its forms, to be changed at will, and what it sampled."""
    return sampled_form.own()
