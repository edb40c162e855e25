"""The policy: what is sampled is what is scored, with and without pictures, all weights and an adapter.

CORRECTNESS.md T1, T8 to T13, T17, T20 and T26.
"""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import scipy.stats
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.abuse import Count
from support.broken_twins import broken_versions
from support.gpt2 import byte_tokenizer, write_gpt2
from support.policy_forms import LORA, new_adapter, with_attention_dropout, with_moved_adapter
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_kit.config import load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.experiment import Experiment
from grpo_kit.models import decoding, prompt_format
from grpo_kit.models import policy as policy_module
from grpo_kit.models.conversation import Conversation
from grpo_kit.models.decoding import choose_tokens, row_seeds, row_uniforms
from grpo_kit.models.loading import load_language_model
from grpo_kit.models.policy import Completions, EnhancedPrompt, Policy, load_policy
from grpo_kit.models.rows import evaluating
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import random_scenes

PROMPTS = ["a red circle", "three tiny golden pyramids, over on the left side, at night", "a rosy plus above a box"]
PICTURES = [render(scene) for scene in random_scenes(3, seed=0)]
GROUPS = torch.tensor([0, 0, 1, 1, 2, 2])
ROUNDING = 1e-5  # two or three units in the last place of logits around 30, which is what float32 gives
seeing = pytest.mark.parametrize("images", [None, PICTURES], ids=["words", "pictures"])


@pytest.fixture(params=["all weights", "adapter"])
def any_policy(request: pytest.FixtureRequest, own_policy: Policy, kit: Experiment) -> Policy:
    """The embedded policy in training mode, with dropout: as it is, or with an adapter that was trained."""
    policy = own_policy if request.param == "all weights" else with_moved_adapter(new_adapter(kit))
    with_attention_dropout(policy).model.train()
    return policy


def _sample(policy: Policy, images: list[Image.Image] | None, **options: object) -> Completions:
    return policy.sample(PROMPTS, 2, seed=3, images=images, **options)


@torch.no_grad()
def _scored(policy: Policy, found: Completions, images: list[Image.Image] | None, **options: object) -> torch.Tensor:
    return policy.score(PROMPTS, GROUPS, found.ids, found.mask, images=images, **options).logprobs


