"""Numbers that are not finite: a step with one is skipped without a trace, and a run that is stuck says why."""

import copy
import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.broken_twins import broken_versions

from grpo_kit.config import load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.experiment import Experiment
from grpo_kit.grpo import finite
from grpo_kit.models import generator as generator_file
from grpo_kit.models.decoding import choose_tokens
from grpo_kit.models.generator import Generator
from grpo_kit.models.policy import Policy
from grpo_kit.rollout import Rollout
from grpo_kit.runs.folder import RunFolder
from grpo_kit.training import accumulation as accumulation_file
from grpo_kit.training.loop import train
from grpo_kit.training.nonfinite import PATIENCE, NonFiniteError, warn_or_end
from grpo_kit.training.step import grpo_step
from tests.chaos.nonfinite import PARTS, QUICK, STOPS, problems, spoilt_run

NAN, INF = math.nan, math.inf
ALWAYS = ("optimizer-momentum",)  # of the spoilt parts; `make chaos` in its short form has more, the slow tests all
LONG = ("sampling-inf", "gradient-inf")  # NaN in the same part has a run, and infinity the parts below
REPEATED = "scoring-nan"  # the one whose run is started again


@pytest.fixture(scope="module")
def quick(kit: Experiment) -> Experiment:
    """The embedded world, drawing in the one step and sampling the few tokens that `QUICK` says."""
    generator = Generator(kit.generator.pipeline, num_inference_steps=1, guidance_scale=1.0, batch_size=24)
    policy = copy.deepcopy(kit.policy)
    policy.max_new_tokens = QUICK["generation_settings.max_new_tokens"]
    return dataclasses.replace(kit, policy=policy, generator=generator)


def _problems(kit: Experiment, name: str, folder: Path) -> list[str]:
    return problems(spoilt_run(kit, PARTS[name], folder), PARTS[name].parts, updates=2)


# --- a spoilt run -----------------------------------------------------------------------------------------------------


def _marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * (name not in ALWAYS) + [pytest.mark.long] * (name in LONG)


@pytest.mark.trap("T25")
@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name)) for name in PARTS if name != REPEATED])
def test_spoilt_step_leaves_no_trace_and_several_end_the_run_with_a_diagnosis(
    quick: Experiment, tmp_path: Path, name: str
):
    assert not _problems(quick, name, tmp_path / "run")


def result_is_not_looked_at(patch: pytest.MonkeyPatch) -> str:
    """The optimizer's result stands whatever it is."""
    patch.setattr(accumulation_file, "step_or_restore", lambda optimizer, agreed: optimizer.step() or True)
    return "optimizer-momentum"


def momentum_is_left_as_it_came_out(patch: pytest.MonkeyPatch) -> str:
    """Weights are put back, momentum is not."""
    patch.setattr(finite, "_copied", lambda values: values)
    return "optimizer-momentum"


def what_is_infinite_passes(patch: pytest.MonkeyPatch) -> str:
    """The loss is made of numbers that nobody checks; it bounds its ratios."""
    patch.setattr(accumulation_file, "nan_unless_finite", lambda *numbers: 1.0)
    return "scoring-impossible"


def flat_groups_are_not_looked_at(patch: pytest.MonkeyPatch) -> str:
    """Rewrites without meaning are all alike, so there is nothing to learn, for ever."""
    patch.setattr(accumulation_file, "rows_not_finite", lambda numbers: 0)
    return "sampling-nan-flat"


def white_is_a_colour(patch: pytest.MonkeyPatch) -> str:
    """Pixels that overflowed are white, as the pipeline cuts them."""
    patch.setattr(generator_file, "_infinities_as_nan", lambda pipeline: nullcontext())
    patch.setattr(generator_file, "_SMALLEST_CONTRAST", 0.0)
    return "pixels-inf"


BROKEN = (
    result_is_not_looked_at,
    momentum_is_left_as_it_came_out,
    what_is_infinite_passes,
    flat_groups_are_not_looked_at,
    white_is_a_colour,
)


@pytest.mark.parametrize("break_it", broken_versions(dict.fromkeys(BROKEN, "T25")))
def test_check_that_is_missing_would_be_noticed(
    quick: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Callable
):
    assert _problems(quick, break_it(monkeypatch), tmp_path / "run")


