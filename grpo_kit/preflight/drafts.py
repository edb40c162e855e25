"""How few denoising steps, and how few latents, still rank a group's rewrites rightly? Measured on a config's models.

The policy as it is writes a group of rewrites for some training prompts. Each rewrite is drawn with fewer steps; the
judge is the mean reward of other latents, drawn with all steps.
"""

import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
from tqdm import tqdm

from grpo_kit.config import Config, KitError
from grpo_kit.config.prompts import Prompt, balanced_batch
from grpo_kit.evaluation.audit import rank_correlation
from grpo_kit.evaluation.evaluate import draw_and_score
from grpo_kit.evaluation.intervals import bootstrap_interval
from grpo_kit.evaluation.writers import Request
from grpo_kit.experiment import Experiment, load_experiment
from grpo_kit.models.conversation import Conversation

PROMPTS = 8
LATENTS = (1, 2, 3)  # of a rewrite
_DRAWN = 6  # latents of each rewrite, so that each number of them is tried several times; the judge has as many


def rank_agreement(kit: Experiment, prompts: Sequence[Prompt] | None = None) -> pd.DataFrame:
    """Rank correlation with the judge within a group, and its price, for numbers of steps and of latents.

    Args:
        prompts: of users, each gets a group of rewrites; by default 8 of the training prompts.

    Returns:
        A row each: steps; latents; agreement, the mean over prompts of Spearman's correlation (0 where all rewards are
        the same), with low and high of its interval over prompts; seconds to draw and score a rewrite.
    """
    settings, generation = kit.config.training_settings, kit.config.generation_settings
    prompts = prompts or balanced_batch(kit.train_prompts, PROMPTS, settings.seed, 0)
    asked = kit.policy.encode([Conversation(prompt.user_prompt, tuple(prompt.pictures())) for prompt in prompts])
    written = iter(kit.policy.sample(asked, settings.group_size, seed=settings.seed).texts)
    requests = [
        Request(n, prompt, next(written)) for n, prompt in enumerate(prompts) for _ in range(settings.group_size)
    ]
    full = kit.generator.num_inference_steps
    tried = {*(max(1, full // part) for part in (8, 4, 2)), full, min(generation.rollout_steps or full, full)}
    rewards, table = {}, []
    for steps in tqdm(sorted(tried, reverse=True), "steps"):
        latents = _DRAWN * (2 if steps == full else 1)
        clock = time.perf_counter()
        with kit.generator.steps(steps):
            rows, _ = draw_and_score(kit, requests, "sampled", latents)
        seconds = (time.perf_counter() - clock) / len(rows)
        rewards[steps] = np.array([row["reward"] for row in rows]).reshape(len(prompts), -1, latents)
        judge = rewards[full][:, :, _DRAWN:].mean(axis=2)
        for count in LATENTS:
            found = bootstrap_interval(_agreement(rewards[steps][:, :, :_DRAWN], judge, count))
            row = {"steps": steps, "latents": count, "agreement": found.mean, "low": found.low, "high": found.high}
            table.append(row | {"seconds": count * seconds})
    return pd.DataFrame(table).sort_values(["steps", "latents"], ignore_index=True)


def _agreement(rewards: np.ndarray, judge: np.ndarray, count: int) -> np.ndarray:
    """(P,) of rewards (P, G, latents) with the judge (P, G): the mean over the means of `count` latents at a time."""
    means = [part.mean(axis=2) for part in np.split(rewards, rewards.shape[2] // count, axis=2)]
    kept = np.isfinite(judge) & np.isfinite(means).all(axis=0)  # a picture may have failed
    each = [[rank_correlation(mean[g][kept[g]], judge[g][kept[g]]) for g in range(len(judge))] for mean in means]
    return np.mean(each, axis=0)


def drafts_text(config: Config, device: str = "", memory: str = "", *, json_too: bool = False) -> str:
    """The table of a config's models; a `KitError` for a `device` and `memory` that are not this machine's."""
    if device or memory:
        raise KitError("--drafts: found with --device or --memory, allowed: neither, since it measures this machine")
    table = rank_agreement(load_experiment(config))
    if table["agreement"].isna().all():
        raise KitError("rank agreement: found no group whose rewards differ, so nothing to rank. Weigh other rewards")
    return table.to_json(orient="records", indent=2) if json_too else in_words(table, config)


def in_words(table: pd.DataFrame, config: Config) -> str:
    """The table as lines of text, and the settings that rank best at no more than today's price."""
    generation = config.generation_settings
    full, count = generation.num_inference_steps, generation.images_per_prompt
    steps = min(generation.rollout_steps or full, full)
    group = f"{PROMPTS} prompts, {config.training_settings.group_size} rewrites each"
    title = f"{group}, judged by {_DRAWN} other latents with all {full} steps"
    lines = [title, "", "steps  latents  rank agreement       s a rewrite"]
    for row in table.itertuples():
        agreement = f"{row.agreement:.2f} [{row.low:.2f}, {row.high:.2f}]"
        lines.append(f"{row.steps:>5}  {row.latents:>7}  {agreement:<19}  {row.seconds:>11.3g}")
    price = count * table[(table["steps"] == steps) & (table["latents"] == 1)]["seconds"].item()
    best = table[table["seconds"] <= price].sort_values("agreement").iloc[-1]
    lines += [f"today: steps {steps}, latents {count}, {price:.3g} s a rewrite"]
    changes = {"rollout_steps": int(best["steps"]), "images_per_prompt": int(best["latents"])}
    options = " ".join(f"-o generation_settings.{name}={value}" for name, value in changes.items())
    lines += [f"ranks best for no more: agreement {best['agreement']:.2f} with {options}"]
    return "\n".join(lines)
