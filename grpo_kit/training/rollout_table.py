"""A rollout as the table that a run keeps, a row a sample; `training.restore` reads it back."""

from collections.abc import Sequence

import pandas as pd
import torch

from grpo_kit.rollout import Rollout


def rollout_table(
    iteration: int,
    rollout: Rollout,
    advantages: Sequence[float],
    thumbnails: Sequence[str | None],
    token_texts: Sequence[Sequence[str]],
    logprobs: dict[str, torch.Tensor],
) -> pd.DataFrame:
    """One row a sample: texts, seeds, rewards, advantage, thumbnail, and its tokens with their log-probabilities.

    Args:
        advantages: N.
        thumbnails: N paths of small pictures; None where there is none.
        token_texts: each row's tokens as text.
        logprobs: name → (N, T), a column each: under the policy that sampled, the reference, the updated policy.
    """
    rows = []
    first_rows = torch.searchsorted(rollout.group_ids, rollout.group_ids)  # of each row's group
    for row, (group, advantage) in enumerate(zip(rollout.group_ids.tolist(), advantages, strict=True)):
        prompt, kept = rollout.prompts[group], rollout.completion_mask[row]
        rows.append(
            {
                "iteration": iteration,
                "group_id": group,
                "sample": row - int(first_rows[row]),
                "user_prompt": prompt.user_prompt,
                "category": prompt.category,
                "difficulty": prompt.difficulty,
                "enhanced_prompt": rollout.enhanced_prompts[row],
                "image_seed": int(rollout.image_seeds[row, 0]),
                **({} if rollout.attempts is None else {"attempt": int(rollout.attempts[group])}),
                "reward": float(rollout.rewards[row]),
                "advantage": float(advantage),
                **{f"reward/{name}": float(values[row]) for name, values in rollout.reward_parts.items()},
                "thumbnail": thumbnails[row],
                "completion_ids": rollout.completion_ids[row][kept].tolist(),
                "tokens": list(token_texts[row]),
                **{name: values[row][kept].tolist() for name, values in logprobs.items()},
            }
        )
    return pd.DataFrame(rows)