@pytest.mark.trap("T25")
def test_run_that_was_ended_says_the_same_again_and_can_be_looked_at(quick: Experiment, tmp_path: Path):
    from grpo_kit.show.report import write_report

    spoilt = PARTS[REPEATED]
    first = spoilt_run(quick, spoilt, tmp_path / "run")
    assert not problems(first, spoilt.parts, updates=2)
    again = spoilt_run(quick, spoilt, tmp_path / "run", starts=STOPS)
    assert again.error == first.error and again.rows == first.rows
    for part in (f"no update in {PATIENCE} iterations in a row", "since iteration 4", f"iteration {STOPS - 1} is comm"):
        assert part in first.error
    assert "iteration 2: update skipped" in (tmp_path / "run" / "training.log").read_text()
    assert write_report(tmp_path / "run").is_file()


# --- one step ---------------------------------------------------------------------------------------------------------


def _step(policy: Policy, rollout: Rollout, kit: Experiment, optimizer: torch.optim.Optimizer, **training: object):
    config = load_config(kit.config, {f"training_settings.{name}": value for name, value in training.items()})
    return grpo_step(policy, optimizer, rollout, config)


def _weights(policy: Policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.trainable_parameters()]).clone()


def test_of_two_updates_the_one_that_is_spoilt_is_skipped(own_policy: Policy, rollout: Rollout, kit: Experiment):
    optimizer = torch.optim.AdamW(own_policy.trainable_parameters(), lr=1e-3)
    calls = []

    def second_only(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return gradient * NAN if len(calls) == 2 else gradient

    own_policy.model.get_input_embeddings().weight.register_hook(second_only)
    before = _weights(own_policy)
    stats = _step(own_policy, rollout, kit, optimizer, updates_per_rollout=2)
    assert (stats.updates, stats.skipped, stats.non_finite.part) == (1, 1, "gradient")
    assert _weights(own_policy).isfinite().all() and not torch.equal(_weights(own_policy), before)
    assert stats.metrics["skipped_updates"] == 1  # of 2: it still learns


def test_weight_that_is_not_finite_is_named(own_policy: Policy, rollout: Rollout, kit: Experiment):
    name, parameter = list(own_policy.model.named_parameters())[5]
    parameter.data.view(-1)[3] = INF
    optimizer = torch.optim.AdamW(own_policy.trainable_parameters(), lr=1e-3)
    stats = _step(own_policy, rollout, kit, optimizer)
    assert stats.non_finite.part == "weights" and name in stats.non_finite.detail and not optimizer.state


def left_over(gradient: torch.Tensor | None, policy: Policy) -> None:
    """As an interrupt between backward and the optimizer leaves it."""
    for parameter in policy.trainable_parameters():
        parameter.grad = None if gradient is None else torch.full_like(parameter, float(gradient))


def test_gradient_that_an_interrupt_left_behind_is_not_added(own_policy: Policy, rollout: Rollout, kit: Experiment):
    results = []
    for gradient in (None, torch.tensor(0.5)):
        policy = copy.deepcopy(own_policy)
        left_over(gradient, policy)
        _step(policy, rollout, kit, torch.optim.AdamW(policy.trainable_parameters(), lr=1e-3))
        results.append(_weights(policy))
    assert torch.equal(*results) and not torch.equal(results[0], _weights(own_policy))


def test_no_gradient_is_left_by_a_step_that_is_interrupted(own_policy: Policy, rollout: Rollout, kit: Experiment):
    def interrupt(gradient: torch.Tensor) -> None:
        raise KeyboardInterrupt

    optimizer = torch.optim.AdamW(own_policy.trainable_parameters(), lr=1e-3)
    hook = own_policy.model.get_input_embeddings().weight.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        _step(own_policy, rollout, kit, optimizer)
    hook.remove()
    assert all(p.grad is None for p in own_policy.trainable_parameters())


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_number_that_is_not_finite_is_found_and_the_largest_one_is_not(bad: float, dtype: torch.dtype):
    largest = torch.full((50,), torch.finfo(dtype).max, dtype=dtype)
    assert finite.nan_unless_finite(largest, -largest, torch.zeros(3)) == finite.nan_unless_finite(largest) == 1
    assert torch.as_tensor(finite.nan_unless_finite(largest, torch.tensor([0.0, bad], dtype=dtype))).isnan()
    assert torch.as_tensor(finite.nan_unless_finite(torch.tensor([0.0, bad], dtype=dtype))).isnan()
    assert finite.nan_unless_finite() == finite.nan_unless_finite(None) == 1


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
@pytest.mark.parametrize("steps", [0, 2])
def test_step_that_is_taken_back_was_never_made(kind: type[torch.optim.Optimizer], steps: int):
    def run(spoil: bool) -> tuple[torch.Tensor, dict]:
        weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        optimizer = kind([weight], lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
        for number in range(steps):
            weight.grad = torch.full_like(weight, 1.0 + number)
            assert finite.step_or_restore(optimizer)
        if spoil:
            weight.grad = torch.full_like(weight, NAN)
            assert not finite.step_or_restore(optimizer)
        restored = copy.deepcopy(optimizer.state_dict()["state"])
        weight.grad = torch.ones_like(weight)
        assert finite.step_or_restore(optimizer)
        return weight.detach(), restored

    (with_it, restored), (without, expected) = run(True), run(False)
    assert torch.equal(with_it, without) and repr(restored) == repr(expected)


def test_diagnosis_names_the_first_part_in_the_order_of_computing():
    good, bad = torch.zeros(4, 3), torch.zeros(4, 3).index_fill(0, torch.tensor([1, 2]), NAN)
    assert finite.non_finite_loss(good, None, good, 0.5) is None
    assert finite.non_finite_loss(bad, bad, bad, NAN).part == "sampling"
    assert finite.non_finite_loss(good, bad, bad, NAN).part == "reference"
    found = finite.non_finite_loss(None, None, bad, NAN)
    assert found.part == "scoring" and "2 of 4 completions" in found.detail
    assert finite.non_finite_loss(good, good, good, INF).part == "loss"


def test_rewards_that_abstained_are_told_from_those_that_gave_no_number(rollout: Rollout):
    count = len(rollout.rewards)
    parts = {"mine": torch.full((count,), INF), "yours": torch.full((count,), NAN), "gold": torch.ones(count)}
    unscored = dataclasses.replace(rollout, reward_parts=parts, rewards=torch.full((count,), NAN))
    assert "mine abstained, yours gave no number)" in str(accumulation_file.why_unscored(unscored))


def test_of_several_gradients_the_one_next_to_the_output_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[1].register_full_backward_hook(lambda module, inward, outward: (inward[0] * NAN,))
    model(torch.ones(1, 2)).sum().backward()
    assert "0.bias (2 of 6" in finite.non_finite_gradient(dict(model.named_parameters()), NAN).detail


@pytest.mark.parametrize("bad", [NAN, INF])
def test_logits_that_are_no_distribution_give_an_id_that_exists(bad: float):
    logits = torch.zeros(3, 7)
    logits[1, 2] = bad
    for uniforms in (None, torch.tensor([0.0, 0.5, 0.999])):
        ids = choose_tokens(logits, uniforms, 1.0)
        assert ((ids >= 0) & (ids < 7)).all()
        assert torch.equal(
            ids[[0, 2]], choose_tokens(logits[[0, 2]], None if uniforms is None else uniforms[[0, 2]], 1.0)
        )


@pytest.mark.parametrize(
    ("skipped", "since"),
    [([0, 0, 2], None), ([2, 2, 2, 1], None), ([2, 2, 0, 2, 2], None), ([2, 0, 2, 2, 2], 3), ([None, 2, 2, 2, 2], 2)],
)
def test_run_ends_where_its_last_iterations_made_no_update(tmp_path: Path, skipped: list, since: int | None):
    folder, cause = RunFolder(tmp_path), finite.NonFinite("loss", "the loss (nan)")
    for iteration, number in enumerate(skipped, start=1):
        folder.append_metrics({"iteration": iteration} | ({} if number is None else {"skipped_updates": number}))
    if since is None:
        warn_or_end(folder, len(skipped), cause, 2)
        return
    count = len(skipped) - since + 1
    with pytest.raises(NonFiniteError, match=f"no update in {count} iterations in a row, since iteration {since}; "):
        warn_or_end(folder, len(skipped), cause, 2)


# --- what is never saved ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF])
def test_policy_that_is_not_finite_is_refused_before_anything_is_saved(own_kit: Experiment, tmp_path: Path, bad: float):
    kit = dataclasses.replace(own_kit, config=load_config(own_kit.config, QUICK))
    kit.policy.trainable_parameters()[7].data.view(-1)[0] = bad
    with pytest.raises(ModelError, match=r"policy: not finite: the policy's weights: model\.\S+ \(1 of") as error:
        train(kit, tmp_path / "run", progress=False)
    assert "\n" not in str(error.value) and not list((tmp_path / "run").rglob("*.safetensors"))
    with pytest.raises(ModelError, match="it is not saved"):
        kit.policy.save_pretrained(tmp_path / "policy")
    assert not (tmp_path / "policy").exists()
