"""Every family of policies over several turns: conversations with no, one and more pictures, in one batch.

What the policy reads is checked against the family's own processor on the whole list of messages, what it samples and
scores against one forward pass of the model's own class over the conversation and the completion. With an adapter; all
weights are marked slow.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from support import family_turns
from support.broken_twins import broken_versions
from support.family_turns import (
    ASKED,
    EXACT,
    GROUPS,
    LORA,
    NAMES,
    NOTICED,
    PICTURES,
    SEEING,
    TEMPERATURE,
    Case,
    picture_tokens,
    plain_logprobs,
    settings,
    what_is_read,
)
from support.policy_forms import with_attention_dropout, with_moved_adapter

from grpo_kit.config import load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.experiment import Experiment
from grpo_kit.models import policy as policy_module
from grpo_kit.models import rows
from grpo_kit.models.conversation import Conversation, Turn, shown
from grpo_kit.models.policy import Policy, load_policy
from grpo_kit.models.prompt_format import joined
from grpo_kit.rollout import collect_rollout, score_rows
from grpo_kit.training.step import grpo_step

QWEN = ["Qwen2.5-VL", "Qwen3-VL"]
QUICK = [*QWEN, "SmolVLM", "LLaVA-OneVision", "Qwen3"]  # the others are slow where a test takes seconds for each


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each family's folder in hub form, written once."""
    place = tmp_path_factory.mktemp("families")

    @cache
    def written(name: str) -> Path:
        if NAMES[name].needs is not None:
            pytest.importorskip(NAMES[name].needs, reason=f"the processor of {name} needs {NAMES[name].needs}")
        NAMES[name].write(place / name)
        return place / name

    return written


@pytest.fixture(scope="module")
def make_case(kit: Experiment, folder: Callable[[str], Path]) -> Callable[..., Case]:
    """A family's case; one without eyes reads what is said of the pictures."""

    @cache
    def made(name: str, adapter: bool = True) -> Case:
        family = NAMES[name]
        policy = load_policy(settings(kit, folder(name), family, lora=LORA if adapter else None))
        policy.temperature = TEMPERATURE
        with_attention_dropout(with_moved_adapter(policy)).model.double().train()
        asked = shown(ASKED, "own" if family.sees else "words")
        encoded = policy.encode(asked)
        answers = ((seed, policy.sample(encoded, 2, seed=seed)) for seed in range(40))
        pictures = picture_tokens(policy)
        written = next((seed, own) for seed, own in answers if not pictures & {*own.ids.flatten().tolist()})
        return Case(family, policy, asked, *written)

    return made


of_each = pytest.mark.parametrize("name", NAMES)
of_each_that_sees = pytest.mark.parametrize("name", SEEING)
of_some = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
FORMS = [
    pytest.param(name, adapter, id=f"{name}-{form}", marks=() if adapter and name in QUICK else pytest.mark.slow)
    for name in NAMES
    for adapter, form in ((True, "adapter"), (False, "weights"))
]
of_each_form = pytest.mark.parametrize(("name", "adapter"), FORMS)


def _far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


@of_each
def test_what_is_read_is_what_the_processor_makes_of_all_messages(name: str, make_case: Callable):
    case = make_case(name)
    for one in case.asked:
        expected, own = what_is_read(case, one), case.policy.encode([one]).inputs
        assert own.keys() >= {"input_ids", "attention_mask"} and own.keys() <= expected.keys()
        for key, value in own.items():
            assert torch.equal(value, expected[key]), key


