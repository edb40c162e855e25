"""Several turns: what is drawn, what is scored behind which picture, and who gets which credit (T1, T3, T27 to T31)."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from PIL import Image
from support.broken_twins import broken_versions

from grpo_kit.config import load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.experiment import Experiment
from grpo_kit.grpo.advantages import group_advantages
from grpo_kit.grpo.credit import turn_credits
from grpo_kit.grpo.loss import grpo_loss
from grpo_kit.models import turns
from grpo_kit.models.conversation import KEEP, Conversation, Turn, grey, is_kept, shown, within_pixels
from grpo_kit.models.generator import Generator
from grpo_kit.models.policy import Completions, Policy
from grpo_kit.rollout import Rollout, collect_rollout, score_rows, with_encoded
from grpo_kit.shapeworld.verify import said_of
from grpo_kit.training.step import grpo_step

ROUNDING = 2e-5
KINDS = {
    "two": {"turns": 2},
    "branches": {"turns": 2, "branches": True},
    "three": {"turns": 3},
    "three, branches": {"turns": 3, "branches": True},
    "grey": {"turns": 2, "look_at": "grey"},
    "words": {"turns": 2, "look_at": "words"},
    "nothing": {"turns": 2, "look_at": "nothing"},
}


class Counting(Generator):
    """Counts the texts that it is asked for."""

    def __init__(self, generator: Generator) -> None:
        vars(self).update(vars(generator))
        self.asked: list[str] = []

    def generate_images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        self.asked += prompts
        return super().generate_images(prompts, seeds)


class Says(Policy):
    """In a later turn some rows say what they are told to."""

    def __init__(self, policy: Policy, text: str = KEEP, every: int = 2) -> None:
        vars(self).update(vars(policy))
        self.text, self.every = text, every

    def sample(self, prompts: object, *args: object, **options: object) -> Completions:
        found = super().sample(prompts, *args, **options)
        if not prompts.conversations[0].turns:
            return found
        said = [text if row % self.every else self.text for row, text in enumerate(found.texts)]
        return dataclasses.replace(found, texts=said)


def _collect(
    kit: Experiment, policy: Policy | None = None, generator: Generator | None = None, **kind: object
) -> Rollout:
    with kit.generator.steps(1):
        return collect_rollout(
            policy or kit.policy, generator or kit.generator, kit.rewards, kit.train_prompts[:3], 4, 0, **kind
        )


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, object]:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def several(kit: Experiment, kind: dict[str, object]) -> Rollout:
    return _collect(kit, **kind)


@pytest.fixture(scope="module")
def two(kit: Experiment) -> Rollout:
    return _collect(kit, turns=2)


def _scored(policy: Policy, rollout: Rollout) -> torch.Tensor:
    with torch.no_grad():
        return score_rows(policy, with_encoded(rollout, policy), torch.arange(len(rollout.group_ids))).logprobs


# --- shapes and what stands where -------------------------------------------------------------------------------------


def test_each_turn_of_a_prompt_is_a_group_of_its_own(several: Rollout, kind: dict[str, object]):
    T = kind["turns"]
    assert len(several.prompts) == 3 * T and len(several.rewards) == 12 * T
    assert several.group_ids.tolist() == [group for group in range(3 * T) for _ in range(4)]
    assert several.turn_ids.tolist() == [turn for _ in range(3) for turn in range(T) for _ in range(4)]
    assert torch.equal(several.image_seeds.view(3, -1), several.image_seeds.view(3, -1)[:, :1].expand(3, 4 * T))


def test_a_rows_context_is_what_its_episode_wrote_and_saw(several: Rollout, kind: dict[str, object]):
    rows = {}
    for row, (group, context) in enumerate(zip(several.group_ids, several.context_ids, strict=True)):
        read, prompt, turn = several.contexts[context], several.prompts[group], int(group) % kind["turns"]
        assert read.prompt == prompt.user_prompt and len(read.turns) == turn
        sample = row % 4
        rows[int(group) // kind["turns"], turn, sample] = row
        for number, before in enumerate(read.turns):
            texts = {several.enhanced_prompts[rows[int(group) // kind["turns"], number, other]] for other in range(4)}
            assert before.rewrite in texts
            own = several.enhanced_prompts[rows[int(group) // kind["turns"], number, sample]]
            assert kind.get("branches") or before.rewrite == own
    if kind.get("branches"):
        assert len(several.contexts) == 3 * (2 + 4 * (kind["turns"] - 2))


def test_one_turn_is_what_it_was_without_turns(kit: Experiment):
    plain, one = _collect(kit), _collect(kit, turns=1)
    assert plain.enhanced_prompts == one.enhanced_prompts and torch.equal(plain.rewards, one.rewards)
    two = _collect(kit, turns=2)
    first = [row for row, turn in enumerate(two.turn_ids.tolist()) if turn == 0]
    assert [two.enhanced_prompts[row] for row in first] == plain.enhanced_prompts


# --- the same numbers in sampling and in training ---------------------------------------------------------------------


@pytest.mark.trap("T1")
def test_every_turn_scores_as_it_was_sampled(kit: Experiment, several: Rollout):
    assert float((_scored(kit.policy, several) - several.old_logprobs).abs().max()) < ROUNDING
    again = dataclasses.replace(several, encoded=None)  # as from a file
    assert float((_scored(kit.policy, again) - several.old_logprobs).abs().max()) < ROUNDING


def without_its_picture(rollout: Rollout) -> Rollout:
    """Later turns are scored as if their picture had not been there."""
    return dataclasses.replace(rollout, contexts=shown(rollout.contexts, "nothing"), encoded=None)


def pictures_of_other_rows(rollout: Rollout) -> Rollout:
    """Each row's picture is that of the row after it."""
    later = [place for place, one in enumerate(rollout.contexts) if one.turns]
    moved = zip(later, [*later[1:], later[0]], strict=True)
    images = {place: rollout.contexts[other].turns[0].image for place, other in moved}
    contexts = list(rollout.contexts)
    for place, image in images.items():
        turn = dataclasses.replace(contexts[place].turns[0], image=image)
        contexts[place] = dataclasses.replace(contexts[place], turns=(turn,))
    return dataclasses.replace(rollout, contexts=contexts, encoded=None)


