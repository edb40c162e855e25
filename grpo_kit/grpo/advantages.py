"""How much better than its group a sample is."""

import torch


def group_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    scale_rewards: str = "group",
    baseline: str = "mean",
    eps: float = 1e-4,
    noise_floor: float = 0.0,
    batch_rewards: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each reward less its group's baseline, divided by a spread: A = (r - baseline) / (std + eps).

    Args:
        rewards: (N,) one reward a sample; NaN where a sample could not be scored.
        group_ids: (N,) integers; samples with the same id answer the same prompt.
        scale_rewards: "group" divides by the group's unbiased standard deviation (GRPO, arXiv 2402.03300), "batch" by
            the standard deviation of all rewards, "none" by nothing (Dr. GRPO, arXiv 2503.20783).
        baseline: "mean" of the group, or "leave_one_out": the mean of the others (RLOO, arXiv 2402.14740).
        eps: added to the standard deviation.
        noise_floor: a group whose rewards lie no further apart than this gets 0: dividing by a tiny spread makes noise
            as loud as a real difference (arXiv 2508.20751).
        batch_rewards: (K,) rewards of all processes, for "batch"; None means that `rewards` are all.

    Returns:
        (N,) advantages. A NaN reward is left out of all statistics and gets 0; so does a group with one scored sample.
    """
    if rewards.shape != group_ids.shape or rewards.ndim != 1:
        raise ValueError(
            f"rewards, group_ids: found shapes {tuple(rewards.shape)} and {tuple(group_ids.shape)}, both must be (N,)"
        )
    scored = ~rewards.isnan()
    _, group = group_ids.unique(return_inverse=True)
    total, count = _sum_by(group, rewards.where(scored, 0.0)), _sum_by(group, scored.to(rewards.dtype))
    centred = rewards - (total / count.clamp(min=1))[group]
    # equal rewards give exactly 0, not a rounding error divided by eps
    flat = (group_spread(rewards, group) <= noise_floor)[group]
    centred = torch.where(scored & ~flat & (count[group] > 1), centred, 0.0)
    if baseline == "leave_one_out":
        advantages = centred * (count / (count - 1).clamp(min=1))[group]
    elif baseline == "mean":
        advantages = centred
    else:
        raise ValueError(f"baseline: found {baseline!r}, allowed: 'mean', 'leave_one_out'")
    if scale_rewards == "none":
        return advantages
    if scale_rewards == "group":
        deviation = (_sum_by(group, centred.square()) / (count - 1).clamp(min=1)).sqrt()[group]
    elif scale_rewards == "batch":
        everyone = rewards if batch_rewards is None else batch_rewards
        kept = everyone[~everyone.isnan()]
        deviation = kept.std() if len(kept) > 1 else 0.0
    else:
        raise ValueError(f"scale_rewards: found {scale_rewards!r}, allowed: 'group', 'batch', 'none'")
    return advantages / (deviation + eps)


def group_spread(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """(G,) highest less lowest scored reward of each group, in the order of the sorted ids."""
    group = group_ids.unique(return_inverse=True)[1]
    empty = rewards.new_zeros(int(group.max()) + 1 if group.numel() else 0)
    scored = ~rewards.isnan()
    highest = (empty - torch.inf).scatter_reduce(0, group, rewards.where(scored, -torch.inf), "amax")
    lowest = (empty + torch.inf).scatter_reduce(0, group, rewards.where(scored, torch.inf), "amin")
    return (highest - lowest).clamp(min=0)


def _sum_by(group: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return values.new_zeros(int(group.max()) + 1 if group.numel() else 0).index_add_(0, group, values)