@pytest.mark.trap("T1")
@pytest.mark.trap("T8")
@pytest.mark.trap("T11")
@pytest.mark.trap("T27")
@of_each_form
def test_what_is_sampled_and_scored_is_a_plain_forward_over_the_whole_conversation(
    name: str, adapter: bool, make_case: Callable
):
    case = make_case(name, adapter)
    found, scored = case.found, case.score()
    assert scored.dtype == torch.float64
    for row, group in enumerate(GROUPS.tolist()):
        kept = found.mask[row]
        with torch.no_grad():
            plain = plain_logprobs(case, row)
        assert _far(found.logprobs[row][kept], plain) < EXACT and _far(scored[row][kept], plain) < EXACT
        if row % 2 == 0:  # both answers to a conversation, alone
            both, one = GROUPS == group, [case.asked[group]]
            alone = case.policy.sample(one, 2, seed=case.seed, first_prompt=group)
            width = alone.ids.shape[1]
            assert torch.equal(alone.ids.where(alone.mask, 0), found.ids.where(found.mask, 0)[both][:, :width])
            assert _far(alone.logprobs, found.logprobs[both][:, :width]) < EXACT


# --- pictures: their number, their order, whose they are (T27, T28) ---------------------------------------------------


def _in_order(pixels: torch.Tensor, name: str) -> torch.Tensor:
    """What stands for each picture: all of its parts, or the whole where it is cut into tiles that depend on others."""
    if name.startswith("SmolVLM"):
        parts = pixels.flatten(0, 1)
        return parts[parts.flatten(1).any(dim=1)]
    return pixels[:, 0] if name in ("LLaVA-NeXT", "LLaVA-OneVision") else pixels


