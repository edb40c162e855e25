"""Every family of policies that users have: load → enhance → rollout → step → save → reload, and CORRECTNESS.md T1 and
T8 to T13, with and without a picture in the prompt.

The short form takes each family once, with a picture where it sees, and an adapter; the rest is marked slow.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import families
from support.broken_twins import broken_versions
from support.families import FAMILIES, Family
from support.policy_forms import with_attention_dropout, with_moved_adapter
from torch.utils.checkpoint import CheckpointError
from transformers import MambaConfig, MambaForCausalLM

from grpo_kit.config import Config, load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.experiment import Experiment
from grpo_kit.models import policy as policy_module
from grpo_kit.models import rows
from grpo_kit.models.conversation import Conversation
from grpo_kit.models.policy import Completions, Policy, Scores, load_policy
from grpo_kit.models.rows import evaluating
from grpo_kit.rollout import Rollout, collect_rollout, score_rows
from grpo_kit.shapeworld.render import render
from grpo_kit.shapeworld.scene import random_scenes
from grpo_kit.training.step import grpo_step

PROMPTS = ["a red circle", "three tiny golden pyramids, over on the left side, at night", "a rosy plus above a box"]
PICTURES = [render(scene).resize(size) for scene, size in zip(random_scenes(3, 0), [(32, 32), (64, 32), (64, 64)])]  # noqa: B905
GROUPS = torch.tensor([0, 0, 1, 1, 2, 2])
EXACT = 1e-6  # in double precision, in which models still normalise in float32
NOTICED = 1e-4
NAMES = {family.name: family for family in FAMILIES}
LORA = {"r": 2, "alpha": 4, "dropout": 0.1}  # target_modules left to the kit
STEP = {"beta": 0.1, "micro_batch_size": 3, "updates_per_rollout": 1}
SYSTEM = "You write prompts for pictures."


@dataclasses.dataclass(frozen=True)
class Case:
    """A family's policy in double precision and training mode, with dropout, and two rewrites of each prompt."""

    policy: Policy
    images: list[Image.Image] | None
    seed: int  # of the rewrites: one where no token of pictures was written, which transformers would look for
    found: Completions

    def own(self) -> "Case":
        """With a policy that may be changed."""
        return dataclasses.replace(self, policy=copy.deepcopy(self.policy))

    def sample(self) -> Completions:
        return self.policy.sample(PROMPTS, 2, seed=self.seed, images=self.images)

    def score(self, ids: torch.Tensor | None = None) -> Scores:
        ids = self.found.ids if ids is None else ids
        return self.policy.score(PROMPTS, GROUPS, ids, self.found.mask, images=self.images)


def _settings(kit: Experiment, folder: Path, family: Family, **changed: object) -> Config:
    settings = {"vlm_model": str(folder), "instruction": "Rewrite this request: {prompt}", "lora": LORA}
    settings |= {"system_prompt": SYSTEM if family.system else "", "dtype": "float32"}
    overrides = {f"model_settings.{key}": value for key, value in (settings | changed).items()}
    return load_config(kit.config, overrides | {"generation_settings.max_new_tokens": 10})


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    """Each family's folder in hub form, written once."""
    place = tmp_path_factory.mktemp("families")

    @cache
    def written(family: Family) -> Path:
        if family.needs is not None:
            pytest.importorskip(family.needs, reason=f"the processor of {family.name} needs {family.needs}")
        family.write(place / family.name)
        return place / family.name

    return written


@pytest.fixture(scope="session")
def make_case(kit: Experiment, folder: Callable[[Family], Path]) -> Callable[[str, bool, bool], Case]:
    """A family's case: with a picture or without, with an adapter or all weights."""

    @cache
    def made(name: str, with_picture: bool, adapter: bool) -> Case:
        family = NAMES[name]
        policy = load_policy(_settings(kit, folder(family), family, lora=LORA if adapter else None))
        policy.temperature = 0.8
        with_attention_dropout(with_moved_adapter(policy)).model.double().train()
        images = PICTURES if with_picture else None
        written = ((seed, policy.sample(PROMPTS, 2, seed=seed, images=images)) for seed in range(20))
        pictures = _picture_tokens(policy)
        return Case(
            policy,
            images,
            *next((seed, found) for seed, found in written if not pictures & {*found.ids.flatten().tolist()}),
        )

    return made


