"""Decoding in fixed shapes, compiled or not: the same ids and log-probabilities as with a cache that grows."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.families import FAMILIES, Family

from benchmarks.speed import sampling as benchmark
from benchmarks.speed.results import BenchmarkError
from grpo_kit.config import ConfigError, load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.experiment import Experiment
from grpo_kit.models import shared_prefix as continuing
from grpo_kit.models.policy import Completions, Policy, load_policy
from grpo_kit.models.prompt_format import EncodedPrompts
from grpo_kit.models.shared_prefix import Prefix, run_prompts

PROMPTS = ["a red circle", "three tiny golden pyramids, over on the left side, at night", "a rosy plus above a box"]
PICTURES = [
    Image.new("RGB", size, colour) for size, colour in (((32, 32), "red"), ((64, 32), "green"), ((64, 64), "blue"))
]
G = 3
CLOSE = 1e-4  # of a log-probability, in float32: masked places change the order of sums
NAMES = {family.name: family for family in FAMILIES}
SHARING = [family for family in FAMILIES if family.name != "Gemma 3 (text)"]
VIEWS = [(family, picture) for family in SHARING for picture in family.views]
SHORT = [("Qwen2.5-VL", True), ("Llama 3", False)]  # of a traced step
IDS = [f"{family.name}-{'picture' if picture else 'words'}" for family, picture in VIEWS]
each_view = pytest.mark.parametrize(("family", "picture"), VIEWS, ids=IDS)


@pytest.fixture(scope="session")
def load(kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Policy]:
    """A family's policy, as its folder is loaded, once for each way; do not train it."""
    place = tmp_path_factory.mktemp("static")

    @functools.cache
    def loaded(family: Family, **generation: object) -> Policy:
        if family.needs is not None:
            pytest.importorskip(family.needs, reason=f"the processor of {family.name} needs {family.needs}")
        folder: Path = place / family.name
        if not folder.is_dir():
            family.write(folder)
        settings = {"model_settings.vlm_model": str(folder), "model_settings.dtype": "float32"}
        generation = {"max_new_tokens": 8} | generation
        settings |= {f"generation_settings.{name}": value for name, value in generation.items()}
        return load_policy(load_config(kit.config, settings))

    return loaded


@pytest.fixture
def one_layer(own_policy: Policy) -> Policy:
    """The embedded policy with one of its three layers, which compiles sooner."""
    for model in (own_policy.model, own_policy.reference):
        text, settings = model.model.language_model, model.config.text_config
        text.layers = text.layers[:1]
        for config in (settings, text.config):
            config.num_hidden_layers, config.layer_types = 1, settings.layer_types[:1]
    return own_policy


@pytest.fixture
def quickly_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without its code generator: tracing and functionalisation, which is what a model can break."""
    _compile_with(monkeypatch, "aot_eager")


def _compile_with(monkeypatch: pytest.MonkeyPatch, backend: str | Callable) -> None:
    step = torch.compile(continuing._step, fullgraph=True, dynamic=True, backend=backend)
    monkeypatch.setattr(continuing, "_compiled_step", lambda: step)
    torch.compiler.reset()


def _sampled(policy: Policy, decoding: str, images: list | None = None, **options: object) -> Completions:
    policy.decoding = decoding
    return policy.sample(PROMPTS, G, seed=3, images=images, **options)


def _difference(one: Completions, other: Completions) -> float:
    """How far two samples' log-probabilities are apart; infinite where the ids differ."""
    if not torch.equal(one.ids, other.ids) or not torch.equal(one.mask, other.mask) or one.texts != other.texts:
        return float("inf")
    return float((one.logprobs - other.logprobs).abs().max())


# --- every family -----------------------------------------------------------------------------------------------------


@each_view
def test_fixed_shapes_sample_what_the_plain_loop_does(family: Family, picture: bool, load: Callable):
    policy, images = load(family), PICTURES if picture else None
    assert _difference(*(_sampled(policy, way, images) for way in ("plain", "static"))) < CLOSE
    if picture == family.sees:  # each family once
        assert _difference(*(_sampled(policy, way, images, greedy=True) for way in ("plain", "static"))) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "picture"),
    [pytest.param(*view, marks=() if (view[0].name, view[1]) in SHORT else pytest.mark.long) for view in VIEWS],
    ids=IDS,
)
def test_a_traced_step_samples_what_the_plain_loop_does(
    family: Family, picture: bool, load: Callable, quickly_compiled: None
):
    policy, images = load(family), PICTURES if picture else None
    assert _difference(*(_sampled(policy, way, images) for way in ("plain", "compiled"))) < CLOSE


@pytest.mark.parametrize("way", ["static", "compiled"])
def test_a_policy_that_cannot_share_prompts_is_refused_in_one_line(way: str, load: Callable):
    with pytest.raises(
        ModelError, match=r"decoding: found '\w+', but .* keep less than the whole past.*; set 'plain'$"
    ):
        load(NAMES["Gemma 3 (text)"], decoding=way)


# --- the embedded policy ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_step_samples_what_the_plain_loop_does(one_layer: Policy):
    """By inductor, the code generator that users get: C++ here. Other sizes compile nothing new."""
    torch.compiler.reset()
    assert _difference(*(_sampled(one_layer, way) for way in ("plain", "compiled"))) < CLOSE
    with torch.compiler.set_stance("fail_on_recompile"):
        samples = [_resampled(one_layer, way) for way in ("plain", "compiled")]
    assert _difference(*samples) < CLOSE


def _resampled(policy: Policy, decoding: str) -> Completions:
    """Another number of prompts and of samples, longer texts, another seed."""
    policy.decoding = decoding
    return policy.sample([*PROMPTS[1:], "a very long request " * 4, "a star"], G + 2, seed=5)


