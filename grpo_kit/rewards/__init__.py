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
    "BadRewardError": "usable",
    "usable_rewards": "usable",
    "in_threads": "calls",
    "with_time_limit": "calls",
    "ClipSimilarity": "clip_similarity",
    "Consistency": "clip_scores",
    "ImageQuality": "clip_scores",
    "MeaningKept": "clip_scores",
    "Safety": "clip_scores",
    "Style": "clip_scores",
    "Diversity": "group",
    "Gain": "gain",
    "Aesthetic": "aesthetic",
    "load_aesthetic": "aesthetic",
    "PickScore": "preference",
    "load_pickscore": "preference",
    "HumanPreference": "preference",
    "load_hps": "preference",
    "JpegSize": "pixels",
    "contrast": "pixels",
    "sharpness": "pixels",
    "Length": "text",
    "Repetition": "text",
}

__all__ = sorted(_HOME)


__getattr__, __dir__ = lazy_names(__name__, _HOME)