def _picture_tokens(policy: Policy) -> set[int]:
    """The ids that stand for pictures and videos, by whichever name a config has them."""
    config = policy.model.config
    names = (f"{kind}_token_{end}" for kind in ("image", "video") for end in ("id", "index"))
    return {getattr(config, name) for name in names if getattr(config, name, None) is not None}


def _cases() -> list:
    def one(family: Family, picture: bool, adapter: bool) -> object:
        name = f"{family.name}-{'picture' if picture else 'words'}-{'adapter' if adapter else 'weights'}"
        other = (picture != family.sees) + (not adapter)  # two of these together only in the longest
        marks = [(), pytest.mark.slow, (pytest.mark.slow, pytest.mark.long)][other]
        return pytest.param((family.name, picture, adapter), id=name, marks=marks)

    return [one(f, picture, adapter) for f in FAMILIES for picture in f.views for adapter in (True, False)]


@pytest.fixture(params=_cases())
def case(request: pytest.FixtureRequest, make_case: Callable[[str, bool, bool], Case]) -> Case:
    """Each family, with and without a picture, with an adapter and with all weights; do not change its policy."""
    return make_case(*request.param)


of_each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def _scores(policy: Policy, rollout: Rollout, **options: bool) -> Scores:
    return score_rows(policy, rollout, torch.arange(len(rollout.group_ids)), **options)


def _far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


# --- the whole way ----------------------------------------------------------------------------------------------------


TRAPS = [pytest.mark.trap("T1"), pytest.mark.trap("T13")]  # weights in 8 bits need a library that is optional
FORMS = [pytest.param("adapter", marks=TRAPS), "8 bits", pytest.param("weights", marks=[*TRAPS, pytest.mark.slow])]


@pytest.mark.parametrize("form", FORMS)
@of_each_family
def test_policy_is_loaded_trained_saved_and_loaded_again(
    family: Family, form: str, folder: Callable, kit: Experiment, tmp_path: Path
):
    """With an adapter, with one above weights in 8 bits, with all weights."""
    if form == "8 bits":
        pytest.importorskip("torchao", reason="needs torchao: pip install 'torchao>=0.18'")
        if family.write in (families.gpt2, families.dialogpt):
            pytest.skip("its layers are Conv1D, and refused: test_eight_bits.py")
    own = {"lora": None if form == "weights" else LORA, "base_8bit": form == "8 bits"}
    config = _settings(kit, folder(family), family, **own, use_image=family.sees)
    config = load_config(config, {f"training_settings.{key}": value for key, value in STEP.items()})
    policy = load_policy(config)
    policy.model.train()
    assert policy.enhance_prompt("a red circle")
    rollout = collect_rollout(
        policy, kit.generator, kit.rewards, kit.train_prompts[:2], 3, seed=0, use_image=family.sees
    )
    before = _scores(policy, rollout, reference=True).logprobs.detach()
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-2)
    stats = grpo_step(policy, optimizer, rollout, config)
    assert stats.metrics["sampling/sampling_logp_difference/max"] < 2e-5 and stats.metrics["kl"] < 1e-6
    assert stats.metrics["clip_ratio/region_mean"] == 0 and stats.metrics["grad_norm"] > 0 and stats.updates == 1
    policy.save_pretrained(tmp_path)
    loaded = load_policy(config, tmp_path)
    with torch.no_grad():
        trained = _scores(policy, rollout).logprobs
        assert torch.equal(_scores(loaded, rollout).logprobs, trained)
        for policy_again in (policy, loaded):  # the reference is what was loaded, whatever was trained
            assert torch.equal(_scores(policy_again, rollout, reference=True).logprobs, before)
    assert _far(trained, before) > 1e-3
    assert loaded.trainable_state().keys() == policy.trainable_state().keys()