@torch.no_grad()
def _plain(policy: Policy, prompt: str, ids: torch.Tensor, image: Image.Image | None = None) -> torch.Tensor:
    """Log-probabilities by one full forward of transformers over one unpadded row, no cache, no positions given."""
    inputs = policy.encode([prompt], None if image is None else [image]).inputs
    start = inputs["input_ids"].shape[1]
    for name, added in (("input_ids", ids), ("attention_mask", torch.ones_like(ids)), ("mm_token_type_ids", 0 * ids)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], added[None]], dim=1)
    with evaluating(policy.model):
        logits = policy.model(**inputs, use_cache=False).logits[0, start - 1 : -1]
    return (logits / policy.temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def _far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


# --- sampling and scoring agree ---------------------------------------------------------------------------------------


@pytest.mark.trap("T1")
@pytest.mark.trap("T8")
@pytest.mark.trap("T8", broken="another_temperature")
@seeing
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_sampled_logprobs_are_the_scored_ones(any_policy: Policy, images: list | None, temperature: float):
    any_policy.temperature = temperature
    found = _sample(any_policy, images)
    assert _far(found.logprobs, _scored(any_policy, found, images)) <= ROUNDING
    any_policy.temperature = temperature + 0.01
    assert _far(found.logprobs, _scored(any_policy, found, images)) > 100 * ROUNDING


@pytest.mark.trap("T1")
@seeing
def test_in_double_precision_sampled_and_scored_agree_to_a_millionth(any_policy: Policy, images: list | None):
    any_policy.model.double()
    found = _sample(any_policy, images)
    assert found.logprobs.dtype == torch.float64
    assert _far(found.logprobs, _scored(any_policy, found, images)) <= 1e-6


def _worst_difference_from_a_plain_forward(
    policy: Policy, images: list | None, spoil: Callable[[Policy], None] = lambda policy: None
) -> float:
    """How far what a spoiled copy samples and scores is from log softmax(logits / temperature) of transformers."""
    spoiled = copy.deepcopy(policy)
    spoil(spoiled)
    found = _sample(spoiled, images)
    scored, differences = _scored(spoiled, found, images), []
    for row, group in enumerate(GROUPS.tolist()):
        kept = found.mask[row]
        picture = None if images is None else images[group]
        plain = _plain(policy, PROMPTS[group], found.ids[row][kept], picture)
        differences.append(_far(scored[row][kept], plain))
        assert not scored[row][~kept].any()
    return max(differences)


@pytest.mark.trap("T8")
@pytest.mark.trap("T17")
@seeing
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_scored_logprobs_are_those_of_a_plain_full_forward(any_policy: Policy, images: list | None, temperature: float):
    any_policy.temperature = temperature
    assert _worst_difference_from_a_plain_forward(any_policy, images) <= ROUNDING


def temperature_forgotten(policy: Policy) -> None:
    policy.temperature = 1.0


def temperature_applied_twice(policy: Policy) -> None:
    policy.temperature **= 2


def _logits_raised_by_25(policy: Policy) -> None:
    """As high as those of large models; the distribution is the same."""
    policy.model.get_output_embeddings().register_forward_hook(lambda module, given, logits: logits + 25)


def logits_clamped_at_20(policy: Policy) -> None:
    _logits_raised_by_25(policy)
    policy.model.get_output_embeddings().register_forward_hook(lambda module, given, logits: logits.clamp(-20, 20))


@pytest.mark.trap("T17")
@seeing
def test_high_logits_are_scored_as_they_are(any_policy: Policy, images: list | None):
    assert _worst_difference_from_a_plain_forward(any_policy, images, _logits_raised_by_25) <= 3 * ROUNDING


@seeing
@pytest.mark.parametrize(
    "spoil",
    broken_versions({temperature_forgotten: "T8", temperature_applied_twice: "T8", logits_clamped_at_20: "T17"}),
)
def test_scoring_of_another_distribution_is_noticed(
    any_policy: Policy, images: list | None, spoil: Callable[[Policy], None]
):
    any_policy.temperature = 0.5
    assert _worst_difference_from_a_plain_forward(any_policy, images, spoil) > 100 * ROUNDING


@pytest.mark.trap("T11", broken="pictures_of_other_rows")
@pytest.mark.trap("T11", broken="no_picture")
def test_scoring_without_the_picture_that_was_seen_is_noticed(kit: Experiment):
    found = _sample(kit.policy, PICTURES)
    assert _far(found.logprobs, _scored(kit.policy, found, PICTURES[::-1])) > 100 * ROUNDING
    assert _far(found.logprobs, _scored(kit.policy, found, None)) > 100 * ROUNDING


def test_words_are_scored_the_same_after_pictures_as_before(own_policy: Policy):
    found = _sample(own_policy, None)
    before = _scored(own_policy, found, None)
    _sample(own_policy, PICTURES)  # leaves positions of pictures in the model
    assert torch.equal(_scored(own_policy, found, None), before)


def _worst_change_beside_others(policy: Policy, images: list | None) -> float:
    """How far a row's log-probabilities move when it is scored alone instead of in a left-padded mixed batch."""
    found = _sample(policy, images)
    together = _scored(policy, found, images)
    changes = []
    for row, group in enumerate(GROUPS.tolist()):
        kept = slice(0, int(found.mask[row].sum()))
        with torch.no_grad():
            alone = policy.score(
                [PROMPTS[group]],
                torch.tensor([0]),
                found.ids[row : row + 1, kept],
                found.mask[row : row + 1, kept],
                images=None if images is None else [images[group]],
            )
        changes.append(_far(alone.logprobs[0], together[row, kept]))
    return max(changes)


@pytest.mark.trap("T11")
@seeing
def test_a_row_is_scored_alone_as_in_a_padded_batch(any_policy: Policy, images: list | None):
    assert _worst_change_beside_others(any_policy, images) <= ROUNDING


def attending_to_padding(prefix: object) -> object:
    return dataclasses.replace(prefix, mask=torch.ones_like(prefix.mask))


def counting_padding(prefix: object) -> object:
    return dataclasses.replace(prefix, next_position=torch.full_like(prefix.next_position, prefix.mask.shape[1]))


@seeing
@pytest.mark.parametrize("mutant", broken_versions({attending_to_padding: "T11", counting_padding: "T11"}))
def test_padding_mistakes_are_noticed(
    any_policy: Policy, monkeypatch: pytest.MonkeyPatch, mutant: Callable, images: list | None
):
    run_prompts = policy_module.run_prompts
    monkeypatch.setattr(policy_module, "run_prompts", lambda *args: mutant(run_prompts(*args)))
    assert _worst_change_beside_others(any_policy, images) > 100 * ROUNDING


@pytest.mark.trap("T11")
def test_pictures_stay_with_their_rows_when_prompts_are_shuffled(any_policy: Policy):
    found = _sample(any_policy, PICTURES)
    order = [2, 0, 1]
    place = torch.tensor([order.index(group) for group in GROUPS.tolist()])
    with torch.no_grad():
        shuffled = any_policy.score(
            [PROMPTS[i] for i in order], place, found.ids, found.mask, images=[PICTURES[i] for i in order]
        )
    assert _far(shuffled.logprobs, found.logprobs) <= ROUNDING


@pytest.mark.trap("T10")
@seeing
def test_nothing_after_the_end_changes_a_score(any_policy: Policy, images: list | None):
    found = _sample(any_policy, images)
    assert not found.mask.all()
    garbage = found.ids.where(found.mask, 7)
    with torch.no_grad():
        scores = any_policy.score(PROMPTS, GROUPS, garbage, found.mask, images=images)
    assert torch.equal(scores.logprobs, _scored(any_policy, found, images))


def test_gradients_of_shared_prompts_are_those_of_rows_scored_one_by_one(own_policy: Policy):
    found = _sample(own_policy, None)
    weights = torch.randn(found.ids.shape, generator=torch.Generator().manual_seed(0))

    def gradient(rows: list[torch.Tensor]) -> torch.Tensor:
        own_policy.model.zero_grad()
        for keep in rows:
            scores = own_policy.score(PROMPTS, GROUPS[keep], found.ids[keep], found.mask[keep])
            (scores.logprobs * weights[keep]).sum().backward()
        return torch.cat([p.grad.flatten() for p in own_policy.trainable_parameters() if p.grad is not None])

    together, apart = gradient([torch.arange(6)]), gradient(list(torch.arange(6).split(1)))
    assert float(together.norm()) > 0
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4 * float(together.abs().max()))


