"""The rollout: shapes, what fixes it, what is scored, and latents as a confounder (CORRECTNESS.md T12, T18, T19)."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from grpo_kit.experiment import Experiment
from grpo_kit.grpo import group_advantages, group_spread
from grpo_kit.models.policy import Completions, Policy
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rollout import Rollout, collect_rollout, latent_seeds


class Parrot(Policy):
    """Writes the same words whatever it is asked."""

    def __init__(self, policy: Policy, text: str) -> None:
        vars(self).update(vars(policy))
        self.text = text

    def sample(self, *args: object, **options: object) -> Completions:
        found = super().sample(*args, **options)
        return dataclasses.replace(found, texts=[self.text] * len(found.texts))


def _collect(kit: Experiment, policy: Policy | None = None, size: int = 3, seed: int = 0, **options: object) -> Rollout:
    prompts = options.pop("prompts", kit.train_prompts[:2])
    rewards = options.pop("rewards", kit.rewards)
    return collect_rollout(policy or kit.policy, kit.generator, rewards, prompts, size, seed, **options)


def _same(a: Rollout, b: Rollout) -> bool:
    pictures = [[image.tobytes() for row in r.images for image in row] for r in (a, b)]
    return (
        a.enhanced_prompts == b.enhanced_prompts
        and torch.equal(a.completion_ids, b.completion_ids)
        and torch.equal(a.old_logprobs, b.old_logprobs)
        and torch.equal(a.image_seeds, b.image_seeds)
        and torch.equal(a.rewards, b.rewards)
        and pictures[0] == pictures[1]
    )


def test_rows_are_group_major_and_all_shapes_agree(rollout: Rollout):
    rows, length = rollout.completion_ids.shape
    assert rows == 12 and rollout.group_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert rollout.group_ids.dtype == rollout.completion_ids.dtype == rollout.image_seeds.dtype == torch.int64
    assert rollout.completion_mask.dtype == torch.bool
    for tensor in (rollout.completion_mask, rollout.old_logprobs):
        assert tensor.shape == (rows, length)
    assert rollout.image_seeds.shape == (rows, 1) and rollout.rewards.shape == rollout.truncated.shape == (rows,)
    assert {values.shape for values in rollout.reward_parts.values()} == {(rows,)}
    assert len(rollout.enhanced_prompts) == len(rollout.images) == rows and len(rollout.prompts) == 3
    assert set(rollout.reward_parts) == {"clip_similarity", "gold", "keeps_objects", "grammatical"}
    assert set(rollout.seconds) == {"sampling", "images", "rewards"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        rollout.rewards = None


def test_seed_alone_decides_a_rollout(kit: Experiment):
    assert _same(_collect(kit, seed=4), _collect(kit, seed=4))
    assert not _same(_collect(kit, seed=4), _collect(kit, seed=5))


def test_seed_decides_what_the_policy_sees(kit: Experiment):
    seen = [_collect(kit, seed=4, use_image=True) for _ in range(2)]
    assert _same(*seen) and [len(one.pictures) for one in seen[0].contexts] == [1, 1]
    assert not _same(seen[0], _collect(kit, seed=4))
    assert _collect(kit, seed=4).contexts is None


@pytest.mark.trap("T19")
@pytest.mark.trap("T19", broken="a_seed_for_each_row")
@pytest.mark.parametrize(("images", "use_image"), [(1, False), (2, False), (1, True)])
def test_equal_rewrites_on_shared_latents_have_exactly_equal_rewards(kit: Experiment, images: int, use_image: bool):
    parrot = Parrot(kit.policy, "a red circle, white background, sharp")
    options = {"images_per_prompt": images, "use_image": use_image}
    shared, own = (_collect(kit, parrot, share_seeds=share, **options) for share in (True, False))
    assert group_spread(shared.rewards, shared.group_ids).tolist() == [0.0, 0.0]
    assert not group_advantages(shared.rewards, shared.group_ids).any()
    assert (group_spread(own.rewards, own.group_ids) > 0).all()  # luck of the latents, which would be learned
    assert group_advantages(own.rewards, own.group_ids).abs().max() > 0.5


@pytest.mark.trap("T19")
def test_latents_are_shared_within_a_group_and_never_between_groups():
    groups = torch.arange(3).repeat_interleave(4)
    shared, own = (latent_seeds(7, groups, 4, 2, share) for share in (True, False))
    assert shared.shape == own.shape == (12, 2)
    assert all(len(set(map(tuple, shared[groups == g].tolist()))) == 1 for g in range(3))
    assert len(set(shared.flatten().tolist())) == 3 * 2 and len(set(own.flatten().tolist())) == 12 * 2


def test_prompts_with_the_same_text_are_groups_of_their_own(kit: Experiment):
    found = _collect(kit, prompts=["a red circle", "a red circle"])
    assert found.group_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.image_seeds[0] != found.image_seeds[3]


def test_a_rewards_value_is_the_mean_over_a_rewrites_pictures(kit: Experiment):
    found = _collect(kit, images_per_prompt=2)
    assert [len(row) for row in found.images] == [2] * 6
    again = kit.rewards(
        [image for row in found.images for image in row],
        [found.prompts[g].user_prompt for g in found.group_ids for _ in range(2)],
    )
    torch.testing.assert_close(found.rewards, again.reshape(6, 2).mean(dim=1), rtol=0, atol=1e-6)


@pytest.mark.trap("T18")
def test_pictures_are_scored_against_the_users_prompt(kit: Experiment):
    asked = []

    def listen(images: Sequence[Image.Image], prompts: Sequence[str], enhanced_prompts: Sequence[str]) -> list[float]:
        asked.append((list(prompts), list(enhanced_prompts)))
        return [0.0] * len(images)

    found = _collect(kit, rewards=Rewards({"listen": listen}, {"listen": 1.0}))
    users = [prompt.user_prompt for prompt in kit.train_prompts[:2] for _ in range(3)]
    assert asked == [(users, found.enhanced_prompts)]


def test_one_picture_that_failed_leaves_the_mean_of_the_others_and_all_failed_is_nan(
    kit: Experiment, monkeypatch: pytest.MonkeyPatch
):
    whole = kit.generator.generate_images
    lost = {0, 2, 3}  # of the flat list: one of the first rewrite's two pictures, both of the second's

    def losing(texts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        return [None if i in lost else image for i, image in enumerate(whole(texts, seeds))]

    monkeypatch.setattr(kit.generator, "generate_images", losing)
    found = _collect(kit, images_per_prompt=2)
    left = kit.rewards([found.images[0][1]], [found.prompts[0].user_prompt])
    torch.testing.assert_close(found.rewards[:1], left, rtol=0, atol=1e-6)
    assert found.rewards.isnan().tolist() == [False, True, False, False, False, False]
    assert found.images[0][0] is None and found.images[1] == [None, None]


def test_what_the_length_limit_cut_off_is_marked(own_kit: Experiment):
    assert not _collect(own_kit).truncated.any()
    own_kit.policy.max_new_tokens = 3
    assert _collect(own_kit).truncated.all()


@pytest.mark.parametrize("size", [1, 0, -2])
def test_group_without_a_companion_is_refused_in_one_line(kit: Experiment, size: int):
    with pytest.raises(ValueError, match=f"num_generations: found {size}, allowed: at least 2") as error:
        _collect(kit, size=size)
    assert "\n" not in str(error.value)


def test_no_prompts_are_refused_in_one_line(kit: Experiment):
    with pytest.raises(ValueError, match="prompts: found none"):
        _collect(kit, prompts=[])