# --- what is sampled is what is scored (T1, T8, T11) ------------------------------------------------------------------


@torch.no_grad()
def _plain(case: Case, row: int) -> torch.Tensor:
    """A row's log-probabilities by one forward of transformers over the row alone: unpadded, no positions given."""
    policy, ids, group = case.policy, case.found.ids[row][case.found.mask[row]], int(GROUPS[row])
    inputs = policy.encode([PROMPTS[group]], None if case.images is None else [case.images[group]]).inputs
    start = inputs["input_ids"].shape[1]
    for name, added in (("input_ids", ids), ("attention_mask", torch.ones_like(ids)), ("mm_token_type_ids", 0 * ids)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], added[None]], dim=1)
    with evaluating(policy.model):
        logits = policy.model(**inputs, use_cache=False).logits[0, start - 1 : -1]
    return (logits / policy.temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def _worst_difference_from_a_plain_forward(case: Case) -> float:
    """How far what a policy samples, or scores, is from what transformers says of each row alone."""
    found = case.sample()
    assert torch.equal(found.ids, case.found.ids)
    scored = case.score().logprobs
    plain = [(_plain(case, row), found.mask[row]) for row in range(len(GROUPS))]
    return max(
        _far(values[row][kept], own) for values in (found.logprobs, scored) for row, (own, kept) in enumerate(plain)
    )


@pytest.mark.trap("T1")
@pytest.mark.trap("T8")
@pytest.mark.trap("T11")
def test_what_is_sampled_and_scored_is_a_plain_forward_over_each_row_alone(case: Case):
    assert _worst_difference_from_a_plain_forward(case) < EXACT


# --- prompts run once, rows of their own, layers computed again: one gradient -----------------------------------------


def _gradient(policy: Policy, case: Case, scored: Callable[[], Scores]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and the gradient of a weighted sum of them that every token has its own part in."""
    policy.model.zero_grad()
    logprobs = scored().logprobs
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0), dtype=logprobs.dtype)
    (logprobs * weights).sum().backward()  # after scoring, when the model is in training mode again
    given = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.trainable_parameters()]
    return logprobs.detach(), torch.cat([gradient.flatten() for gradient in given])


def _ways(case: Case) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Scores and gradients by each of the three ways that a policy may score in."""
    policy, reason = case.policy, case.policy.not_shared
    policy.not_shared = reason or "to compare"
    found = {"in rows": _gradient(policy, case, case.score)}
    policy.not_shared = reason
    if reason is None:
        found["shared"] = _gradient(policy, case, case.score)
    policy.gradient_checkpointing = True
    found["computed again"] = _gradient(policy, case, case.score)
    policy.gradient_checkpointing = False
    return found


def _worst_difference_of_ways(case: Case) -> float:
    """How far any two of them are apart, gradients in units of the largest."""
    case, (plain, *others) = (own := case.own()), _ways(own).values()
    assert float(plain[1].abs().max()) > 0 and others
    size = float(plain[1].abs().max())
    return max(max(_far(a, plain[0]), _far(g, plain[1]) / size) for a, g in others)


@pytest.mark.trap("T13")
def test_shared_prompts_and_recomputed_layers_give_the_plain_scores_and_gradients(case: Case):
    assert _worst_difference_of_ways(case) < EXACT


def attending_to_padding(prefix: object) -> object:
    return dataclasses.replace(prefix, mask=torch.ones_like(prefix.mask))


def counting_padding(prefix: object) -> object:
    return dataclasses.replace(prefix, next_position=torch.full_like(prefix.next_position, prefix.mask.shape[1]))


ALONE = {"Gemma 3 (text)": "DynamicSlidingWindowLayer"}
SHARING = [name for name in NAMES if name not in ALONE]


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("mutant", broken_versions({attending_to_padding: "T11", counting_padding: "T11"}))
def test_padding_mistakes_behind_shared_prompts_are_noticed(
    name: str, make_case: Callable, mutant: Callable, monkeypatch: pytest.MonkeyPatch
):
    case = make_case(name, NAMES[name].sees, True)
    run_prompts = policy_module.run_prompts
    monkeypatch.setattr(policy_module, "run_prompts", lambda *given: mutant(run_prompts(*given)))
    assert _far(case.score().logprobs, case.found.logprobs) > NOTICED


@contextmanager
def dropout_in_the_repetition(layer: torch.nn.Module) -> Iterator[None]:
    yield


@pytest.mark.parametrize("mutant", broken_versions({dropout_in_the_repetition: "T13"}))
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("name", ["Qwen3", "SmolVLM"])
def test_dropout_in_recomputed_layers_is_noticed(
    name: str, adapter: bool, make_case: Callable, mutant: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rows, "evaluating", mutant)
    try:
        worst = _worst_difference_of_ways(make_case(name, NAMES[name].sees, adapter))
    except CheckpointError:  # torch itself notices dropout that is a layer of its own
        worst = torch.inf
    assert worst > NOTICED


def test_recomputed_layers_keep_less(make_case: Callable):
    case, kept = make_case("Qwen3", False, True).own(), {}

    @contextmanager
    def counting(name: str) -> Iterator[None]:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        kept[name] = sum(sizes.values())

    for name, case.policy.gradient_checkpointing in (("kept", False), ("again", True)):
        case.policy.not_shared = "as in rows"
        with counting(name):
            case.score()
    assert kept["again"] < 0.8 * kept["kept"]


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3-VL"])
def test_the_setting_recomputes_and_a_step_comes_out_the_same(name: str, kit: Experiment, folder: Callable):
    family, after = NAMES[name], []
    for again in (True, False):
        config = _settings(kit, folder(family), family, use_image=family.sees, gradient_checkpointing=again)
        policy = load_policy(config)
        assert policy.gradient_checkpointing is again
        rollout = collect_rollout(
            policy, kit.generator, kit.rewards, kit.train_prompts[:1], 3, seed=0, use_image=family.sees
        )
        grpo_step(policy, torch.optim.SGD(policy.trainable_parameters(), lr=1.0), rollout, config)
        after.append(torch.cat([value.flatten() for value in policy.trainable_state().values()]))
    assert _far(*after) < 1e-5 and after[0].any()


def test_layers_run_as_before_once_recomputing_is_over(case: Case):
    layers = rows.recomputable_layers(case.policy.model)
    with rows.recomputing(case.policy.model):
        assert all("forward" in vars(layer) for layer in layers)
    assert layers and not any("forward" in vars(layer) for layer in layers)


def test_a_model_without_a_cache_is_refused_in_one_line(make_case: Callable):
    policy = make_case("Qwen3", False, True).own().policy
    policy.model = MambaForCausalLM(MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1)).eval()
    with pytest.raises(ModelError, match="MambaForCausalLM, which gives no cache to go on from") as error:
        policy.sample(PROMPTS, 2, seed=0)
    assert "\n" not in str(error.value)


def test_a_model_without_recomputable_layers_is_refused_in_one_line(make_case: Callable):
    with pytest.raises(ModelError, match="gradient_checkpointing: found true, but this model has no layers"):
        rows.recomputable_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ALONE)
