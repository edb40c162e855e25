"""One prompt, rewritten by a policy, drawn and scored: the first thing to look at, on a page of its own."""

from pathlib import Path

from PIL import Image

from grpo_kit.config import Config
from grpo_kit.config.media import as_html
from grpo_kit.experiment import load_experiment
from grpo_kit.grpo import group_advantages
from grpo_kit.rollout import collect_rollout
from grpo_kit.show.pages import data_uri, write_page
from grpo_kit.show.style import image_bytes


def write_first_group(prompt: str, config: Config, page: Path) -> Path:
    """Draw a group of rewrites of one prompt, by the policy as it is before training, and write the page that shows it.

    The page needs no network. Returns its path.
    """
    kit, settings = load_experiment(config), config.training_settings
    rollout = collect_rollout(kit.policy, kit.generator, kit.rewards, [prompt], settings.group_size, settings.seed)
    rewards, advantages = rollout.rewards, group_advantages(rollout.rewards, rollout.group_ids)
    samples = []
    for row in rewards.nan_to_num(-1e9).argsort(descending=True).tolist():
        medium, text = rollout.images[row][0], rollout.enhanced_prompts[row]
        picture = data_uri(image_bytes(medium, "PNG"), "png") if isinstance(medium, Image.Image) else None
        played = as_html(medium, f"What the generator made of: {text}", "100%") if medium and not picture else ""
        samples.append((picture, played, text, float(rewards[row]), float(advantages[row])))
    return write_page(page, "first_group.html.j2", prompt=prompt, samples=samples)