@pytest.mark.slow
def test_a_compiled_step_is_the_policys_own_after_training_and_the_references_where_asked(
    one_layer: Policy, monkeypatch: pytest.MonkeyPatch
):
    _compile_with(monkeypatch, "eager")
    before = _sampled(one_layer, "compiled")
    with torch.no_grad():
        for parameter in one_layer.trainable_parameters():
            parameter.mul_(1.2)
    assert _difference(before, _sampled(one_layer, "compiled", reference=True)) < CLOSE
    plain, compiled = (_sampled(one_layer, way) for way in ("plain", "compiled"))
    assert _difference(plain, compiled) < CLOSE < _difference(before, compiled)


def test_a_machine_that_cannot_compile_is_told_what_to_do(one_layer: Policy, monkeypatch: pytest.MonkeyPatch):
    def no_compiler(graph: object, examples: object) -> Callable:
        raise FileNotFoundError("g++")

    _compile_with(monkeypatch, no_compiler)
    with pytest.raises(
        ModelError, match=r"decoding: found 'compiled', but torch.compile fails .*g\+\+.*; set 'plain'$"
    ):
        _sampled(one_layer, "compiled")


# --- broken versions --------------------------------------------------------------------------------------------------


def sees_the_empty_room(own: torch.Tensor, places: torch.Tensor, taken: int) -> torch.Tensor:
    """A completion attends to places that hold nothing yet."""
    return own


def overwrites(model: torch.nn.Module, prefix: Prefix, room: int) -> object:
    """The completions' first tokens are written over the prompt's last one."""
    static = continuing_static(model, prefix, room)
    for layer in static.layers:
        layer.cumulative_length -= 1
    return static


continuing_static = continuing._static


@pytest.mark.parametrize("mutant", [("_seen", sees_the_empty_room), ("_static", overwrites)], ids=lambda m: m[0])
def test_mistakes_in_fixed_shapes_are_noticed(mutant: tuple, own_policy: Policy, monkeypatch: pytest.MonkeyPatch):
    plain = _sampled(own_policy, "plain")
    monkeypatch.setattr(continuing, *mutant)
    assert _difference(plain, _sampled(own_policy, "static")) > CLOSE


def test_ways_that_sample_otherwise_are_not_timed(one_layer: Policy, monkeypatch: pytest.MonkeyPatch):
    _compile_with(monkeypatch, "eager")
    case = benchmark.Case("embedded", one_layer, PROMPTS, G)
    assert [gate.passed for gate in benchmark.agree(case)] == [True, True]
    monkeypatch.setattr(continuing, "_seen", sees_the_empty_room)
    with pytest.raises(BenchmarkError, match="embedded, static"):
        benchmark.agree(case)


# --- several calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", ["plain", "static"])
@pytest.mark.parametrize("size", [1, 4, 6, 100])
def test_the_number_of_rows_in_a_call_changes_no_sample(size: int, decoding: str, own_policy: Policy):
    whole = _sampled(own_policy, decoding)
    own_policy.sampling_batch_size = size
    assert _difference(whole, _sampled(own_policy, decoding)) < CLOSE


def test_calls_are_as_even_as_can_be_and_hold_whole_groups(own_policy: Policy, monkeypatch: pytest.MonkeyPatch):
    decoded, sizes = Policy._decoded, []

    def counted(self: Policy, model: object, encoded: EncodedPrompts, *rest: object) -> tuple:
        sizes.append(len(encoded))
        return decoded(self, model, encoded, *rest)

    monkeypatch.setattr(Policy, "_decoded", counted)
    for most, count, expected in ((32, 1, [1]), (32, 4, [4]), (32, 5, [3, 2]), (32, 8, [4, 4]), (3, 2, [1, 1])):
        own_policy.sampling_batch_size = most
        own_policy.sample(["a red circle"] * count, 8, seed=0)
        assert sizes == expected
        sizes.clear()


def test_rows_below_each_other_keep_to_their_seeds(own_policy: Policy, monkeypatch: pytest.MonkeyPatch):
    """The twin: calls that all begin with the first prompt's seeds."""
    whole, decoded, first = _sampled(own_policy, "plain"), Policy._decoded, []

    def as_the_first(self: Policy, *columns: object) -> tuple[torch.Tensor, torch.Tensor]:
        *columns, uniforms = columns
        first.append(uniforms)
        return decoded(self, *columns, first[0])

    own_policy.sampling_batch_size = G
    monkeypatch.setattr(Policy, "_decoded", as_the_first)
    assert _difference(whole, _sampled(own_policy, "plain")) == float("inf")


def test_the_settings_reach_the_policy_and_are_checked(kit: Experiment):
    settings = {"generation_settings.decoding": "static", "generation_settings.sampling_batch_size": 5}
    policy = load_policy(load_config(kit.config, settings))
    assert (policy.decoding, policy.sampling_batch_size) == ("static", 5)
    assert copy.deepcopy(policy).decoding == "static" and kit.policy.decoding == "plain"
    with pytest.raises(ConfigError, match=r"decoding: found 'dynamic', allowed: plain, static, compiled"):
        load_config(kit.config, {"generation_settings.decoding": "dynamic"})
    with pytest.raises(ConfigError, match="sampling_batch_size: found 0"):
        load_config(kit.config, {"generation_settings.sampling_batch_size": 0})


@torch.no_grad()
def test_a_step_beyond_the_room_is_an_error(own_policy: Policy):
    prefix = run_prompts(own_policy.model, own_policy.encode(PROMPTS).inputs)
    step = continuing.continued_groups(own_policy.model, prefix, 2, 1, "static")
    step(torch.full((6,), 20), 0)
    with pytest.raises((RuntimeError, IndexError)):
        step(torch.full((6,), 20), 1)