def test_a_model_that_cannot_share_says_why(name: str, kit: Experiment, folder: Callable, caplog: object):
    policy = load_policy(_settings(kit, folder(NAMES[name]), NAMES[name]))
    assert ALONE[name] in policy.not_shared
    assert "run once for each completion, not once for a group: some of its layers keep less" in caplog.text


def test_attention_that_takes_no_mask_of_pairs_is_not_shared(make_case: Callable):
    policy = make_case("Qwen3", False, True).own().policy
    assert policy.not_shared is None
    policy.model.config._attn_implementation = "flash_attention_2"
    assert "takes no mask of pairs" in policy_module.reason_not_to_share(policy.model)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.sees])
def test_a_written_picture_token_is_text_in_every_way_of_scoring(name: str, make_case: Callable):
    case = make_case(name, True, True)
    ids = case.found.ids.clone()
    ids[:, 0] = max(_picture_tokens(case.policy))
    mask = case.found.mask | (torch.arange(ids.shape[1]) < 3)
    one = dataclasses.replace(case, found=dataclasses.replace(case.found, ids=ids, mask=mask))
    assert _worst_difference_of_ways(one) < EXACT


# --- what is sampled (T9, T10, T12, T13) ------------------------------------------------------------------------------


@pytest.mark.trap("T9")
def test_a_generation_config_that_truncates_changes_no_sample(case: Case):
    case = case.own()
    case.policy.model.generation_config.update(do_sample=True, top_k=3, top_p=0.5, repetition_penalty=1.3)
    found = case.sample()
    assert torch.equal(found.ids, case.found.ids) and torch.equal(found.logprobs, case.found.logprobs)


