"""A rollout as the table that a run keeps, a row a sample; `training.restore` reads it back."""

import pandas as pd
import torch

from grpo_kit.config.contents import pictures_digest
from grpo_kit.experiment import Experiment
from grpo_kit.grpo.logprobs import kl_divergence
from grpo_kit.rollout import Rollout, score_rows, with_encoded
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.iterations import iteration_name
from grpo_kit.training.accumulation import micro_batches
from grpo_kit.training.step import StepStats


def keep_rollout(kit: Experiment, folder: RunFolder, iteration: int, rollout: Rollout, stats: StepStats) -> float:
    """Save a rollout's pictures and its table, with what the step did to each of its tokens.

    Returns:
        Its mean KL from the reference per token.
    """
    rollout = with_encoded(rollout, kit.policy)
    settings, count, name = kit.config.training_settings, len(rollout.rewards), iteration_name(iteration)
    parts = micro_batches(torch.arange(count), rollout.group_ids, settings.micro_batch_size or count)

    def scored(reference: bool) -> torch.Tensor:
        with torch.no_grad():
            scores = [score_rows(kit.policy, rollout, rows, reference=reference).logprobs.cpu() for rows in parts]
        return torch.cat(scores)

    def by_token(values: torch.Tensor) -> list[list]:
        return [row[kept].tolist() for row, kept in zip(values, rollout.completion_mask, strict=True)]

    reference = scored(reference=True) if stats.ref_logprobs is None else stats.ref_logprobs.cpu()
    groups = rollout.group_ids
    prompts = [rollout.prompts[group] for group in groups]
    columns = {
        "iteration": iteration,
        "group_id": groups.tolist(),
        "sample": (torch.arange(count) - torch.searchsorted(groups, groups)).tolist(),  # its place in the group
        "user_prompt": [prompt.user_prompt for prompt in prompts],
        "category": [prompt.category for prompt in prompts],
        "difficulty": [prompt.difficulty for prompt in prompts],
        **({"pictures": list(map(pictures_digest, prompts))} if any(one.images for one in prompts) else {}),
        "enhanced_prompt": rollout.enhanced_prompts,
        "image_seed": rollout.image_seeds[:, 0].tolist(),
        **({} if rollout.attempts is None else {"attempt": rollout.attempts[groups].tolist()}),
        "reward": rollout.rewards.tolist(),
        "advantage": stats.advantages.tolist(),
        **{f"reward/{part}": values.tolist() for part, values in rollout.reward_parts.items()},
        "thumbnail": [folder.save_thumbnail(row[0], f"{name}_row_{i:03d}") for i, row in enumerate(rollout.images)],
        "completion_ids": by_token(rollout.completion_ids),
        "tokens": kit.policy.token_texts(rollout.completion_ids, rollout.completion_mask),
        "old_logprobs": by_token(rollout.old_logprobs),
        "ref_logprobs": by_token(reference),
        "new_logprobs": by_token(scored(reference=False)),
    }
    folder.save_table(f"rollouts/{name}.parquet", pd.DataFrame(columns))
    kl = kl_divergence(rollout.old_logprobs, reference, estimator=settings.kl_estimator)
    return float(kl[rollout.completion_mask].mean())
