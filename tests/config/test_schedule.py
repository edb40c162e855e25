"""Learning-rate schedules: transformers' own, fixed by an update's place in the run."""

import json
from pathlib import Path

import pytest
import torch
from support.quick_runs import fresh, left
from transformers import get_scheduler

from grpo_kit.config import ConfigError, KitError, load_config
from grpo_kit.config.schedule import scheduled_rates
from grpo_kit.experiment import Experiment
from grpo_kit.training.branch import branch
from grpo_kit.training.loop import train

KINDS = {
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {"num_cycles": 1.5},
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "polynomial": {"power": 2.0},
    "inverse_sqrt": {},
    "warmup_stable_decay": {"num_decay_steps": 4},
}


def _settings(kind: str, options: dict | None = None, **training: object):
    changes = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options or {}, "num_iterations": 10, **training}
    return load_config("tiny", {f"training_settings.{name}": v for name, v in changes.items()}).training_settings


@pytest.mark.parametrize(("kind", "options"), KINDS.items())
@pytest.mark.parametrize("warmup", [{"warmup_steps": 3}, {"warmup_ratio": 0.12}, {}])
def test_rates_are_those_that_transformers_steps_through(kind: str, options: dict, warmup: dict):
    settings = _settings(kind, options, updates_per_rollout=2, **warmup)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    steps = {"warmup_steps": 3, "warmup_ratio": 3}.get(next(iter(warmup), ""), 0)  # 0.12 · 20, rounded up
    scheduler, expected = get_scheduler(kind, optimizer, steps, 20, dict(options)), []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = [rate for iteration in range(1, 11) for rate in scheduled_rates(settings, iteration)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)


COSINE = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "updates_per_rollout": 2}


def test_a_run_has_the_rates_that_it_logs_and_goes_on_byte_for_byte(kit: Experiment, tmp_path: Path):
    train(fresh(kit, **COSINE), tmp_path / "whole", progress=False)
    own = fresh(kit, **COSINE)
    train(own, tmp_path / "parts", progress=False, until=1)
    train(fresh(kit, **COSINE), tmp_path / "parts", progress=False)
    assert left(tmp_path / "parts") == left(tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    rates = [scheduled_rates(own.config.training_settings, iteration) for iteration in range(1, 5)]
    assert [row["learning_rate"] for row in rows] == [pair[-1] for pair in rates] and rates[0][0] == 0
    manifest = json.loads((tmp_path / "whole" / "checkpoints" / "iter_000004" / "manifest.json").read_text())
    assert manifest["optimizer"]["param_groups"][0]["lr"] == rates[-1][-1]


def test_another_length_is_another_run_where_the_rates_depend_on_it(kit: Experiment, tmp_path: Path):
    train(fresh(kit, num_iterations=2, **COSINE), tmp_path / "cosine", progress=False)
    with pytest.raises(KitError, match="num_iterations: found 2 in the run, on which its learning rates depend, 3 in"):
        train(fresh(kit, num_iterations=3, **COSINE), tmp_path / "cosine", progress=False)
    own = fresh(kit, num_iterations=2, **COSINE)
    longer = {"training_settings.num_iterations": 3}
    branch(tmp_path / "cosine", 2, tmp_path / "branch", longer, kit=own, progress=False)
    assert train(fresh(kit, num_iterations=3, **COSINE), tmp_path / "branch", progress=False).iterations == 3

    free = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "save_every": 1}
    train(fresh(kit, num_iterations=1, **free), tmp_path / "free", progress=False)
    assert train(fresh(kit, num_iterations=2, **free), tmp_path / "free", progress=False).iterations == 2


@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        ("cosine", {"cycles": 2}, "unexpected keyword argument 'cycles'"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("polynomial", {"lr_end": 0.5}, "must be smaller"),
        ("cosine_with_min_lr", {}, "min_lr"),
    ],
)
def test_options_of_another_schedule_are_refused_in_one_line(kind: str, options: dict, line: str):
    with pytest.raises(ConfigError, match=rf"^training_settings.lr_scheduler_kwargs: found .*{line}") as error:
        scheduled_rates(_settings(kind, options), 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("warmup", [{"warmup_steps": 5}, {"warmup_ratio": 0.1}])
def test_a_warm_up_that_the_constant_schedule_has_not_is_refused(warmup: dict):
    with pytest.raises(ConfigError, match="allowed: constant_with_warmup"):
        _settings("constant", **warmup)
    constant = _settings("constant")
    assert scheduled_rates(constant, 1) == [constant.learning_rate] * constant.updates_per_rollout