@pytest.mark.trap("T10")
def test_completions_end_with_the_first_of_several_stop_tokens_and_nothing_after_it_counts(case: Case):
    ends, found = torch.tensor(case.policy.eos_token_ids), case.found
    assert len(ends) > 20 and case.policy.tokenizer.eos_token_id in ends
    lengths = found.mask.sum(dim=1)
    assert lengths.min() < lengths.max()
    for ids, mask in zip(found.ids, found.mask, strict=True):
        assert not torch.isin(ids[mask][:-1], ends).any() and (torch.isin(ids[mask][-1], ends) or mask.sum() == 10)
    garbage = found.ids.where(found.mask, 7)
    assert torch.equal(case.score(garbage).logprobs, case.score().logprobs)


@pytest.mark.trap("T12")
def test_ids_are_scored_as_sampled_though_their_text_is_tokenised_otherwise(case: Case):
    tokenizer, found = case.policy.tokenizer, case.found
    sampled = [row[kept].tolist() for row, kept in zip(found.ids, found.mask, strict=True)]
    again = tokenizer(found.texts, add_special_tokens=False).input_ids
    assert again != sampled
    width = found.ids.shape[1]
    retokenised = torch.tensor([(ids + [tokenizer.pad_token_id] * width)[:width] for ids in again])
    assert _far(case.score().logprobs, found.logprobs) < EXACT
    assert _far(case.score(retokenised).logprobs, found.logprobs) > NOTICED


@pytest.mark.trap("T13")
def test_two_scorings_in_training_mode_agree_though_the_model_has_dropout(case: Case):
    assert case.policy.model.training
    assert torch.equal(case.score().logprobs, case.score().logprobs) and case.policy.model.training
    inputs = case.policy.encode(PROMPTS, case.images).inputs
    with torch.no_grad():
        assert not torch.equal(*(case.policy.model(**inputs).logits for _ in range(2)))


@pytest.mark.trap("T11")
@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.sees])
def test_pictures_stay_with_their_rows_when_prompts_are_shuffled(name: str, make_case: Callable):
    case, order = make_case(name, True, True), [2, 0, 1]
    place = torch.tensor([order.index(group) for group in GROUPS.tolist()])

    def shuffled(pictures: list[Image.Image]) -> torch.Tensor:
        prompts = [PROMPTS[i] for i in order]
        return case.policy.score(prompts, place, case.found.ids, case.found.mask, images=pictures).logprobs

    assert _far(shuffled([PICTURES[i] for i in order]), case.found.logprobs) < EXACT
    assert _far(shuffled(PICTURES), case.found.logprobs) > NOTICED


# --- what the model reads ---------------------------------------------------------------------------------------------