def without_what_it_wrote(rollout: Rollout) -> Rollout:
    """Later turns are scored behind the prompt alone."""
    contexts = [dataclasses.replace(one, turns=()) for one in rollout.contexts]
    return dataclasses.replace(rollout, contexts=contexts, encoded=None)


@pytest.mark.trap("T27")
def test_a_later_turn_depends_on_its_own_picture(kit: Experiment, two: Rollout):
    later = two.turn_ids == 1
    changed = (_scored(kit.policy, without_its_picture(two)) - two.old_logprobs).abs()
    assert float(changed[later].max()) > 100 * ROUNDING and float(changed[~later].max()) < ROUNDING


@pytest.mark.parametrize(
    "version",
    broken_versions({without_its_picture: "T27", pictures_of_other_rows: "T28", without_what_it_wrote: "T27"}),
)
def test_scoring_behind_something_else_would_be_noticed(kit: Experiment, two: Rollout, version: Callable):
    assert float((_scored(kit.policy, version(two)) - two.old_logprobs).abs().max()) > 100 * ROUNDING


@pytest.mark.trap("T28")
def test_a_picture_stays_with_its_row_whatever_part_is_scored(kit: Experiment, several: Rollout):
    order = torch.randperm(len(several.rewards), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = [score_rows(kit.policy, several, rows).logprobs for rows in order.split(5)]
    assert float((torch.cat(parts) - several.old_logprobs[order]).abs().max()) < ROUNDING


def _gradient(policy: Policy, rollout: Rollout, kit: Experiment, **changed: object) -> torch.Tensor:
    """What a step with plain SGD of rate 1 changes."""
    settings = {"beta": 0.0, "updates_per_rollout": 1, "max_grad_norm": 1e9, **changed}
    config = load_config(kit.config, {f"training_settings.{name}": value for name, value in settings.items()})
    before = torch.cat([p.detach().flatten().clone() for p in policy.trainable_parameters()])
    state = {name: value.clone() for name, value in policy.trainable_state().items()}
    grpo_step(policy, torch.optim.SGD(policy.trainable_parameters(), lr=1.0), rollout, config)
    after = torch.cat([p.detach().flatten() for p in policy.trainable_parameters()])
    policy.load_trainable_state(state)
    return before - after


def _by_hand(policy: Policy, rollout: Rollout, kit: Experiment, *, with_context: bool = False) -> torch.Tensor:
    """The gradient of one pass a row over its whole conversation, the loss on the completion's tokens alone.

    Args:
        with_context: the broken version, in which what the policy wrote in earlier turns counts too.
    """
    policy.model.zero_grad()
    advantages = group_advantages(rollout.rewards.float(), rollout.group_ids)
    total = torch.zeros(())
    for row, context in enumerate(rollout.context_ids):
        mask = rollout.completion_mask[row]
        ids = rollout.completion_ids[row][mask][None]
        inputs = policy.encode([rollout.contexts[context]]).inputs
        prompt = inputs["input_ids"]
        extended = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole = {
            name: torch.cat([value, extended.get(name, torch.zeros_like(ids))], dim=1)
            if value.shape == prompt.shape
            else value
            for name, value in inputs.items()
        }
        logits = policy.model.eval()(**whole).logits[0] / policy.temperature
        logprobs = logits[:-1].log_softmax(-1).gather(1, whole["input_ids"][0, 1:, None])[:, 0]
        counted = torch.zeros(len(logprobs), dtype=torch.bool)
        counted[prompt.shape[1] - 1 :] = True
        if with_context:
            counted[:] = True
        own = logprobs[counted]
        old = torch.cat([own.detach()[: len(own) - len(ids[0])], own.detach()[-len(ids[0]) :]])
        loss = grpo_loss(
            own[None], advantages[row : row + 1], torch.ones_like(own[None], dtype=torch.bool), old_logprobs=old[None]
        )
        total = total + loss.loss / len(rollout.rewards)
    total.backward()
    found = torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])
    policy.model.zero_grad(set_to_none=True)
    return found