def test_entropy_is_zero_outside_the_mask_and_positive_inside(kit: Experiment):
    found = _sample(kit.policy, None)
    with torch.no_grad():
        entropy = kit.policy.score(PROMPTS, GROUPS, found.ids, found.mask).entropy
    assert not entropy[~found.mask].any() and (entropy[found.mask] >= 0).all() and entropy.max() > 0.1


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_same_seed_same_samples_another_seed_other_ones(kit: Experiment):
    found = [kit.policy.sample(PROMPTS, 4, seed=seed).texts for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert len(set(found[0][:4])) > 1


def test_a_sample_does_not_depend_on_the_prompts_beside_it(kit: Experiment):
    together = kit.policy.sample(PROMPTS, 4, seed=5).texts
    alone = kit.policy.sample(PROMPTS[:1], 4, seed=5).texts
    assert together[:4] == alone


# --- the whole vocabulary (T9) ----------------------------------------------------------------------------------------


def top_50(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    kept = logits >= logits.topk(50, dim=1).values[:, -1:]
    return choose_tokens(logits.where(kept, -torch.inf), uniforms, temperature)


def nucleus_of_90(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    probabilities, order = (logits / temperature).softmax(dim=1).sort(dim=1, descending=True)
    within = probabilities.cumsum(dim=1) - probabilities < 0.9
    kept = torch.zeros_like(within).scatter(1, order, within)
    return choose_tokens(logits.where(kept, -torch.inf), uniforms, temperature)


def _truncating(policy: Policy) -> Policy:
    """As many models come: their generation config truncates."""
    policy.model.generation_config.update(do_sample=True, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.3)
    return policy


def _p_value_of_first_tokens(policy: Policy, images: list | None) -> float:
    """How likely so uneven counts are (a χ² test), if each token is drawn as often as its score says."""
    policy.temperature, policy.max_new_tokens, count = 4.0, 1, 6000
    image = None if images is None else images[:1]
    drawn = policy.sample(PROMPTS[:1], count, seed=0, images=image).ids[:, 0]
    vocabulary = torch.arange(policy.model.get_input_embeddings().num_embeddings).unsqueeze(1)
    with torch.no_grad():
        rows = vocabulary[:, 0] * 0, vocabulary, vocabulary >= 0  # each token as a completion of its own
        expected = count * policy.score(PROMPTS[:1], *rows, images=image).logprobs[:, 0].double().exp()
    assert float(expected.sum()) == pytest.approx(count, rel=1e-5)  # what is scored is a distribution over all tokens
    place = torch.where(expected < 8, 0, torch.arange(len(expected)) + 1)  # the rare ones are counted together
    observed, wanted = (torch.zeros(len(expected) + 1).double().index_add_(0, place, values) for values in (
        torch.bincount(drawn, minlength=len(expected)).double(), expected,
    ))  # fmt: skip
    wanted *= count / wanted.sum()
    return float(scipy.stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue)


@pytest.mark.trap("T9")
@seeing
def test_tokens_are_sampled_from_the_distribution_that_is_scored_whatever_the_generation_config_says(
    any_policy: Policy, images: list | None
):
    assert _p_value_of_first_tokens(_truncating(any_policy), images) > 1e-3


@seeing
@pytest.mark.parametrize("mutant", broken_versions({top_50: "T9", nucleus_of_90: "T9"}))
def test_sampling_from_a_truncated_vocabulary_is_noticed(
    any_policy: Policy, images: list | None, mutant: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decoding, "choose_tokens", mutant)
    assert _p_value_of_first_tokens(any_policy, images) < 1e-9


@pytest.mark.trap("T9")
@seeing
def test_a_generation_config_that_truncates_changes_no_sample(any_policy: Policy, images: list | None):
    any_policy.temperature = 4.0
    before, after = _sample(any_policy, images), _sample(_truncating(any_policy), images)
    assert torch.equal(before.ids, after.ids) and torch.equal(before.logprobs, after.logprobs)


@pytest.mark.trap("T8")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_distribution_that_is_scored(temperature: float):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0]).expand(20_000, 5)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = torch.bincount(choose_tokens(logits, uniforms, temperature), minlength=5) / 20_000
    expected = (logits[0] / temperature).softmax(0)
    assert _far(drawn, expected) < 0.015
    assert _far(drawn, (logits[0] / (temperature + 0.3)).softmax(0)) > 0.015


def test_the_ends_of_the_unit_interval_are_tokens_of_the_vocabulary():
    logits = torch.full((2, 4), -torch.inf)
    logits[:, 1:3] = 0
    assert choose_tokens(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0).tolist() == [1, 2]


def test_greedy_is_the_likeliest_token():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose_tokens(logits, None, 1.0), logits.argmax(-1))