@pytest.mark.trap("T28")
@of_each_that_sees
def test_pixel_rows_stand_in_the_order_of_the_pictures(name: str, make_case: Callable):
    policy = make_case(name).policy
    encoded = policy.encode(ASKED)
    tokens, counts = torch.tensor(sorted(picture_tokens(policy))), []
    for place, one in enumerate(ASKED):
        inputs = encoded.take([place]).inputs
        counts.append(int(torch.isin(inputs["input_ids"], tokens).sum()))
        assert ("pixel_values" in inputs) == bool(one.pictures)
        beside = min(len(one.pictures), 2)  # one family reads a picture in another form where it is not alone
        alone = [policy.encode([Conversation("a", (picture,) * beside)]).inputs for picture in one.pictures]
        for key in {"image_grid_thw", "image_sizes"} & inputs.keys():
            assert torch.equal(inputs[key], torch.cat([part[key][:1] for part in alone]))
        if alone:
            parts = [_in_order(part["pixel_values"], name) for part in alone]
            expected = torch.cat([part[: len(part) // beside] for part in parts])
            assert torch.equal(_in_order(inputs["pixel_values"], name), expected)
    pictures = [len(one.pictures) for one in ASKED]
    assert pictures == [0, 1, 2, 3, 2, 0] and [bool(count) for count in counts] == [bool(n) for n in pictures]


VERSIONS = {
    family_turns.without_its_pictures: "T27",
    family_turns.grey_ones: "T27",
    family_turns.without_what_it_wrote: "T27",
    family_turns.pictures_in_reverse_order: "T28",
    family_turns.pictures_of_other_rows: "T28",
}


@pytest.mark.parametrize("version", broken_versions(VERSIONS))
@of_each_that_sees
def test_scoring_behind_something_else_is_noticed_in_each_row_that_changed(
    name: str, version: Callable, make_case: Callable
):
    case = make_case(name)
    changed = version(case.asked)
    worst = (case.score(changed) - case.found.logprobs).abs().amax(dim=1).view(-1, 2).amax(dim=1)
    for one, other, far in zip(case.asked, changed, worst.tolist(), strict=True):
        assert far < EXACT if one == other else far > NOTICED


@pytest.mark.trap("T26")
@of_each
def test_a_picture_token_in_an_earlier_rewrite_or_in_words_stays_text(name: str, make_case: Callable):
    policy = make_case(name).policy
    special = [str(token) for token in policy.tokenizer.added_tokens_decoder.values()]

    def control(rewrite: str, words: str) -> int:
        ids = policy.encode([Conversation("a", (), (Turn(rewrite, None, words),))]).inputs["input_ids"]
        return int(torch.isin(ids, torch.tensor(sorted(policy.tokenizer.added_tokens_decoder))).sum())

    for token in special:
        assert control(f"a {token} b", f"{token}") == control("a b", "c"), token


# --- positions and padding (T1, T11) ----------------------------------------------------------------------------------


MOVED = broken_versions({family_turns.counting_picture_tokens: "T11", family_turns.moved_as_the_first_row: "T11"})
PADDED = broken_versions({family_turns.attending_to_padding: "T11", family_turns.counting_padding: "T11"})


@pytest.mark.parametrize(
    ("name", "version"),
    [
        pytest.param(name, *version.values, marks=version.marks, id=f"{name}-{version.id}")
        for name in NAMES
        if name != "Gemma 3 (text)"  # shares no prompts
        for version in (*PADDED, *(MOVED if name in QWEN else ()))
    ],
)
def test_mistakes_of_positions_behind_shared_conversations_are_noticed(
    name: str, version: Callable, make_case: Callable, monkeypatch: pytest.MonkeyPatch
):
    case, run_prompts = make_case(name), policy_module.run_prompts
    monkeypatch.setattr(policy_module, "run_prompts", lambda *given: version(run_prompts(*given)))
    assert _far(case.score(), case.found.logprobs) > NOTICED


@pytest.mark.trap("T11")
@pytest.mark.trap("T11", broken="padded_on_the_right")
@of_each
def test_conversations_are_padded_on_the_left(name: str, make_case: Callable):
    def is_left(mask: torch.Tensor) -> bool:
        return bool((mask[:, -1] == 1).all() and not mask.all() and (mask.diff(dim=1) >= 0).all())

    case = make_case(name)
    mask = case.policy.encode(case.asked).inputs["attention_mask"]
    assert is_left(mask) and not is_left(mask.flip(1))


@pytest.mark.trap("T11", broken="token_types_that_are_dropped")
@pytest.mark.parametrize("name", QWEN)
def test_dropped_token_types_are_noticed(name: str, make_case: Callable, monkeypatch: pytest.MonkeyPatch):
    case = make_case(name).own()
    case.policy.not_shared = "each row with a context of its own"
    assert _far(case.score(), case.found.logprobs) < EXACT
    placed = rows.placed

    def dropped(*given: object) -> dict[str, torch.Tensor]:
        return {key: value for key, value in placed(*given).items() if key != "mm_token_type_ids"}

    monkeypatch.setattr(rows, "placed", dropped)
    try:
        worst = _far(case.score(), case.found.logprobs)
    except ValueError as error:  # transformers notices it in Qwen3-VL alone
        assert name == "Qwen3-VL" and "mm_token_type_ids" in str(error)
        worst = torch.inf
    assert worst > NOTICED


# --- what gets gradient, and in how many parts (T13, T14, T29) --------------------------------------------------------


def _gradient(case: Case, parts: Iterator[torch.Tensor] | None = None, **kind: object) -> torch.Tensor:
    """The gradient of a weighted sum of the log-probabilities that every token has its own part in."""
    policy, found = case.policy, case.found
    weights = torch.randn(found.ids.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy.model.zero_grad()
    for some in parts or [torch.arange(len(GROUPS))]:
        if kind:
            for row in some.tolist():
                logprobs = plain_logprobs(case, row, **kind)
                own = weights[row][found.mask[row]]
                (logprobs * torch.cat([own.new_ones(len(logprobs) - len(own)), own])).sum().backward()
            continue
        places, local = GROUPS[some].unique(return_inverse=True)
        asked = policy.encode(case.asked).take(places.tolist())
        (policy.score(asked, local, found.ids[some], found.mask[some]).logprobs * weights[some]).sum().backward()
    given = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.trainable_parameters()]
    return torch.cat([gradient.flatten() for gradient in given])


@pytest.mark.trap("T13")
@pytest.mark.trap("T14")
@pytest.mark.trap("T29")
@pytest.mark.trap("T29", broken="context_that_counts")
@of_each_form
def test_every_way_of_scoring_gives_the_gradient_of_the_completions_alone(
    name: str, adapter: bool, make_case: Callable
):
    """Shared contexts, rows of their own, recomputed layers, micro-batches: what a plain pass a row gives."""
    case = make_case(name, adapter).own()
    order = torch.randperm(len(GROUPS), generator=torch.Generator().manual_seed(0))
    found = {"as it is": _gradient(case), "in micro-batches": _gradient(case, order.split(5))}
    reason, case.policy.not_shared = case.policy.not_shared, "to compare"
    found["in rows"] = _gradient(case)
    case.policy.not_shared, case.policy.gradient_checkpointing = reason, True
    found["computed again"] = _gradient(case)
    plain, with_context = _gradient(case, whole=False), _gradient(case, whole=True)
    size = float(plain.abs().max())
    assert size > 0 and {way: far for way, own in found.items() if (far := _far(own, plain) / size) >= EXACT} == {}
    assert _far(found["as it is"], with_context) / size > 0.01


@of_each
def test_conversations_encoded_apart_and_joined_score_as_at_once(name: str, make_case: Callable):
    case = make_case(name)
    pad = case.policy.tokenizer.pad_token_id
    parts = [case.policy.encode(some) for some in (case.asked[3:4], case.asked[:1], case.asked[1:3], case.asked[4:])]
    assert _far(case.score(joined(parts, pad).take([1, 2, 3, 0, 4, 5])), case.found.logprobs) < EXACT


# --- what is sampled (T9, T10, T12, T13) ------------------------------------------------------------------------------


@pytest.mark.trap("T9")
@pytest.mark.trap("T10")
@pytest.mark.trap("T12")
@pytest.mark.trap("T13")
@of_each
def test_later_turns_are_sampled_from_all_tokens_and_scored_through_their_end(name: str, make_case: Callable):
    case, found = make_case(name).own(), make_case(name).found
    case.policy.model.generation_config.update(do_sample=True, top_k=3, top_p=0.5, repetition_penalty=1.3)
    again = case.policy.sample(case.asked, 2, seed=case.seed)
    assert torch.equal(again.ids, found.ids) and torch.equal(again.logprobs, found.logprobs)
    assert case.policy.model.training and torch.equal(case.score(), case.score())
    garbage = dataclasses.replace(case, found=dataclasses.replace(found, ids=found.ids.where(found.mask, 7)))
    assert torch.equal(garbage.score(), case.score())
    ids = case.policy.tokenizer(found.texts, add_special_tokens=False).input_ids
    pad, width = case.policy.tokenizer.pad_token_id, found.ids.shape[1]
    ids = torch.tensor([(one + [pad] * width)[:width] for one in ids])
    retokenised = dataclasses.replace(case, found=dataclasses.replace(found, ids=ids))
    assert _far(retokenised.score(), found.logprobs) > NOTICED


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.trap("T1")
@of_some
def test_two_turns_are_collected_trained_saved_and_loaded_again(
    name: str, folder: Callable, kit: Experiment, tmp_path: Path
):
    family = NAMES[name]
    config = settings(kit, folder(name), family)
    step = {"beta": 0.1, "micro_batch_size": 5, "updates_per_rollout": 1}
    config = load_config(config, {f"training_settings.{key}": value for key, value in step.items()})
    policy = load_policy(config)
    policy.model.train()
    looks = {"turns": 2, "look_at": "own" if family.sees else "words", "use_image": family.sees}
    with kit.generator.steps(1):
        rollout = collect_rollout(policy, kit.generator, kit.rewards, kit.train_prompts[:2], 3, 0, **looks)
    pictures = [len(one.pictures) for one in rollout.contexts]
    assert pictures == [n + family.sees for n in ([0, 1, 1, 1] * 2 if family.sees else [0] * 8)]
    stats = grpo_step(policy, torch.optim.AdamW(policy.trainable_parameters(), lr=1e-2), rollout, config)
    assert stats.metrics["sampling/sampling_logp_difference/max"] < 2e-5 and stats.metrics["grad_norm"] > 0
    policy.save_pretrained(tmp_path)
    loaded, every = load_policy(config, tmp_path), torch.arange(len(rollout.group_ids))
    with torch.no_grad():
        trained, again = (score_rows(one, rollout, every).logprobs for one in (policy, loaded))
    assert torch.equal(trained, again) and _far(trained, rollout.old_logprobs) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen2.5-VL", "SmolVLM", "LLaVA-OneVision", "Qwen3"])
def test_static_decoding_of_conversations_gives_the_same_answers(name: str, make_case: Callable):
    case = make_case(name).own()
    case.policy.decoding = "static"
    found = case.policy.sample(case.asked, 2, seed=case.seed)
    assert torch.equal(found.ids, case.found.ids) and _far(found.logprobs, case.found.logprobs) < EXACT


# --- what a family cannot do is one line ------------------------------------------------------------------------------


def _fails(policy: Policy, one: Conversation) -> str:
    with pytest.raises(ModelError) as error:
        policy.encode([one])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SEEING])
def test_a_family_without_eyes_is_told_to_look_at_words(name: str, make_case: Callable):
    assert "text-only" in _fails(make_case(name).policy, ASKED[1])


def test_a_template_that_leaves_out_a_turn_is_refused_though_the_same_words_stand_elsewhere(make_case: Callable):
    policy = make_case("LLaVA-NeXT").own().policy
    assistant = "{% elif message.role == 'assistant' %}"
    assert assistant in policy.processor.chat_template
    policy.processor.chat_template = policy.processor.chat_template.replace(assistant, "{% elif false %}")
    said = _fails(policy, Conversation("a cat", (), (Turn("a cat"),)))
    assert "leaves out" in said and "turns: 1" in said


def test_a_template_that_leaves_out_later_pictures_or_refuses_later_turns_is_refused(make_case: Callable):
    policy = make_case("SmolVLM").own().policy
    whole = policy.processor.chat_template
    policy.processor.chat_template = whole.replace("line['type'] == 'image'", "line['type'] == 'image' and loop.first")
    two_pictures = Conversation("a cat", (PICTURES[0], PICTURES[1]))
    assert "leaves out a picture of turn 1" in _fails(policy, two_pictures)
    refusing = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
    policy.processor.chat_template = refusing + whole
    assert policy.encode(["a cat"]) and "one turn only" in _fails(policy, ASKED[1])


def test_a_processor_that_takes_one_picture_is_one_line(make_case: Callable):
    policy = make_case("LLaVA 1.5").own().policy
    processor = policy.processor

    class OnePicture:
        def __getattr__(self, name: str) -> object:
            return getattr(processor, name)

        def __call__(self, images: list | None = None, **options: object) -> object:
            if images and max(map(len, images)) > 1:
                raise ValueError("one picture a prompt,\nplease")
            return processor(images=images, **options)

    policy.processor = OnePicture()
    assert policy.encode(ASKED[1:2])
    said = _fails(policy, ASKED[2])
    assert "several pictures in one conversation (one picture a prompt, please)" in said and "look_at: words" in said


# --- the budget of pixels ---------------------------------------------------------------------------------------------

FIXED = {"SmolVLM", "SmolVLM 2", "LLaVA 1.5"}  # their processors bring every picture to one size


@of_each_that_sees
def test_a_big_picture_takes_fewer_tokens_within_a_budget_of_pixels(name: str, make_case: Callable):
    policy, big = make_case(name).own().policy, Conversation("a", (PICTURES[2].resize((400, 400)),))
    tokens, counts = torch.tensor(sorted(picture_tokens(policy))), []
    for policy.max_pixels in (None, 1024):
        counts.append(int(torch.isin(policy.encode([big]).inputs["input_ids"], tokens).sum()))
    assert counts[1] == counts[0] if name in FIXED else counts[1] < counts[0]
