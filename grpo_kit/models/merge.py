"""A run's LoRA policy as whole weights, for servers that take no adapter."""

import os
from pathlib import Path

from huggingface_hub import ModelCard

from grpo_kit.config import KitError, load_config
from grpo_kit.models.adapters import merged
from grpo_kit.models.card import CARD, save_with_card
from grpo_kit.models.policy import load_policy
from grpo_kit.runs.durable import flush_tree, remove


def merge_run(run: Path, out: Path | None = None) -> Path:
    """Write the policy of a run's `best/` whole, as transformers and the kit open it, with its card; returns where.

    Args:
        run: its folder.
        out: a new folder; None means `merged/` in the run.

    Raises:
        KitError: there is no adapter, the folder is there already, or the adapter cannot be merged.
    """
    best, place = run / "best", run / "merged" if out is None else out.expanduser().resolve()
    if not (best / "adapter_config.json").is_file():
        found = "holds whole weights: use it as it is" if (best / "config.json").is_file() else "no policy there"
        raise KitError(f"{best}: {found}. Allowed: a run that trained with model_settings.lora")
    if place.exists():
        raise KitError(f"--out {place}: is there already. Remove it, or name a new folder")
    config = load_config(run, {"model_settings.base_8bit": False})
    policy = load_policy(config, best)
    policy.model = merged(policy.model)
    iteration = ModelCard.load(best / CARD).data.to_dict().get("iteration", 0) if (best / CARD).is_file() else 0
    aside = place.with_name(f".writing-{place.name}")
    remove(aside)
    save_with_card(policy, load_config(config, {"model_settings.lora": None}), aside, iteration)
    flush_tree(aside)
    os.replace(aside, place)
    return place