def test_every_row_has_its_own_stream():
    rows = row_uniforms(row_seeds(0, 3, 4), 50)
    assert rows.shape == (12, 50) and len({tuple(row.tolist()) for row in rows}) == 12
    assert torch.equal(row_uniforms(row_seeds(0, 1, 4), 20), rows[:4, :20])


def test_completions_stop_at_the_length_limit_and_are_padded_after_their_end(own_policy: Policy):
    own_policy.max_new_tokens = 5
    found = _sample(own_policy, None)
    assert found.ids.shape[1] <= 5 and found.mask.shape == found.logprobs.shape == found.ids.shape
    own_policy.max_new_tokens = 40
    found = _sample(own_policy, None)
    ends = torch.tensor(own_policy.eos_token_ids)
    for ids, mask, text in zip(found.ids, found.mask, found.texts, strict=True):
        assert torch.isin(ids[mask][-1], ends) and not torch.isin(ids[mask][:-1], ends).any()
        assert (ids[~mask] == own_policy.tokenizer.pad_token_id).all()
        assert text == text.strip() and "<|" not in text
    assert not found.logprobs[~found.mask].any() and (found.logprobs[found.mask] <= 0).all()


# --- a user's text stays text (T26) -----------------------------------------------------------------------------------


def _control_tokens(policy: Policy, prompt: str, images: list | None = None) -> int:
    special = torch.tensor(policy.tokenizer.all_special_ids)
    inputs = policy.encode([prompt], None if images is None else images[:1]).inputs
    return int(torch.isin(inputs["input_ids"], special).sum())


