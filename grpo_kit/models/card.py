"""The model card of a saved policy: what it is, how to use it without the kit, how it was trained, and its results."""

import json
import logging
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template

from grpo_kit.config import Config, KitError, one_line
from grpo_kit.config.hardware import library_versions
from grpo_kit.config.paths import inside_project
from grpo_kit.models.adapters import base_and_adapter
from grpo_kit.runs.durable import replace_file
from grpo_kit.runs.own_rewards import Entries, rewarded, watched

if TYPE_CHECKING:
    import torch

    from grpo_kit.models.policy import Policy

logger = logging.getLogger(__name__)
CARD = "README.md"
_RESULTS, _TRAINING = "## Results", "## Training"
_SIGNIFICANT = ("learning_rate", "num_iterations", "prompts_per_iteration", "group_size", "loss_type", "beta", "seed")
_NAMES = {"raw": "the user's own prompt", "initial": "before training", "trained": "this policy", "oracle": "oracle"}


def save_with_card(
    policy: "Policy",
    config: Config,
    folder: Path,
    iteration: int,
    state: "dict[str, torch.Tensor] | None" = None,
    *,
    num_prompts: int | None = None,
    rewards: Entries | None = None,
) -> None:
    """Write a policy as transformers (or peft) loads it, and its card, after an iteration.

    Args:
        state: as for `Policy.save_pretrained`.
        num_prompts: how many prompts it was trained on.
        rewards: what it was trained on (`Rewards.record`); None is what the config names.
    """
    policy.save_pretrained(folder, state)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():  # peft writes the base model's path on this machine
        base = _public_name(base_and_adapter(config.model_settings, fetch=False)[0])
        content = json.loads(adapter.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
        adapter.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(model_card(policy, config, iteration, num_prompts, rewards), encoding="utf-8")


def model_card(
    policy: "Policy", config: Config, iteration: int, num_prompts: int | None = None, rewards: Entries | None = None
) -> str:
    """The card's text; the arguments are those of `save_with_card`.

    Its code gives the policy's likeliest rewrite with transformers (and peft) alone. It replaces the base model's own
    generation settings (a repetition penalty, say), which training does not use.
    """
    settings, data = config.model_settings, config.to_dict()
    base, adapter = base_and_adapter(settings, fetch=False)
    is_local = Path(base).is_absolute()
    head = ModelCardData(
        base_model=None if is_local else base,  # the hub refuses a name that it does not have
        library_name="peft" if settings.lora else "transformers",
        pipeline_tag="image-text-to-text" if policy.sees else "text-generation",
        tags=["grpo", "prompt-enhancement", "text-to-image"],
        iteration=iteration,
    )
    text = _template().render(
        card_data=head.to_yaml(),
        iteration=iteration,
        policy=policy,
        oldest="5.6" if policy.model.config.model_type.startswith("llava") else "5.0",  # its vision tower's names
        dtype=str(policy.model.dtype).removeprefix("torch."),
        is_local=is_local,
        settings=settings,
        models={name: _public_name(data["model_settings"][name]) for name in ("sd_model", "clip_model")},
        base=_public_name(base),
        adapter=adapter and _public_name(adapter),
        loras=[f"`{_public_name(one.path)}` ({one.weight:g})" for one in settings.generator_lora or ()],
        negative_prompt=config.generation_settings.negative_prompt,
        rewarded=rewarded(known := rewards or _named(data["reward_settings"])),
        watched=watched(known),
        train_prompts=_public_name(data["training_settings"]["train_prompts"]),
        val_prompts=_public_name(data["evaluation_settings"]["val_prompts"]),
        num_prompts=num_prompts,
        training={name: data["training_settings"][name] for name in _SIGNIFICANT},
        versions=library_versions(),
        repr=repr,
    )
    return ModelCard(text).content + "\n"


@cache
def _template() -> Template:
    return Template(Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8"))


def _named(settings: Mapping) -> Entries:
    """The rewards that a config names."""
    weights = {name: settings["weights"].get(name) for name in (*settings["weights"], *settings["monitors"])}
    return {_public_name(name): {"weight": weight, "reward": name} for name, weight in weights.items()}


def _public_name(name: str) -> str:
    """A model or file without this machine's folders: relative to the project, or its last part outside of it."""
    name = inside_project("", name)
    return Path(name).name if Path(name).is_absolute() else name


def load_card(folder: Path) -> ModelCard:
    """The card of a saved policy.

    Raises:
        KitError: its head is no YAML, or not a card's.
    """
    try:
        return ModelCard.load(folder / CARD)
    except (ValueError, yaml.YAMLError) as error:
        raise KitError(f"{folder / CARD}: {one_line(error)}; correct the lines at its head") from error


# --- results ----------------------------------------------------------------------------------------------------------


def add_results(run: Path, policy: "Policy", results: Mapping) -> None:
    """Put an evaluation's results (`final_results.json`) into the card of a run's `best/`, if that holds its policy."""
    place = run / "best" / CARD
    if not place.is_file() or "trained" not in results["variants"]:
        return
    try:
        if not policy.is_saved_in(place.parent):
            logger.warning("%s: left as it is, since another policy was evaluated than best/ holds", place)
            return
        card = load_card(place.parent)
    except KitError as error:
        logger.warning("%s: left as it is: %s", place, error)
        return
    found = _for_the_hub(results)
    card.data.model_name, card.data.eval_results = ("trained policy", found) if found else (None, None)
    sections = [part for part in re.split(r"^(?=## )", card.text, flags=re.MULTILINE) if not part.startswith(_RESULTS)]
    end = next((i for i, part in enumerate(sections) if part.startswith(_TRAINING)), len(sections))
    before, after = "".join(sections[:end]).strip(), "".join(sections[end:]).strip()
    text = "\n\n".join(part for part in (before, _results(results), after) if part)  # in place of older results
    replace_file(place, f"---\n{card.data.to_yaml()}\n---\n\n{text}\n".encode())


def _for_the_hub(results: Mapping) -> list[EvalResult]:
    """The results in the hub's form, without those that could not be scored."""
    data = {"dataset_type": "prompts", "dataset_name": f"{results['num_prompts']} prompts"}
    return [
        EvalResult(task_type="text-to-image", metric_type=metric, metric_value=value["mean"], **data)
        for metric, value in results["variants"]["trained"].items()
        if _is_known(value["mean"])
    ]


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _results(results: Mapping) -> str:
    variants = results["variants"]
    metrics = [metric for metric in ("reward", "gold") if metric in variants["trained"]]
    rows = [["", *metrics], ["---"] * (1 + len(metrics))]
    for name, found in variants.items():
        rows.append([_NAMES.get(name, name), *(_cell(found.get(metric)) for metric in metrics)])
    head = (
        f"{_RESULTS}\n\n{results['num_prompts']} prompts, {results['seeds_per_prompt']} images each, drawn "
        f"from the same latents for every line; mean [{results['confidence']:.0%} interval over prompts].\n\n"
    )
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(found: Mapping | None) -> str:
    if found is None or not all(_is_known(found[name]) for name in ("mean", "low", "high")):
        return "not known"
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
