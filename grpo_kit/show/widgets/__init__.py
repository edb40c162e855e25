"""Widgets that read a run folder; each is also a picture for readers without a kernel (`picture_box`)."""

from grpo_kit.show.widgets.advantage_playground import AdvantagePlayground
from grpo_kit.show.widgets.be_the_reward import BeTheReward
from grpo_kit.show.widgets.group_explorer import GroupExplorer
from grpo_kit.show.widgets.image_compare import ImageCompare
from grpo_kit.show.widgets.live_training import LiveTraining
from grpo_kit.show.widgets.loss_playground import LossPlayground

__all__ = ["AdvantagePlayground", "BeTheReward", "GroupExplorer", "ImageCompare", "LiveTraining", "LossPlayground"]