@pytest.mark.trap("T29")
@pytest.mark.trap("T29", broken="context_that_counts")
def test_what_stands_before_a_turn_gets_no_gradient(own_policy: Policy, two: Rollout, kit: Experiment):
    rows = torch.arange(len(two.rewards))
    rewards = torch.rand(len(rows), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rollout = dataclasses.replace(two, rewards=rewards)
    found, expected = _gradient(own_policy, rollout, kit), _by_hand(own_policy, rollout, kit)
    assert float((found - expected).norm() / expected.norm()) < 1e-3
    wrong = _by_hand(own_policy, rollout, kit, with_context=True)
    assert float((found - wrong).norm() / wrong.norm()) > 1e-2


@pytest.mark.parametrize("size", [1, 5, 7])
def test_the_gradient_does_not_depend_on_micro_batches(
    own_policy: Policy, several: Rollout, kit: Experiment, size: int
):
    rewards = torch.rand(len(several.rewards), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rollout = dataclasses.replace(several, rewards=rewards)
    whole = _gradient(own_policy, rollout, kit)
    assert float((_gradient(own_policy, rollout, kit, micro_batch_size=size) - whole).norm() / whole.norm()) < 1e-3


@pytest.mark.trap("T3")
def test_one_turns_rewards_change_no_other_turns_advantages(two: Rollout):
    rewards = two.rewards.clone()
    rewards[two.group_ids == 3] += torch.tensor([1.0, 2.0, 3.0, 4.0])
    before, after = (group_advantages(values, two.group_ids) for values in (two.rewards, rewards))
    assert torch.equal(before[two.group_ids != 3], after[two.group_ids != 3])


# --- keep it ----------------------------------------------------------------------------------------------------------


def _keeps_without_drawing(kit: Experiment) -> bool:
    generator = Counting(kit.generator)
    found = _collect(kit, Says(kit.policy), generator, turns=2)
    grids = [[found.images[row] for row in (found.turn_ids == turn).nonzero().flatten()] for turn in (0, 1)]
    rewards = [found.totals[found.turn_ids == turn] for turn in (0, 1)]
    kept = found.kept[found.turn_ids == 1]
    same = all(a[0] is b[0] for a, b, stays in zip(*grids, kept.tolist(), strict=True) if stays)
    return (
        bool(kept.any() and not kept.all())
        and same
        and torch.equal(rewards[0][kept], rewards[1][kept])
        and (not any(is_kept(text) for text in generator.asked))
    )


@pytest.mark.trap("T30")
def test_keep_it_draws_nothing_and_has_the_rewards_of_what_it_keeps(kit: Experiment):
    assert _keeps_without_drawing(kit)


@pytest.mark.trap("T30", broken="keep_is_drawn_again")
def test_keep_it_drawn_as_a_prompt_would_be_noticed(kit: Experiment, monkeypatch: pytest.MonkeyPatch):
    from grpo_kit import rollout

    monkeypatch.setattr(rollout, "rows_to_draw", lambda texts, before: list(range(len(texts))))
    assert not _keeps_without_drawing(kit)


def test_the_share_that_keeps_is_logged(kit: Experiment):
    found = _collect(kit, Says(kit.policy, every=4), turns=2).metrics()
    assert found["turn_2/kept"] == 0.25 and found["reward"] == found["turn_2/reward"]


def test_who_keeps_is_asked_in_a_third_turn_about_the_picture_that_it_kept(kit: Experiment):
    found = _collect(kit, Says(kit.policy), turns=3)
    for context in found.contexts:
        if len(context.turns) == 2 and is_kept(context.turns[1].rewrite):
            assert context.turns[1].image is context.turns[0].image


def test_a_rewrite_that_repeats_itself_is_not_drawn_again(kit: Experiment):
    class Parrot(Policy):
        def __init__(self, policy: Policy) -> None:
            vars(self).update(vars(policy))

        def sample(self, *args: object, **options: object) -> Completions:
            found = super().sample(*args, **options)
            return dataclasses.replace(found, texts=["a red circle"] * len(found.texts))

    generator = Counting(kit.generator)
    assert not _collect(kit, Parrot(kit.policy), generator, turns=2).kept.any()
    assert len(generator.asked) == 12


# --- credit -----------------------------------------------------------------------------------------------------------


def test_credits_by_hand():
    rewards = torch.tensor([[0.2, 0.7, 0.4], [0.5, 0.1, 0.9]])
    assert torch.equal(turn_credits(rewards, "final"), torch.tensor([[0.4] * 3, [0.9] * 3]))
    torch.testing.assert_close(turn_credits(rewards, "difference"), torch.tensor([[0.2, 0.5, -0.3], [0.5, -0.4, 0.8]]))
    torch.testing.assert_close(turn_credits(rewards, "peak"), torch.tensor([[0.2, 0.5, -0.3], [0.5, -0.4, 0.4]]))


def test_differences_add_up_to_the_last_reward_and_two_turns_of_peak_are_differences():
    rewards = torch.rand(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(turn_credits(rewards, "difference").sum(dim=1), rewards[:, -1])
    torch.testing.assert_close(turn_credits(rewards[:, :2], "peak"), turn_credits(rewards[:, :2], "difference"))


def test_what_cannot_be_scored_has_no_credit():
    rewards = torch.tensor([[0.2, torch.nan], [torch.nan, 0.4]])
    assert turn_credits(rewards, "final").isnan().tolist() == [[True, True], [False, False]]
    assert turn_credits(rewards, "difference").isnan().tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("credit", ["final", "difference", "peak"])
@pytest.mark.parametrize("branches", [False, True])
def test_a_rollouts_rewards_are_the_credits_of_its_episodes(kit: Experiment, credit: str, branches: bool):
    found = _collect(kit, turns=2, credit=credit, branches=branches)
    own = found.totals.view(3, 2, 4)
    given = found.rewards.view(3, 2, 4)
    if branches:
        torch.testing.assert_close(given, own)
    elif credit == "final":
        torch.testing.assert_close(given, own[:, 1:].expand(3, 2, 4))
    else:
        torch.testing.assert_close(given[:, 0], own[:, 0])
        torch.testing.assert_close(given[:, 1], own[:, 1] - own[:, 0])


@pytest.mark.parametrize("kind", [{"turns": 2}, {"turns": 3}, {"turns": 3, "branches": True}])
def test_each_further_picture_costs_and_keeping_is_free(kit: Experiment, kind: dict[str, object]):
    """With credit "final" all turns bear the episode's costs; of branches the first turn has none."""
    policy, T = Says(kit.policy), kind["turns"]
    free, found = (_collect(kit, policy, **kind, redraw_cost=cost) for cost in (0.0, 0.25))
    assert found.kept.any() and not found.kept[found.turn_ids > 0].all()
    asked = (~found.kept.view(3, T, 4)[:, 1:]).sum(dim=1, keepdim=True).expand(3, T, 4).clone()
    if kind.get("branches"):
        asked[:, 0] = 0
    torch.testing.assert_close(found.rewards, free.rewards - 0.25 * asked.flatten())
    assert torch.equal(found.totals, free.totals)  # what is shown of the rewards is without costs


def test_a_text_only_policy_is_refused_before_anything_is_drawn(kit: Experiment, own_policy: Policy):
    own_policy.sees = False
    generator = Counting(kit.generator)
    with pytest.raises(ModelError, match=r"pictures: found some .* but it is text-only; .* look_at: nothing"):
        _collect(kit, own_policy, generator, turns=2)
    assert not generator.asked


# --- what the policy is shown -----------------------------------------------------------------------------------------


def _conversations() -> list[Conversation]:
    pictures = {colour: Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue", "white")}
    return [
        Conversation(f"a {colour} thing", (picture,), (Turn("x", picture, "Wrong: colour."),))
        for colour, picture in pictures.items()
    ]


def test_what_each_way_of_looking_shows():
    asked = _conversations()
    assert [one.pictures[1].getpixel((0, 0)) for one in shown(asked, "own")] == [
        one.pictures[1].getpixel((0, 0)) for one in asked
    ]
    others = shown(asked, "other", step=2)
    assert [one.turns[0].image for one in others] == [asked[place].turns[0].image for place in (2, 3, 0, 1)]
    assert {one.pictures[0].getpixel((0, 0)) for one in shown(asked, "grey")} == {
        grey(asked[0].images[0]).getpixel((0, 0))
    }
    assert not any(one.pictures for one in [*shown(asked, "nothing"), *shown(asked, "words")])
    assert [one.turns[0].words for one in shown(asked, "words")] == ["Wrong: colour."] * 4
    assert not any(one.turns[0].words for look in ("own", "grey", "other", "nothing") for one in shown(asked, look, 1))
    assert all(
        one.prompt == before.prompt and one.turns[0].rewrite == "x" for one, before in zip(others, asked, strict=True)
    )


def _words_tell_no_answer(said: Callable[[Image.Image, str], str], kit: Experiment) -> bool:
    """Whether what is said of pictures is made of the names of attributes alone: no value, and no number."""
    allowed = set("wrong all right colour shape count size place relation background clean".split())
    prompts = [prompt.user_prompt for prompt in kit.train_prompts[:12]]
    images = kit.generator.generate_images(prompts, range(12))
    words = {
        word.strip(".,:").lower()
        for image, text in zip(images, prompts, strict=True)
        for word in said(image, text).split()
    }
    return words <= allowed


@pytest.mark.trap("T31")
def test_the_checks_words_name_attributes_and_tell_neither_answer_nor_reward(kit: Experiment):
    assert _words_tell_no_answer(said_of, kit)
    assert said_of(Image.new("RGB", (32, 32)), "a cat") == ""


def tells_the_answer(image: Image.Image, text: str) -> str:
    return f"{said_of(image, text)} It should be {text}."


def tells_the_score(image: Image.Image, text: str) -> str:
    return f"{said_of(image, text)} 0.42"


@pytest.mark.parametrize("version", broken_versions({tells_the_answer: "T31", tells_the_score: "T31"}))
def test_words_that_leak_would_be_noticed(kit: Experiment, version: Callable):
    assert not _words_tell_no_answer(version, kit)


def test_pictures_are_brought_within_their_budget_in_proportion():
    picture = Image.new("RGB", (400, 100))
    assert within_pixels(picture, None, 10_000).size == (200, 50)
    assert within_pixels(picture, 160_000, None).size == (800, 200)
    assert within_pixels(picture, 100, 100_000) is picture
    assert within_pixels(Image.new("RGB", (1, 4000)), None, 100).size == (1, 632)


def test_contexts_can_be_drawn_again(kit: Experiment, several: Rollout, kind: dict[str, object]):
    first = [row for row, turn in enumerate(several.turn_ids.tolist()) if turn == 0]
    prompts = several.prompts[:: kind["turns"]]
    request = turns.DrawRequest(
        [several.prompts[several.group_ids[row]].user_prompt for row in first],
        [],
        torch.arange(3).repeat_interleave(4),
        several.image_seeds[first],
        [{} for _ in first],
    )
    begun = [Conversation(prompt.user_prompt) for prompt in prompts]
    with kit.generator.steps(1):
        found = turns.contexts_drawn_again(
            kit.generator, begun, several.enhanced_prompts, request, kind["turns"], kind.get("branches", False),
            kind.get("look_at", "own"),
        )  # fmt: skip
    assert found == several.contexts