def _injections(policy: Policy) -> list[str]:
    tokens = policy.tokenizer.all_special_tokens
    return [f"a {token} circle" for token in tokens] + ["".join(tokens), f"<{tokens[0]}{tokens[0]}>"]


@pytest.mark.trap("T26")
@pytest.mark.trap("T26", broken="text_as_it_is")
@pytest.mark.abuse("S6")
@pytest.mark.abuse("S6", broken="text_as_it_is")
@seeing
def test_special_tokens_in_a_users_text_stay_ordinary_text(
    any_policy: Policy, images: list | None, attempts: Count, monkeypatch: pytest.MonkeyPatch
):
    plain, injections = _control_tokens(any_policy, "a red circle", images), _injections(any_policy)
    with attempts(len(injections)) as got_through:
        got_through += [text for text in injections if _control_tokens(any_policy, text, images) != plain]
        assert got_through == []
    for text in injections:
        assert any_policy.sample([text], 1, seed=0, images=None if images is None else images[:1]).texts
    monkeypatch.setattr(prompt_format, "without_control_tokens", lambda prompt, tokenizer: prompt)
    assert _control_tokens(any_policy, f"a {any_policy.tokenizer.eos_token} circle", images) > plain


def test_braces_in_a_users_text_are_no_template(kit: Experiment):
    assert "Improve: a {prompt} {0} {{x}}" in kit.policy.format_prompt("a {prompt} {0} {{x}}")


def test_pictures_come_with_their_place_in_the_text(kit: Experiment):
    assert "<|image_pad|>" in kit.policy.format_prompt(Conversation("a cat", (Image.new("RGB", (32, 32)),)))
    assert "<|image_pad|>" not in kit.policy.format_prompt("a cat")


def test_prompts_are_padded_on_the_left(kit: Experiment):
    mask = kit.policy.encode(PROMPTS).inputs["attention_mask"]
    assert (mask[:, -1] == 1).all() and not mask.all() and (mask.diff(dim=1) >= 0).all()


# --- plain use --------------------------------------------------------------------------------------------------------


def test_a_rewrite_is_the_same_alone_and_among_others(kit: Experiment):
    together = kit.policy.enhance_prompts(PROMPTS)
    assert together == [kit.policy.enhance_prompt(prompt) for prompt in PROMPTS]
    assert all(isinstance(text, str) and text and not text.fell_back for text in together)


@pytest.mark.parametrize("nothing", ["", "  \n"])
def test_where_the_policy_writes_nothing_the_users_prompt_stands_and_says_so(own_policy: Policy, nothing: str):
    own_policy.decode = lambda ids, mask: [nothing] * len(ids)
    found = own_policy.enhance_prompt("a cat")
    assert found == "a cat" and isinstance(found, EnhancedPrompt) and found.fell_back


def test_a_rollout_keeps_an_empty_rewrite_empty(own_policy: Policy):
    own_policy.decode = lambda ids, mask: [""] * len(ids)
    assert own_policy.sample(["a cat"], 2, seed=0).texts == ["", ""]


# --- the reference ----------------------------------------------------------------------------------------------------


def _train_a_little(policy: Policy, found: Completions, images: list | None = None) -> None:
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-3)
    for _ in range(3):
        policy.score(PROMPTS, GROUPS, found.ids, found.mask, images=images).logprobs.sum().neg().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.trap("T20")
