"""Diversity: how unlike the rest of its group an image is."""

from collections.abc import Sequence

import torch
from PIL import Image

from grpo_kit.rewards.clip_encoder import ClipEncoder
from grpo_kit.rewards.protocol import RewardError


class Diversity:
    """1 - the mean CLIP cosine to the other images of the same prompt, in [0, 2]; 0 where all are alike.

    NaN for an image without another one in its group. An evaluation, which has one rewrite a prompt, leaves it out of
    its total (`Rewards.total`). With several images a rewrite, its own other ones count too.
    """

    def __init__(self, clip: ClipEncoder) -> None:
        self.clip = clip

    @torch.no_grad()
    def __call__(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        enhanced_prompts: Sequence[str],
        group_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """(N,) distances to the group; `group_ids` (N,) says who belongs together.

        Raises:
            RewardError: no group ids.
        """
        if group_ids is None:
            raise RewardError("compares the images of a group, and found no group_ids. Pass them to Rewards.score")
        features = self.clip.encode_images(images)
        ids = torch.as_tensor(group_ids).to(features.device)
        others = (ids[:, None] == ids[None, :]).fill_diagonal_(False).to(features.dtype)
        return 1 - (others * (features @ features.T)).sum(dim=1) / others.sum(dim=1)