@of_each_family
def test_prompts_are_read_as_the_processors_own_template_reads_them(family: Family, make_case: Callable):
    policy = make_case(family.name, family.sees, True).policy
    if not policy.chats:
        assert policy.format_prompt("a cat") == f"{SYSTEM}\nRewrite this request: a cat"
        return
    turns = [("system", SYSTEM, None)] if family.system else []
    turns.append(("user", "Rewrite this request: a cat", PICTURES[1] if family.sees else None))
    conversation = [{"role": role, "content": _content(text, picture, family)} for role, text, picture in turns]
    options = {"enable_thinking": False} if family.name == "Qwen3" else {}
    expected = policy.processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    read = policy.encode(["a cat"], PICTURES[1:2] if family.sees else None).inputs
    assert torch.equal(read["input_ids"], expected["input_ids"])
    for name in read.keys() & expected.keys():
        assert torch.equal(read[name], expected[name]), name


def _content(text: str, picture: Image.Image | None, family: Family) -> str | list[dict]:
    seen = [] if picture is None else [{"type": "image", "image": picture}]
    return [*seen, {"type": "text", "text": text}] if family.sees else text


@of_each_family
def test_prompts_are_padded_on_the_left(family: Family, make_case: Callable):
    case = make_case(family.name, family.sees, True)
    mask = case.policy.encode(PROMPTS, case.images).inputs["attention_mask"]
    assert (mask[:, -1] == 1).all() and not mask.all() and (mask.diff(dim=1) >= 0).all()


@pytest.mark.trap("T26")
@of_each_family
def test_special_tokens_in_a_users_text_stay_ordinary_text(family: Family, make_case: Callable):
    case = make_case(family.name, family.sees, True)
    added = torch.tensor(sorted(case.policy.tokenizer.added_tokens_decoder))
    images = None if case.images is None else case.images[:1]

    def control(text: str) -> int:
        return int(torch.isin(case.policy.encode([text], images).inputs["input_ids"], added).sum())

    tokens = [str(token) for token in case.policy.tokenizer.added_tokens_decoder.values()]
    plain = control("a red circle")
    for text in [f"a {token} circle" for token in tokens] + ["".join(tokens), f"{tokens[0]}{tokens[0]}<image>"]:
        assert control(text) == plain, text


def test_a_template_that_refuses_or_drops_a_turn_is_one_line_that_says_what_to_do(make_case: Callable):
    refusing = make_case("Gemma 3 (text)", False, True).own().policy
    refusing.system_prompt = SYSTEM
    dropping = make_case("LLaVA 1.5", True, True).own().policy
    dropping.processor.chat_template = families.LLAVA.replace("messages %}", "messages if message.role == 'user' %}", 1)
    for policy, what in ((refusing, "refuses the turns"), (dropping, f"leaves out '{SYSTEM[:20]}")):
        with pytest.raises(ModelError, match=f"chat template does not fit: it {what}.*system_prompt") as error:
            policy.format_prompt("a cat")
        assert "\n" not in str(error.value)


def test_thinking_is_off_unless_the_settings_say_otherwise(kit: Experiment, folder: Callable):
    quiet = load_policy(_settings(kit, folder(NAMES["Qwen3"]), NAMES["Qwen3"]))
    assert quiet.format_prompt("a cat").endswith("<think>\n\n</think>\n\n")
    loud = _settings(kit, folder(NAMES["Qwen3"]), NAMES["Qwen3"], chat_template_kwargs={"enable_thinking": True})
    assert load_policy(loud).format_prompt("a cat").endswith("assistant\n")


def test_a_model_that_sees_but_has_no_template_still_gets_its_picture(make_case: Callable):
    case = make_case("LLaVA 1.5", True, True).own()
    case.policy.processor.chat_template = None
    assert case.policy.format_prompt(Conversation("a cat", (case.images[0],))).startswith("<image>\n")
    assert case.sample().texts


