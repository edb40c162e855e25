"""Micro-batches: whole groups where they fit; a prompt is tokenised once a rollout, a reference scored once a step."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_kit.config import load_config
from grpo_kit.experiment import Experiment
from grpo_kit.models.policy import Policy
from grpo_kit.models.prompt_format import PromptFormat
from grpo_kit.rollout import Rollout, with_encoded
from grpo_kit.training.accumulation import micro_batches
from grpo_kit.training.iteration import run_iteration
from grpo_kit.training.loop import make_optimizer


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(1, 20))
def test_micro_batches_hold_every_row_once_and_divide_a_group_only_where_it_does_not_fit(sizes: list[int], size: int):
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
    parts = micro_batches(torch.arange(len(groups)), groups, size)
    assert torch.equal(torch.cat([*parts, torch.arange(0)]), torch.arange(len(groups)))
    assert all(0 < len(part) <= size for part in parts)
    for group, members in enumerate(sizes):
        holding = [part for part in parts if (groups[part] == group).any()]
        assert len(holding) == -(-members // size)


@contextmanager
def counted(owner: type, name: str) -> Iterator[list[object]]:
    """What a method's calls were given first, in order."""
    right, calls = getattr(owner, name), []

    def counting(self: object, first: object, *rest: object, **options: object) -> object:
        calls.append((first, options))
        return right(self, first, *rest, **options)

    setattr(owner, name, counting)
    try:
        yield calls
    finally:
        setattr(owner, name, right)


def _iteration(kit: Experiment, **settings: object) -> None:
    changes = {"group_size": 4, "prompts_per_iteration": 3, **settings}
    config = load_config(kit.config, {f"training_settings.{name}": value for name, value in changes.items()})
    kit = dataclasses.replace(kit, config=config)
    run_iteration(kit, make_optimizer(kit, config), 1)


@pytest.mark.parametrize("size", [None, 4, 3])
def test_a_prompt_is_tokenised_once_a_rollout_whatever_the_micro_batches(own_kit: Experiment, size: int | None):
    with counted(PromptFormat, "encode") as encoded:
        _iteration(own_kit, micro_batch_size=size, updates_per_rollout=2, beta=0.1)
    assert [len(prompts) for prompts, _ in encoded] == [3]


@pytest.mark.parametrize(("size", "runs"), [(None, 3), (4, 3), (3, 6), (8, 3)])
def test_a_prompt_is_run_again_only_where_its_group_is_divided(own_kit: Experiment, size: int | None, runs: int):
    with counted(Policy, "forward") as scored:
        _iteration(own_kit, micro_batch_size=size, updates_per_rollout=1, beta=0.0)
    assert sum(len(prompts) for prompts, _ in scored) == runs


def test_the_reference_is_scored_once_for_all_updates(own_kit: Experiment):
    with counted(Policy, "forward") as scored:
        _iteration(own_kit, updates_per_rollout=3, beta=0.1)
    assert [options["reference"] for _, options in scored] == [True, False, False, False]


def test_a_rollout_whose_prompts_were_replaced_is_encoded_again(own_kit: Experiment, rollout: Rollout):
    others = dataclasses.replace(rollout, prompts=own_kit.train_prompts[3:6])
    texts = [prompt.user_prompt for prompt in others.prompts]
    right = own_kit.policy.encode(texts).inputs["input_ids"]
    found, kept = (with_encoded(one, own_kit.policy).encoded for one in (others, rollout))
    assert torch.equal(found.inputs["input_ids"], right) and kept is rollout.encoded
