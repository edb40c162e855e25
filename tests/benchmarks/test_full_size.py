"""The full-size check: architectures as published, operations counted without weights, and the real form small."""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.size import architectures, full_size, full_size_flops
from benchmarks.size.architectures import FULL, TINY
from benchmarks.size.full_size import Iteration
from benchmarks.speed import bare, measure, text_policy
from benchmarks.speed.results import BenchmarkError
from grpo_kit.models.policy import Policy
from grpo_kit.models.shared_prefix import continued_groups, run_prompts


@pytest.fixture(scope="module")
def dry_form(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the dry form writes and prints."""
    out = tmp_path_factory.mktemp("dry")
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        full_size.main(device=None, dry_run=True, scale="tiny", pairs=2, threads=1, out=out)
    return out, shown.getvalue()


@pytest.fixture(scope="module")
def parts(dry_form: tuple[Path, str]) -> dict[str, full_size_flops.Part]:
    """The same, as it was counted."""
    cases = json.loads((dry_form[0] / "full_size_dry.json").read_text())["cases"]
    return {case["name"]: full_size_flops.Part(**case) for case in cases}


@pytest.fixture(scope="module")
def iteration() -> Iteration:
    return Iteration.of(TINY, "cpu", torch.float32)


# --- architectures ----------------------------------------------------------------------------------------------------


def test_models_of_full_size_have_the_parameters_that_are_published():
    policy = architectures.build_policy(FULL, "meta", torch.bfloat16)
    assert architectures.parameters(policy.model) == 3_754_622_976
    generator = architectures.build_generator(FULL, "meta", torch.bfloat16)
    positions = generator.pipeline.transformer.pos_embed.pos_embed.numel()  # a buffer in diffusers, else a weight
    assert architectures.parameters(*architectures.parts_of(generator)) + positions == 2_987_080_931
    assert architectures.parameters(architectures.build_clip(FULL, "meta").model) == 427_616_513


# --- counting ---------------------------------------------------------------------------------------------------------


def _every_step(policy: Policy, texts: list[str]) -> float:
    """Sampling counted token by token."""
    shape = TINY.shape
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        found: list = []
        inputs = policy.encode(texts).on(policy.device)
        whole = full_size_flops.counted(lambda: found.append(run_prompts(policy.model, inputs)))
        step = continued_groups(policy.model, found[0], shape.group, shape.completion_tokens)
        ids = torch.zeros(TINY.rows, dtype=torch.int64, device="meta")
        for number in range(shape.completion_tokens - 1):
            whole += full_size_flops.counted(lambda number=number: step(ids, number))
    return whole


def test_two_steps_tell_the_operations_of_all(parts: dict):
    policy = architectures.build_policy(TINY, "meta", torch.bfloat16)
    assert parts["sampling"].flops == _every_step(policy, text_policy.prompts(TINY.shape))


def test_operations_of_a_known_product_are_counted():
    a, b = torch.zeros(3, 5, device="meta"), torch.zeros(5, 7, device="meta")
    assert full_size_flops.counted(lambda: a @ b) == 2 * 3 * 5 * 7


def test_operations_are_those_of_the_real_models(parts: dict, iteration: Iteration):
    """The same counter on real numbers, around the kit's own calls."""
    kit = full_size.by_kit(iteration)
    for part, names in (
        ("reward", ["reward"]),
        ("images", ["images: texts", "images: denoising", "images: decoding"]),
        ("scoring pass", ["scoring pass"]),
        ("backward", ["backward, with its forward"]),
    ):
        real = full_size_flops.counted(lambda part=part: kit[part](1))
        assert sum(parts[name].flops for name in names) == pytest.approx(real, rel=0.05), part


def test_denoising_grows_with_its_steps_and_nothing_else_does(parts: dict):
    more = {part.name: part for part in full_size_flops.count(replace(TINY, steps=3 * TINY.steps))}
    factors = {name: more[name].flops / part.flops for name, part in parts.items() if part.flops}
    assert factors.pop("images: denoising") == 3 and set(factors.values()) == {1}


def test_the_dry_form_prints_and_writes_every_part(dry_form: tuple[Path, str], parts: dict):
    out, shown = dry_form
    assert len(parts) == 8 and all(name in shown for name in parts)
    assert str(out) not in (out / "full_size_dry.json").read_text()


# --- the real form, small ---------------------------------------------------------------------------------------------


def test_kit_and_bare_calls_do_the_same_work(iteration: Iteration):
    assert all(gate.passed for gate in full_size.agree(iteration))
    kit, hand = full_size.by_kit(iteration), full_size.by_hand(iteration)
    torch.testing.assert_close(kit["reward"](0), hand["reward"](0), rtol=0, atol=1e-5)
    gradients = []
    for side in (kit, hand):
        side["backward"](0)
        gradients.append(torch.cat([p.grad.flatten() for p in iteration.policy.trainable_parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    assert len(kit["images"](0)) == len(hand["images"](0)) == TINY.rows
    length = TINY.shape.prompt_tokens + TINY.shape.completion_tokens
    assert hand["sampling"](0).shape == (TINY.rows, length)


def one_token_late(logprobs: Callable) -> Callable:
    """The bare side reads each token's probability one place too far."""

    def shifted(model: torch.nn.Module, rows: torch.Tensor, tokens: int) -> torch.Tensor:
        return logprobs(model, rows, tokens).roll(1, dims=1)

    return shifted


def test_sides_that_do_other_work_are_not_timed(iteration: Iteration, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bare, "logprobs", one_token_late(bare.logprobs))
    with pytest.raises(BenchmarkError, match="do not do the same work"):
        full_size.agree(iteration)


@pytest.mark.slow
def test_the_real_form_writes_seconds_overhead_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "RESAMPLES", 99)
    full_size.main(device="cpu", dry_run=False, scale="tiny", pairs=1, threads=1, out=tmp_path)
    record = json.loads((tmp_path / "full_size.json").read_text())
    names = {figure["name"] for figure in record["figures"]}
    for part in full_size.PARTS:
        assert {f"seconds, {part}", f"kit / bare, {part}", f"memory beyond the models', {part}"} <= names
    assert {"seconds, optimizer step", "images a second", "kit / bare, all parts"} <= names
    assert all(gate["measured"] <= gate["limit"] for gate in record["gates"])
