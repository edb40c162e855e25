"""Completions that go on from a prompt which was run once: laid out behind it, and sampled token by token."""

from collections.abc import Callable

import pytest
import torch
from PIL import Image

from grpo_kit.experiment import Experiment
from grpo_kit.models import policy as policy_module
from grpo_kit.models.decoding import decode
from grpo_kit.models.policy import Policy
from grpo_kit.models.shared_prefix import Packing, run_prompts

PROMPTS = ["a crimson ball", "two green squares, at night", "a star"]
PICTURES = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
GROUPS = torch.tensor([2, 0, 0, 2, 1, 0])  # not in order, and not equally many
LENGTHS = torch.tensor([4, 1, 3, 2, 5, 2])
MASK = torch.arange(5) < LENGTHS[:, None]
IDS = torch.randint(10, 100, MASK.shape, generator=torch.Generator().manual_seed(0))
seeing = pytest.mark.parametrize("images", [None, PICTURES], ids=["words", "pictures"])


# --- the layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_token_but_the_last_of_each_completion_has_a_place_of_its_own(lanes: int):
    packing = Packing.of(MASK, GROUPS, 3, lanes)
    assert len(packing.rows) == int((LENGTHS - 1).sum())
    assert len(set(zip(*(index.tolist() for index in packing.place), strict=True))) == len(packing.rows)
    assert torch.equal(packing.place[0] // lanes, GROUPS[packing.rows])
    assert len({(int(row), int(lane)) for row, lane in zip(packing.rows, packing.place[0], strict=True)}) == 5


def test_completions_take_turns_in_the_lanes_of_their_prompt():
    assert Packing.of(MASK, GROUPS, 3).shape == (3, 4)  # prompt 0: 0 + 2 + 1 tokens, prompt 1: 4, prompt 2: 3 + 1
    assert Packing.of(MASK, GROUPS, 3, lanes=2).shape == (6, 4)  # prompt 0: 0 + 1 and 2
    assert Packing.of(MASK, GROUPS, 3, lanes=3).place[0].unique().tolist() == [1, 2, 3, 6, 7]


@pytest.mark.parametrize("lanes", [1, 3])
def test_what_is_laid_out_comes_back_in_its_row_one_token_on(lanes: int):
    packing = Packing.of(MASK, GROUPS, 3, lanes)
    back = packing.take_out(packing.lay_out(IDS[packing.rows, packing.steps]), MASK)
    assert torch.equal(back[MASK[:, 1:]], IDS[:, :-1][MASK[:, 1:]]) and not back[~MASK[:, 1:]].any()


def test_a_token_sees_its_own_completion_up_to_itself():
    packing = Packing.of(MASK, GROUPS, 3)
    sees, owner, steps = packing.sees(), packing.lay_out(packing.rows, fill=-1), packing.lay_out(packing.steps)
    for prompt in range(3):
        for here in range(4):
            expected = {
                there
                for there in range(4)
                if owner[prompt, here] >= 0
                and owner[prompt, there] == owner[prompt, here]
                and steps[prompt, there] <= steps[prompt, here]
            }
            assert set(sees[prompt, here].nonzero().flatten().tolist()) == expected


def test_completions_of_one_token_have_nothing_to_lay_out(kit: Experiment):
    ids, mask = IDS[:, :1], torch.ones(6, 1, dtype=torch.bool)
    with torch.no_grad():
        alone = kit.policy.score(PROMPTS, GROUPS, ids, mask).logprobs
        longer = kit.policy.score(PROMPTS, GROUPS, IDS, MASK).logprobs
    torch.testing.assert_close(alone[:, 0], longer[:, 0], rtol=0, atol=1e-5)


# --- siblings in one row ----------------------------------------------------------------------------------------------


@seeing
def test_lanes_change_neither_scores_nor_gradients(
    own_policy: Policy, images: list | None, monkeypatch: pytest.MonkeyPatch
):
    found = []
    for lanes in (1, 2, 3):
        monkeypatch.setattr(policy_module, "_lanes", lambda *_, lanes=lanes: lanes)
        own_policy.model.zero_grad()
        scores = own_policy.score(PROMPTS, GROUPS, IDS, MASK, images=images)
        (scores.logprobs * IDS).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in own_policy.trainable_parameters() if p.grad is not None])
        found.append((scores.logprobs.detach(), gradient))
    for logprobs, gradient in found[1:]:
        torch.testing.assert_close(logprobs, found[0][0], rtol=0, atol=5e-5)
        assert float((gradient - found[0][1]).norm() / found[0][1].norm()) < 1e-5


def _influence_of_a_sibling(policy: Policy, images: list | None) -> float:
    """How far a completion's log-probabilities move when another completion of its prompt is replaced."""
    other = IDS.clone()
    other[2] = 7
    with torch.no_grad():
        one, two = (policy.score(PROMPTS, GROUPS, ids, MASK, images=images).logprobs for ids in (IDS, other))
    rest = torch.arange(6) != 2
    return float((one - two)[rest].abs().max())