@seeing
def test_training_moves_the_policy_and_leaves_the_reference(own_policy: Policy, images: list | None):
    found = _sample(own_policy, images)
    before = _scored(own_policy, found, images)
    assert torch.equal(_scored(own_policy, found, images, reference=True), before)
    _train_a_little(own_policy, found, images)
    assert torch.equal(_scored(own_policy, found, images, reference=True), before)
    assert _far(_scored(own_policy, found, images), before) > 1e-2
    assert _sample(own_policy, images, reference=True).texts == found.texts
    assert not any(p.requires_grad for p in own_policy.reference.parameters())


def test_weights_come_back_from_a_state_and_from_a_folder(own_policy: Policy, kit: Experiment, tmp_path: Path):
    found = _sample(own_policy, None)
    _train_a_little(own_policy, found)
    trained = _scored(own_policy, found, None)
    other = copy.deepcopy(kit.policy)
    other.load_trainable_state(own_policy.trainable_state())
    assert torch.equal(_scored(other, found, None), trained)
    own_policy.save_pretrained(tmp_path)
    loaded = load_policy(kit.config, tmp_path)
    assert torch.equal(_scored(loaded, found, None), trained)
    assert torch.equal(_scored(loaded, found, None, reference=True), _scored(kit.policy, found, None))


def test_state_of_another_model_is_refused_in_one_line(own_policy: Policy):
    state = own_policy.trainable_state()
    state.pop(min(state))
    with pytest.raises(ModelError, match="checkpoint: found other tensors") as error:
        own_policy.load_trainable_state(state)
    assert "\n" not in str(error.value)


# --- LoRA (T13) -------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(kit: Experiment) -> Policy:
    """The embedded policy with an adapter that has dropout."""
    return new_adapter(kit)


@pytest.mark.trap("T20")
@seeing
def test_reference_is_the_adapter_switched_off(adapted: Policy, kit: Experiment, images: list | None):
    assert adapted.reference is None
    found = _sample(kit.policy, images)
    base = _scored(kit.policy, found, images)
    assert _far(_scored(adapted, found, images), base) <= ROUNDING  # a new adapter adds nothing
    _train_a_little(adapted, found, images)
    assert _far(_scored(adapted, found, images, reference=True), base) <= ROUNDING
    moved = _scored(adapted, found, images)
    assert _far(moved, base) > 1e-3
    assert torch.equal(_scored(adapted, found, images), moved)  # switched on again
    assert {"lora" in name for name in adapted.trainable_state()} == {True}


@pytest.mark.trap("T13")
@pytest.mark.trap("T13", broken="dropout_left_on")
def test_dropout_is_off_in_scoring_and_the_mode_is_restored(adapted: Policy):
    adapted.model.train()
    found = _sample(adapted, None)
    _train_a_little(adapted, found)
    one, two = _scored(adapted, found, None), _scored(adapted, found, None)
    assert torch.equal(one, two) and adapted.model.training
    with torch.no_grad():  # what scoring in training mode would have given
        logits = [adapted.model(input_ids=found.ids).logits for _ in range(2)]
    assert not torch.equal(*logits)


def test_adapter_comes_back_from_its_folder(adapted: Policy, kit: Experiment, tmp_path: Path):
    found = _sample(adapted, None)
    _train_a_little(adapted, found)
    adapted.save_pretrained(tmp_path)
    loaded = load_policy(load_config(kit.config, {"model_settings.lora": LORA}), tmp_path)
    assert torch.equal(_scored(loaded, found, None), _scored(adapted, found, None))
    assert loaded.trainable_state().keys() == adapted.trainable_state().keys()


# --- text-only policies -----------------------------------------------------------------------------------------------


def _llama(folder: Path) -> None:
    """Rotary positions, grouped keys, a padding token and a chat template."""
    tokenizer = byte_tokenizer(pad_token="<|endoftext|>")
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **heads, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(params=[write_gpt2, _llama], ids=["gpt2", "llama"])
def text_only(request: pytest.FixtureRequest, tmp_path: Path) -> Policy:
    request.param(tmp_path)
    model, tokenizer = load_language_model(str(tmp_path), torch.float32)
    return Policy(model, tokenizer, instruction="Improve: {prompt}", max_new_tokens=12, temperature=0.8)