def test_a_prompt_that_leaves_no_positions_is_one_line_where_positions_are_learned(make_case: Callable):
    learned, computed = (make_case(name, False, True).policy for name in ("GPT-2", "Llama 3"))
    room = families.LONGEST - learned.max_new_tokens
    longest = next(n for n in range(room) if learned.encode(["a " * (n + 1)]).inputs["input_ids"].shape[1] > room)
    assert learned.sample(["a " * longest], 1, seed=0).texts
    with pytest.raises(ModelError, match=f"user_prompt: found {room + 1} tokens .*shorten") as error:
        learned.sample(["a " * (longest + 1)], 1, seed=0)
    assert "\n" not in str(error.value) and computed.sample(["a " * families.LONGEST], 1, seed=0).texts


# --- adapters ---------------------------------------------------------------------------------------------------------


@of_each_family
def test_an_adapter_goes_on_the_linear_layers_of_the_language_model_alone(family: Family, make_case: Callable):
    model = make_case(family.name, family.sees, True).policy.model
    base = model.get_base_model()
    decoder = {name for name, module in base.named_modules() if module is base.get_decoder()}.pop()
    adapted = {name for name, module in base.named_modules() if hasattr(module, "lora_A")}
    per_layer = 4 if "GPT" in family.name else 7
    assert len(adapted) == 2 * per_layer and all(name.startswith(f"{decoder}.") for name in adapted)


@of_each_family
def test_every_adapter_weight_gets_a_gradient(family: Family, make_case: Callable):
    case = make_case(family.name, family.sees, True).own()
    case.score().logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in case.policy.trainable_parameters())


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.trap("T1")
@of_each_family
def test_in_bfloat16_sampled_and_scored_agree_within_its_rounding(family: Family, kit: Experiment, folder: Callable):
    policy = load_policy(_settings(kit, folder(family), family, dtype="bfloat16"))
    assert policy.model.dtype == torch.bfloat16
    images = PICTURES if family.sees else None
    found = policy.sample(PROMPTS, 2, seed=1, images=images)
    with torch.no_grad():
        scored = policy.score(PROMPTS, GROUPS, found.ids, found.mask, images=images).logprobs
    assert _far(found.logprobs, scored) < 0.15
    other = found.ids.roll(1, dims=0)
    with torch.no_grad():
        assert _far(found.logprobs, policy.score(PROMPTS, GROUPS, other, found.mask, images=images).logprobs) > 1


# --- prompts that are encoded once ------------------------------------------------------------------------------------


@of_each_family
def test_some_of_the_encoded_prompts_are_what_encoding_them_alone_gives(family: Family, make_case: Callable):
    case = make_case(family.name, family.sees, False)
    encoded = case.policy.encode(PROMPTS, case.images)
    for places in ([1], [2, 0], [0, 0, 2, 1]):
        alone = case.policy.encode([PROMPTS[i] for i in places], case.images and [case.images[i] for i in places])
        taken = encoded.take(places)
        assert taken.inputs.keys() == alone.inputs.keys() and taken.rows == alone.rows
        for name, value in alone.inputs.items():
            found = taken.inputs[name]  # where pictures are cut into tiles, those of the largest are room for all
            if name in ("pixel_values", "pixel_attention_mask") and found.shape != value.shape:
                assert not found[:, value.shape[1] :].any()
                found = found[:, : value.shape[1]]
            assert torch.equal(found, value), name


@of_each_family
def test_prompts_scored_alone_or_out_of_more_get_the_same_scores(family: Family, make_case: Callable):
    case = make_case(family.name, family.sees, False)
    encoded = case.policy.encode(PROMPTS, case.images)
    rows = (GROUPS == 1).nonzero().flatten()
    columns = torch.zeros(len(rows), dtype=torch.long), case.found.ids[rows], case.found.mask[rows]
    with torch.no_grad():
        alone = case.policy.score(PROMPTS[1:2], *columns, images=case.images and case.images[1:2]).logprobs
        taken = case.policy.score(encoded.take([1]), *columns).logprobs
        other = case.policy.score(encoded.take([0]), *columns).logprobs
    assert _far(taken, alone) < EXACT and _far(other, alone) > NOTICED
