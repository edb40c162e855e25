"""What a saved policy says of itself: a model card beside the weights, whose every figure is read from the run."""

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from grpo_kit.config import Config, KitError
from grpo_kit.config.hardware import library_versions
from grpo_kit.runs.durable import replace_file

if TYPE_CHECKING:
    import torch

    from grpo_kit.models.policy import Policy

logger = logging.getLogger(__name__)
CARD = "README.md"
_ADAPTER = "adapter_config.json"
_RESULTS, _TRAINING = "## Results", "## Training"
_SIGNIFICANT = ("learning_rate", "num_iterations", "prompts_per_iteration", "group_size", "loss_type", "beta", "seed")
_NAMES = {"raw": "the user's own prompt", "initial": "before training", "trained": "this policy", "oracle": "oracle"}
_SNIPPET = """{imports}

folder = "."  # where this card lies, or this repository's name
model = {model}.from_pretrained({weights}, dtype={dtype!r}{quantised}){where}
model.generation_config = GenerationConfig({generation}){adapter}
processor = {processor}.from_pretrained(folder)

prompt = "a crimson ball, at night"
text = {instruction!r}.replace("{{prompt}}", prompt)
{ask}
ids = model.generate(**inputs)
print(processor.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())"""


def save_with_card(
    policy: "Policy",
    config: Config,
    folder: Path,
    iteration: int,
    state: "dict[str, torch.Tensor] | None" = None,
    *,
    num_prompts: int | None = None,
) -> None:
    """Write a policy as transformers (or peft) loads it, with a card that says what it is.

    Args:
        folder: where to, made if need be.
        iteration: after which the policy is saved.
        state: as for `Policy.save_pretrained`.
        num_prompts: how many it was trained on.
    """
    policy.save_pretrained(folder, state)
    _name_base_model(folder, _base_model(config))
    (folder / CARD).write_text(model_card(policy, config, iteration, num_prompts), encoding="utf-8")


def add_results(run: Path, policy: "Policy", results: Mapping) -> None:
    """Put the results of an evaluation into the card of a run's `best/`, where that holds the policy evaluated.

    Args:
        run: its folder.
        policy: the one that `results` calls "trained".
        results: the content of `final_results.json`.
    """
    place = run / "best" / CARD
    if not place.is_file() or "trained" not in results["variants"]:
        return
    try:
        if not policy.is_saved_in(place.parent):
            logger.warning("%s: left as it is, since another policy was evaluated than best/ holds", place)
            return
        card = ModelCard.load(place)
    except (KitError, ValueError, yaml.YAMLError) as error:
        logger.warning("%s: left as it is: %s", place, " ".join(str(error).split()))
        return
    found = _for_the_hub(results)
    card.data.model_name, card.data.eval_results = ("trained policy", found) if found else (None, None)
    text = _with_results(card.text, results)
    replace_file(place, f"---\n{card.data.to_yaml()}\n---\n\n{text}".encode())


def model_card(policy: "Policy", config: Config, iteration: int, num_prompts: int | None = None) -> str:
    """The card's text: front matter for the hub, then what the policy is, how to use it, and how it was made.

    Args: as for `save_with_card`.
    """
    base = _base_model(config)
    data = ModelCardData(
        base_model=None if _is_local(config) else base,  # the hub refuses a card that names none of its own
        library_name="peft" if config.model_settings.lora else "transformers",
        pipeline_tag="image-text-to-text" if policy.sees else "text-generation",
        tags=["grpo", "prompt-enhancement", "text-to-image"],
        iteration=iteration,
    )
    generator = _shown(config.to_dict()["model_settings"]["sd_model"])
    parts = (
        f"---\n{data.to_yaml()}\n---",
        "# A policy that rewrites prompts for a text-to-image model",
        f"From `{base}`, trained by grpo_kit with [GRPO](https://arxiv.org/abs/2402.03300) to rewrite a user's prompt "
        f"so that `{generator}` shows better what the user asked for; the weights after iteration {iteration}.",
        f"## Use\n\n```python\n{_snippet(policy, config)}\n```",
        f"{_TRAINING}\n\n{_training(config, num_prompts)}",
    )
    return "\n\n".join(parts) + "\n"


def _shown(name: str) -> str:
    """A model or file without this machine's path: relative to the project, or its name alone where it lies outside."""
    return Path(name).name if Path(name).is_absolute() else name


def _is_local(config: Config) -> bool:
    return Path(config.model_settings.vlm_model).is_absolute()


def _base_model(config: Config) -> str:
    return _shown(config.to_dict()["model_settings"]["vlm_model"])


def _name_base_model(folder: Path, name: str) -> None:
    """Let an adapter name its base model as the card does: peft writes the path on this machine."""
    place = folder / _ADAPTER
    if place.is_file():
        content = json.loads(place.read_text(encoding="utf-8")) | {"base_model_name_or_path": name}
        place.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- results ----------------------------------------------------------------------------------------------------------


def _for_the_hub(results: Mapping) -> list[EvalResult]:
    """The results as the hub's own tables take them; what could not be scored is left out."""
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=f"{results['num_prompts']} prompts",
            metric_type=metric,
            metric_value=value["mean"],
        )
        for metric, value in results["variants"]["trained"].items()
        if _is_known(value["mean"])
    ]


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _with_results(text: str, results: Mapping) -> str:
    """A card's text with these results, before its training or at its end, instead of those that it had."""
    sections = [part for part in re.split(r"^(?=## )", text, flags=re.MULTILINE) if not part.startswith(_RESULTS)]
    place = next((i for i, part in enumerate(sections) if part.startswith(_TRAINING)), len(sections))
    before, after = "".join(sections[:place]).strip(), "".join(sections[place:]).strip()
    return "\n\n".join(part for part in (before, _results(results), after) if part) + "\n"