def sees_its_siblings(packing: Packing) -> torch.Tensor:
    """Causal within the row of a prompt, whoever wrote the tokens."""
    return torch.ones(packing.shape[1], packing.shape[1], dtype=torch.bool).tril().expand(packing.shape[0], -1, -1)


@pytest.fixture
def one_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """All completions of a prompt in one row."""
    monkeypatch.setattr(policy_module, "_lanes", lambda *_: 1)


@seeing
@pytest.mark.trap("T11")
def test_siblings_do_not_see_each_other(kit: Experiment, images: list | None, one_lane: None):
    assert _influence_of_a_sibling(kit.policy, images) == 0


@seeing
@pytest.mark.trap("T11", broken="sees_its_siblings")
def test_completions_that_see_their_siblings_are_noticed(
    kit: Experiment, images: list | None, one_lane: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Packing, "sees", sees_its_siblings)
    assert _influence_of_a_sibling(kit.policy, images) > 1e-4


# --- token by token ---------------------------------------------------------------------------------------------------


def _one_by_one(policy: Policy, images: list | None, room: int) -> torch.Tensor:
    """Logits of three tokens of two completions a prompt, fed one token of each at a time."""
    prefix = run_prompts(policy.model, policy.encode(PROMPTS, images).inputs)
    cache, itself = prefix.room_for(room), torch.eye(2, dtype=torch.bool)
    logits = [
        prefix.extend(
            policy.model,
            IDS[:, step].reshape(3, 2),
            torch.full((3, 2), step),
            itself.repeat(1, step + 1).expand(3, -1, -1),
            cache,
        )
        for step in range(3)
    ]
    return torch.stack(logits, dim=2).flatten(0, 1)


@seeing
@torch.no_grad()
def test_one_by_one_gives_the_logits_of_all_at_once(kit: Experiment, images: list | None):
    prefix = run_prompts(kit.policy.model, kit.policy.encode(PROMPTS, images).inputs)
    packing = Packing.of(torch.ones(6, 4, dtype=torch.bool), torch.arange(3).repeat_interleave(2), 3)
    laid = [packing.lay_out(values) for values in (IDS[packing.rows, packing.steps], packing.steps)]
    at_once = prefix.extend(kit.policy.model, *laid, packing.sees()).reshape(6, 3, -1)
    torch.testing.assert_close(_one_by_one(kit.policy, images, room=6), at_once, rtol=0, atol=5e-5)


@torch.no_grad()
def test_sampling_leaves_the_prompts_as_they_were(kit: Experiment):
    prefix = run_prompts(kit.policy.model, kit.policy.encode(PROMPTS).inputs)
    held = prefix.cache.layers[0].keys.clone()
    cache = prefix.room_for(6)
    prefix.extend(
        kit.policy.model, IDS[:3, :1], torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1, 1).bool(), cache
    )
    assert torch.equal(prefix.cache.layers[0].keys, held) and prefix.cache.get_seq_length() == held.shape[-2]
    assert cache.get_seq_length() == held.shape[-2] + 1


@torch.no_grad()
def test_more_than_there_is_room_for_is_an_error(kit: Experiment):
    with pytest.raises(RuntimeError):
        _one_by_one(kit.policy, None, room=4)


def _scripted(rows: list[list[int]], vocabulary: int = 12) -> tuple[torch.Tensor, Callable]:
    """First logits, and a model that goes on with the given ids whatever it is told."""
    logits = torch.nn.functional.one_hot(torch.tensor(rows), vocabulary).float() * 50
    return logits[:, 0], lambda ids, step: logits[:, step + 1]


def test_decoding_stops_when_every_row_has_ended_and_pads_behind_each_end():
    first, following = _scripted([[3, 1, 5, 5, 5], [3, 4, 4, 2, 5]])
    ids, logprobs = decode(
        first, following, eos_token_ids=[1, 2], pad_token_id=0, max_new_tokens=5, temperature=1.0, uniforms=None
    )
    assert ids.tolist() == [[3, 1, 0, 0], [3, 4, 4, 2]]
    assert logprobs.shape == ids.shape and float(logprobs[1].abs().max()) < 1e-6


def test_log_probabilities_are_at_the_temperature_of_the_draw():
    first = torch.tensor([[1.0, 2.0, 0.0]])
    for temperature in (0.5, 1.0, 1.5):
        _, logprobs = decode(
            first, None, eos_token_ids=[9], pad_token_id=0, max_new_tokens=1, temperature=temperature, uniforms=None
        )
        torch.testing.assert_close(logprobs[0, 0], (first / temperature).log_softmax(-1)[0, 1])
