"""Rewards that are NaN or infinite: which samples a step leaves out because of them (`on_bad_reward`)."""

from collections.abc import Mapping

import torch

from grpo_kit.config import KitError


class BadRewardError(KitError):
    """A sample without a usable reward, where the settings ask for an error."""


def usable_rewards(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    on_bad_reward: str = "drop_sample",
    parts: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """(N,) rewards with NaN where a sample is left out, because its reward (or one in its group) is not finite.

    Args:
        on_bad_reward: "drop_sample" leaves out the sample alone, "drop_group" all that answer the same prompt, "raise"
            nothing: it raises `BadRewardError`.
        parts: name → (N,) raw scores that the rewards came from, so that the error can name the one to blame.
    """
    bad = ~rewards.isfinite()
    if on_bad_reward == "raise" and bad.any():
        rows = bad.nonzero().flatten().tolist()
        blamed = [name for name, values in (parts or {}).items() if values[rows[0]].isnan()]
        source = f", from {', '.join(blamed)}" if blamed else ""
        raise BadRewardError(
            f"rewards: found {float(rewards[rows[0]])} in row {rows[0]} ({len(rows)} of {len(rewards)} rows are not "
            f"finite){source}; mend the reward, or set training_settings.on_bad_reward to drop_sample or drop_group"
        )
    if on_bad_reward == "drop_group":
        bad = torch.isin(group_ids, group_ids[bad])
    elif on_bad_reward not in ("raise", "drop_sample"):
        raise ValueError(f"on_bad_reward: found {on_bad_reward!r}, allowed: 'raise', 'drop_sample', 'drop_group'")
    return rewards.masked_fill(bad, torch.nan)