def _results(results: Mapping) -> str:
    variants = results["variants"]
    metrics = [metric for metric in ("reward", "gold") if metric in variants["trained"]]
    cells = {name: [_cell(found.get(metric)) for metric in metrics] for name, found in variants.items()}
    table = [
        ["", *metrics],
        ["---"] * (1 + len(metrics)),
        *([_NAMES.get(name, name), *values] for name, values in cells.items()),
    ]
    told = (
        f"{_RESULTS}\n\n{results['num_prompts']} prompts, {results['seeds_per_prompt']} images each, drawn "
        f"from the same latents for every line; mean [{results['confidence']:.0%} interval over prompts].\n\n"
    )
    return told + "\n".join(f"| {' | '.join(row)} |" for row in table)


def _cell(found: Mapping | None) -> str:
    if found is None or not all(_is_known(found[name]) for name in ("mean", "low", "high")):
        return "not known"
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


# --- training ---------------------------------------------------------------------------------------------------------


def _training(config: Config, num_prompts: int | None) -> str:
    data, training = config.to_dict(), config.training_settings
    rewards = ", ".join(f"{weight:g} · {_shown(name)}" for name, weight in data["reward_settings"]["weights"].items())
    watched = ", ".join(map(_shown, data["reward_settings"]["monitors"]))
    number = "" if num_prompts is None else f"{num_prompts} "
    lora = config.model_settings.lora
    lines = [
        f"{number}prompts of `{_shown(data['training_settings']['train_prompts'])}`; held-out prompts of "
        f"`{_shown(data['evaluation_settings']['val_prompts'])}`",
        f"reward {rewards}, CLIP `{_shown(data['model_settings']['clip_model'])}`"
        + (f"; watched and not rewarded: {watched}" if watched else ""),
        *([] if lora is None else [f"LoRA of rank {lora.r}, alpha {lora.alpha:g}"]),
        ", ".join(f"{name} {getattr(training, name)}" for name in _SIGNIFICANT),
        ", ".join(f"{name} {version}" for name, version in library_versions().items()),
    ]
    return "\n".join(f"* {line}" for line in lines)


# --- use --------------------------------------------------------------------------------------------------------------


def _snippet(policy: "Policy", config: Config) -> str:
    """Code that gives the policy's likeliest rewrite with transformers (and peft) alone.

    A base model's own generation settings (a penalty of repetitions, say) are replaced: training knows none of them.
    """
    settings, adapter = config.model_settings, config.model_settings.lora is not None
    model, processor = (
        ("AutoModelForImageTextToText", "AutoProcessor") if policy.sees else ("AutoModelForCausalLM", "AutoTokenizer")
    )
    quantised = ["TorchAoConfig"] if settings.base_8bit else []
    imports = [
        *(["from peft import PeftModel"] if adapter else []),
        *(["from PIL import Image"] if settings.use_image else []),
        *(["from torchao.quantization import Int8WeightOnlyConfig"] if quantised else []),
        f"from transformers import {', '.join(sorted((model, processor, 'GenerationConfig', *quantised)))}",
    ]
    return _SNIPPET.format(
        imports="\n".join(imports),
        model=model,
        processor=processor,
        weights=repr(_base_model(config)) if adapter else "folder",
        quantised=", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())" if quantised else "",
        dtype=str(policy.model.dtype).removeprefix("torch."),
        where="  # a folder" if adapter and _is_local(config) else "",
        generation=f"max_new_tokens={policy.max_new_tokens}, {_ends(policy)}",
        adapter="\nmodel = PeftModel.from_pretrained(model, folder)" if adapter else "",
        instruction=policy.instruction,
        ask=(_chat(policy, settings.use_image) if policy.chats else _plainly(policy)) + _unused(policy),
    )


def _ends(policy: "Policy") -> str:
    return f"eos_token_id={policy.eos_token_ids}, pad_token_id={policy.tokenizer.pad_token_id}"


def _unused(policy: "Policy") -> str:
    """Drop what some tokenizers give beside ids and mask: in training the policy has not had it."""
    return '\ninputs.pop("token_type_ids", None)' if "token_type_ids" in policy.tokenizer.model_input_names else ""


def _chat(policy: "Policy", with_image: bool) -> str:
    system = f'{{"role": "system", "content": {policy.system_prompt!r}}}, ' if policy.system_prompt else ""
    picture = '{"type": "image"}, ' if with_image else ""
    content = f'[{picture}{{"type": "text", "text": text}}]' if policy.sees else "text"
    given = "text=[text], images=[image]" if with_image else "text=[text]"
    return (
        ('image = Image.open("drawn.png")  # what the generator draws for the prompt as it is\n' if with_image else "")
        + f'turns = [{system}{{"role": "user", "content": {content}}}]\n'
        + "text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)\n"
        + f'inputs = processor({given}, add_special_tokens=False, return_tensors="pt")'
    )


def _plainly(policy: "Policy") -> str:
    system = f'text = {policy.system_prompt!r} + "\\n" + text\n' if policy.system_prompt else ""
    return system + 'inputs = processor(text=[text], return_tensors="pt")'
