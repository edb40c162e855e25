"""One prompt, rewritten by a policy, drawn and scored: the first thing to look at, on a page of its own."""

import io
from pathlib import Path

from grpo_kit.config import Config
from grpo_kit.experiment import load_experiment
from grpo_kit.grpo import group_advantages
from grpo_kit.rollout import collect_rollout
from grpo_kit.show.pages import data_uri, write_page


def write_first_group(prompt: str, config: Config, page: Path) -> Path:
    """Draw a group of rewrites of one prompt, by the policy as it is before training, and write the page that shows it.

    The page needs no network. Returns its path.
    """
    kit, settings = load_experiment(config), config.training_settings
    rollout = collect_rollout(kit.policy, kit.generator, kit.rewards, [prompt], settings.group_size, settings.seed)
    rewards, advantages = rollout.rewards, group_advantages(rollout.rewards, rollout.group_ids)
    samples = []
    for row in rewards.nan_to_num(-1e9).argsort(descending=True).tolist():
        rollout.images[row][0].save(stream := io.BytesIO(), "PNG")
        picture, advantage = data_uri(stream.getvalue(), "png"), float(advantages[row])
        samples.append((picture, rollout.enhanced_prompts[row], float(rewards[row]), advantage))
    return write_page(page, "first_group.html.j2", prompt=prompt, samples=samples)
