"""Gain over the raw prompt's picture with the same seed, drawn by the embedded generator."""

from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from grpo_kit.config import load_config
from grpo_kit.config.prompts import Prompt
from grpo_kit.config.seeds import derive_seed
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator
from grpo_kit.rewards import Gain, RewardError, Rewards, load_rewards
from grpo_kit.rewards.gold import best_prompt, gold
from grpo_kit.rollout import collect_rollout

PROMPTS = ["a crimson ball", "two azure boxes", "a rosy hoop, at night"]
SEEDS = torch.tensor([11, 12, 13])
BEST = [best_prompt(prompt) for prompt in PROMPTS]


class Counting:
    """A generator that keeps what it was asked for."""

    def __init__(self, generator: Generator) -> None:
        self.generator, self.calls = generator, []

    def generate_images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        self.calls.append(list(zip(prompts, seeds, strict=True)))
        return self.generator.generate_images(prompts, seeds)


@pytest.fixture
def generator(kit: Experiment) -> Counting:
    return Counting(kit.generator)


@pytest.fixture(scope="module")
def drawn(kit: Experiment) -> list[Image.Image]:
    return kit.generator.generate_images(BEST, SEEDS.tolist())


def test_gain_is_the_reward_less_the_raw_pictures_with_the_same_seeds(
    kit: Experiment, generator: Counting, drawn: list[Image.Image]
):
    clip = kit.rewards.parts["clip_similarity"]
    raw = kit.generator.generate_images(PROMPTS, SEEDS.tolist())
    expected = clip(drawn, PROMPTS, BEST).double() - clip(raw, PROMPTS, PROMPTS).double()
    found = Gain(generator, clip)(drawn, PROMPTS, BEST, image_seeds=SEEDS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert generator.calls == [list(zip(PROMPTS, SEEDS.tolist(), strict=True))]
    assert (found > 0).all()  # the oracle's rewrites help


def test_prompt_that_is_left_as_it_is_gains_nothing(kit: Experiment, generator: Counting):
    raw = kit.generator.generate_images(PROMPTS, SEEDS.tolist())
    gain = Gain(generator, kit.rewards.parts["clip_similarity"])
    found = gain(raw, PROMPTS, PROMPTS, image_seeds=SEEDS)
    torch.testing.assert_close(found, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)
    others = gain(raw, PROMPTS, PROMPTS, image_seeds=SEEDS + 1)  # a twin that takes other latents is not 0
    assert others.abs().max() > 0.01


def test_raw_pictures_are_drawn_once_and_few_calls_are_kept(generator: Counting, drawn: list[Image.Image]):
    gain = Gain(generator, gold)
    first = gain(drawn, PROMPTS, BEST, image_seeds=SEEDS)
    assert torch.equal(gain(drawn, PROMPTS, PROMPTS, image_seeds=SEEDS), first) and len(generator.calls) == 1
    for shift in range(1, 18):
        gain(drawn[:1], PROMPTS[:1], BEST[:1], image_seeds=SEEDS[:1] + shift)
    assert len(gain._kept) == 16
    gain(drawn, PROMPTS, BEST, image_seeds=SEEDS)
    assert len(generator.calls) == 19  # the first call had to make room


def test_what_is_kept_changes_no_bit(generator: Counting, kit: Experiment, drawn: list[Image.Image]):
    """A resumed run, which has kept nothing, has to give the numbers of the one that went on."""
    clip = kit.rewards.parts["clip_similarity"]
    used, fresh = Gain(generator, clip), Gain(generator, clip)
    used(drawn[:2], PROMPTS[:2], BEST[:2], image_seeds=SEEDS[:2])  # the same pairs in another batch
    assert torch.equal(used(drawn, PROMPTS, BEST, image_seeds=SEEDS), fresh(drawn, PROMPTS, BEST, image_seeds=SEEDS))


def test_raw_picture_that_fails_leaves_out_its_samples_alone(drawn: list[Image.Image], kit: Experiment):
    class Losing(Counting):
        def generate_images(self, prompts, seeds):
            found = super().generate_images(prompts, seeds)
            return [found[0], None, found[2]]

    found = Gain(Losing(kit.generator), gold)(drawn, PROMPTS, BEST, image_seeds=SEEDS)
    assert found.isnan().tolist() == [False, True, False]


def test_rollout_hands_over_the_seeds_of_its_pictures(kit: Experiment, generator: Counting):
    clip = kit.rewards.parts["clip_similarity"]
    rewards = Rewards({"gain": Gain(generator, clip)}, {"gain": 1.0}, {"clip": clip})
    prompts = [Prompt(text) for text in PROMPTS[:2]]
    found = collect_rollout(kit.policy, kit.generator, rewards, prompts, 3, seed=4, images_per_prompt=2)
    raw_seeds = [derive_seed(4, "latents", group, "shared", image) for group in range(2) for image in range(2)]
    asked = dict.fromkeys(generator.calls[0])
    assert list(asked) == list(zip([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, raw_seeds, strict=True))
    # the raw score is the same for all of a group, so the gain differs from the similarity by a constant in it
    gap = (found.reward_parts["clip"] - found.reward_parts["gain"]).reshape(2, 3)
    torch.testing.assert_close(gap, gap[:, :1].expand(2, 3), rtol=0, atol=1e-6)
    assert gap[0, 0] != gap[1, 0]


def test_gain_says_what_it_lacks(generator: Counting, drawn: list[Image.Image]):
    with pytest.raises(RewardError, match=r"reward 'gain': .*no image_seeds. Pass them"):
        Rewards({"gain": Gain(generator, gold)}, {"gain": 1.0})(drawn, PROMPTS)
    with pytest.raises(RewardError, match="asks for group_ids, allowed: one that scores single images"):
        Gain(generator, lambda images, prompts, enhanced_prompts, group_ids: [0.0])


def test_gain_comes_from_a_config_with_any_inner_reward(kit: Experiment, drawn: list[Image.Image]):
    options = {"reward_settings.weights": {"gain": 1.0}, "reward_settings.options.gain.reward": "sharpness"}
    config = load_config(kit.config, options)
    found = load_rewards(config, kit.generator)(drawn, PROMPTS, BEST, image_seeds=SEEDS)
    assert found.isfinite().all() and found.any()
    with pytest.raises(ValueError, match=r"reward_settings.options.gain: needs the generator"):
        load_rewards(config)
    nested = load_config(config, {"reward_settings.options.gain.reward": "gain"})
    with pytest.raises(ValueError, match=r"reward_settings.options.gain: reward: found 'gain', allowed: aesthetic, "):
        load_rewards(nested, kit.generator)
