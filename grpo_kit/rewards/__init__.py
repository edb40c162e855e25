"""Rewards: callables `(images, prompts, enhanced_prompts) -> (N,) float`, NaN where a sample cannot be scored.

One whose signature also names `group_ids`, `image_seeds`, `metadata` or `references` is handed those by keyword. Any
function will do; nothing is registered. The names below are what rewards are composed of; each is loaded when it is
first used.

    from grpo_kit.rewards import Gain, Length, Rewards, Shaping
    clip = kit.rewards.parts["clip_similarity"]
    rewards = Rewards({"gain": Gain(kit.generator, clip), "length": Length(30)}, {"gain": 1.0, "length": 0.1})
    kit = kit.with_rewards(rewards)
"""

from grpo_kit import lazy_names

_MODULES = {
    ("Rewards",): "composition",
    ("Reward", "RewardError"): "protocol",
    ("Shaping",): "shaping",
    ("check_reward_settings", "load_rewards"): "loading",
    ("BadRewardError", "usable_rewards"): "bad_rewards",
    ("in_threads", "with_time_limit"): "slow",
    ("ClipSimilarity",): "clip",
    ("Consistency", "Diversity", "ImageQuality", "MeaningKept", "Safety", "Style"): "embedding_scores",
    ("EditDirection", "FieldSimilarity", "ImageSimilarity", "load_dino_similarity"): "references",
    ("Gain",): "gain",
    ("Aesthetic", "HumanPreference", "PickScore", "load_aesthetic", "load_hps", "load_pickscore"): "learned",
    ("MediumError", "media_of"): "media",
    ("ClapSimilarity", "load_clap_similarity", "loudness"): "sound",
    ("ClipFrames", "ClipViews", "XClipSimilarity", "load_xclip_similarity", "motion"): "video",
    ("JpegSize", "Length", "Repetition", "contrast", "sharpness"): "plain",
}
_HOME = {name: module for names, module in _MODULES.items() for name in names}

__all__ = sorted(_HOME)

__getattr__, __dir__ = lazy_names(__name__, _HOME)
