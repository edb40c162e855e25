"""Rewards: callables `(images, prompts, enhanced_prompts) -> (N,) float`, NaN where a sample cannot be scored.

One whose signature also names `group_ids` or `image_seeds` is handed those by keyword. Any function will do; nothing is
registered. The names below are what rewards are composed of; each is loaded when it is first used.

    from grpo_kit.rewards import Gain, Length, Rewards, Shaping
    clip = kit.rewards.parts["clip_similarity"]
    rewards = Rewards({"gain": Gain(kit.generator, clip), "length": Length(30)}, {"gain": 1.0, "length": 0.1})
    kit = kit.with_rewards(rewards)
"""

from grpo_kit import lazy_names

_HOME = {
    "Rewards": "composition",
    "Reward": "protocol",
    "RewardError": "protocol",
    "Shaping": "shaping",
    "load_rewards": "loading",
    "check_reward_settings": "loading",
    "BadRewardError": "bad_rewards",
    "usable_rewards": "bad_rewards",
    "in_threads": "slow",
    "with_time_limit": "slow",
    "ClipSimilarity": "clip",
    "Consistency": "clip",
    "ImageQuality": "clip",
    "MeaningKept": "clip",
    "Safety": "clip",
    "Style": "clip",
    "Diversity": "clip",
    "Gain": "gain",
    "Aesthetic": "learned",
    "load_aesthetic": "learned",
    "PickScore": "learned",
    "load_pickscore": "learned",
    "HumanPreference": "learned",
    "load_hps": "learned",
    "JpegSize": "plain",
    "contrast": "plain",
    "sharpness": "plain",
    "Length": "plain",
    "Repetition": "plain",
}

__all__ = sorted(_HOME)


__getattr__, __dir__ = lazy_names(__name__, _HOME)