@pytest.mark.trap("T1")
@pytest.mark.trap("T11")
def test_text_only_policy_scores_what_it_sampled(text_only: Policy):
    found = _sample(text_only, None)
    assert _far(found.logprobs, _scored(text_only, found, None)) <= ROUNDING
    assert _worst_change_beside_others(text_only, None) <= ROUNDING
    for row, group in enumerate(GROUPS.tolist()):
        kept = found.mask[row]
        plain = _plain(text_only, PROMPTS[group], found.ids[row][kept])
        assert _far(found.logprobs[row][kept], plain) <= ROUNDING


@pytest.mark.trap("T12")
@pytest.mark.trap("T12", broken="text_tokenised_again")
def test_ids_are_scored_as_sampled_even_where_the_text_is_tokenised_otherwise(text_only: Policy):
    found = _sample(text_only, None)
    again = text_only.tokenizer(found.texts, add_special_tokens=False).input_ids
    sampled = [row[kept].tolist() for row, kept in zip(found.ids, found.mask, strict=True)]
    assert again != sampled  # an untrained model writes what no tokenizer would
    assert _far(found.logprobs, _scored(text_only, found, None)) <= ROUNDING
    width = found.ids.shape[1]
    ids = torch.tensor([(row + [text_only.tokenizer.pad_token_id] * width)[:width] for row in again])
    other = dataclasses.replace(found, ids=ids)
    assert _far(found.logprobs, _scored(text_only, other, None)) > 100 * ROUNDING


@pytest.mark.trap("T26")
def test_text_only_policy_reads_injected_control_tokens_as_text(text_only: Policy):
    plain = _control_tokens(text_only, "a red circle")
    assert {_control_tokens(text_only, text) for text in _injections(text_only)} == {plain}


def test_chat_template_with_a_start_token_gets_no_second_one(text_only: Policy):
    tokenizer = text_only.tokenizer
    tokenizer.bos_token = "<|user|>"
    start = ("<|user|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[start])
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    ids = text_only.encode(["a cat"]).inputs["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1


def test_text_only_policy_refuses_pictures_in_one_line(text_only: Policy):
    with pytest.raises(ModelError, match=r"pictures: found some .* text-only"):
        _sample(text_only, PICTURES)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_embedded_policy_loads_without_the_kit_and_without_extra_arguments(kit: Experiment):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = kit.config.model_settings.vlm_model
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    turns = [{"role": "user", "content": [{"type": "text", "text": f"Improve: {PROMPTS[1]}"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(written, skip_special_tokens=True).strip() == kit.policy.enhance_prompt(PROMPTS[1])


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut_off(folder: Path) -> None:
    place = folder / "model.safetensors"
    place.write_bytes(place.read_bytes()[:-1000])


def _not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _unknown_kind(folder: Path) -> None:
    place = folder / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"model_type": "no_such_model"}))


@pytest.mark.parametrize("damage", [_no_weights, _cut_off, _not_json, _unknown_kind])
def test_missing_or_damaged_file_is_one_line_that_says_what_to_do(tmp_path: Path, damage: Callable[[Path], None]):
    write_gpt2(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match="vlm_model: could not load") as error:
        load_language_model(str(tmp_path), torch.float32)
    assert "\n" not in str(error.value) and "missing or damaged" in str(error.value)


def test_file_that_lacks_a_weight_is_refused_not_filled_at_random(tmp_path: Path):
    write_gpt2(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    lost = sorted(weights)[0]
    save_file({name: value for name, value in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"vlm_model: found .* without 1 weights of its model .{lost}") as error:
        load_language_model(str(tmp_path), torch.float32)
    assert "\n" not in str(error.value)


def test_model_that_is_nowhere_is_one_line_that_names_the_offline_profile(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=r"could not load 'nobody/nothing' .*without network use profile tiny"
    ) as error:
        load_language_model("nobody/nothing", torch.float32)
    assert "\n" not in str(error.value)
