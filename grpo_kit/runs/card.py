"""What a saved policy says of itself: a model card beside the weights, whose every figure is read from the run."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from grpo_kit.config import Config
from grpo_kit.hardware import library_versions
from grpo_kit.models.policy import Policy
from grpo_kit.runs.durable import replace_file

CARD = "README.md"
_ADAPTER = "adapter_config.json"
_SIGNIFICANT = ("learning_rate", "num_iterations", "prompts_per_iteration", "group_size", "loss_type", "beta", "seed")
_NAMES = {"raw": "the user's own prompt", "initial": "before training", "trained": "this policy", "oracle": "oracle"}
_USED, _TRAINED = "## Results", "## Training"
_SNIPPET = """{imports}

folder = "."  # where this card lies, or this repository's name
model = {model}.from_pretrained({weights}, dtype="auto"){adapter}
processor = {processor}.from_pretrained(folder)

prompt = "a crimson ball, at night"
text = {text!r}.replace("{{prompt}}", prompt)  # as it was trained
inputs = processor(text=[text], add_special_tokens={special}, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
print(processor.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())"""


def save_with_card(
    policy: Policy, config: Config, folder: Path, iteration: int, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a policy as transformers (or peft) loads it, with a card that says what it is.

    Args:
        folder: where to, made if need be.
        iteration: after which the policy is saved.
        state: as for `Policy.save_pretrained`.
    """
    policy.save_pretrained(folder, state)
    _name_base_model(folder, _base_model(config))
    (folder / CARD).write_text(model_card(policy, config, iteration), encoding="utf-8")


def add_results(run: Path, config: Config, results: Mapping) -> None:
    """Put the results of an evaluation of a run's `best/` into its card, where it has one."""
    place = run / "best" / CARD
    if not place.is_file() or "trained" not in results["variants"]:
        return
    card = ModelCard.load(place)
    data = ModelCardData(**card.data.to_dict() | _for_the_hub(config, results))
    used, trained = card.text.split(_USED)[0].split(_TRAINED)[0].strip(), card.text.split(_TRAINED, 1)[1]
    body = "\n\n".join([used, _results(results), _TRAINED + trained.rstrip()])
    replace_file(place, f"---\n{data.to_yaml()}\n---\n\n{body}\n".encode())


def model_card(policy: Policy, config: Config, iteration: int) -> str:
    """The card's text: front matter for the hub, then what the policy is, how to use it, and how it was made.

    Args:
        iteration: after which the policy is saved.
    """
    base, generator = _base_model(config), config.to_dict()["model_settings"]["sd_model"]
    data = ModelCardData(
        base_model=base,
        library_name="peft" if config.model_settings.lora else "transformers",
        pipeline_tag="image-text-to-text" if policy.sees else "text-generation",
        tags=["grpo", "prompt-enhancement", "text-to-image"],
        iteration=iteration,
    )
    parts = (
        f"---\n{data.to_yaml()}\n---",
        "# A policy that rewrites prompts for a text-to-image model",
        f"From `{base}`, trained by grpo_kit with [GRPO](https://arxiv.org/abs/2402.03300) to rewrite a user's prompt "
        f"so that `{generator}` shows better what the user asked for; the weights after iteration {iteration}.",
        f"## Use\n\n```python\n{_snippet(policy, config)}\n```",
        _training(config),
    )
    return "\n\n".join(parts) + "\n"


def _base_model(config: Config) -> str:
    return config.to_dict()["model_settings"]["vlm_model"]


def _name_base_model(folder: Path, name: str) -> None:
    """Let an adapter name its base model as the config does: peft writes the path on this machine."""
    place = folder / _ADAPTER
    if place.is_file():
        content = json.loads(place.read_text(encoding="utf-8")) | {"base_model_name_or_path": name}
        place.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _for_the_hub(config: Config, results: Mapping) -> dict[str, object]:
    """The results as the hub's own tables take them."""
    prompts = Path(config.to_dict()["evaluation_settings"]["val_prompts"]).name
    found = [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=f"{results['num_prompts']} held-out prompts of {prompts}",
            metric_type=metric,
            metric_value=value["mean"],
        )
        for metric, value in results["variants"]["trained"].items()
    ]
    return {"model_name": "trained policy", "eval_results": found}


def _results(results: Mapping) -> str:
    variants = results["variants"]
    metrics = [metric for metric in ("reward", "gold") if metric in variants["trained"]]
    cells = {name: [_cell(found[metric]) for metric in metrics] for name, found in variants.items()}
    table = [
        ["", *metrics],
        ["---"] * (1 + len(metrics)),
        *([_NAMES.get(name, name), *values] for name, values in cells.items()),
    ]
    told = (
        f"{_USED}\n\n{results['num_prompts']} held-out prompts, {results['seeds_per_prompt']} images each, drawn "
        f"from the same latents for every line; mean [{results['confidence']:.0%} interval over prompts].\n\n"
    )
    return told + "\n".join(f"| {' | '.join(row)} |" for row in table)


def _cell(found: Mapping) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _training(config: Config) -> str:
    data, training = config.to_dict(), config.training_settings
    weights = ", ".join(f"{weight:g} · {name}" for name, weight in data["reward_settings"]["weights"].items())
    lines = [
        f"prompts `{data['training_settings']['train_prompts']}`",
        f"held-out prompts `{data['evaluation_settings']['val_prompts']}`",
        f"reward {weights}, CLIP `{data['model_settings']['clip_model']}`",
        ", ".join(f"{name} {getattr(training, name)}" for name in _SIGNIFICANT),
        ", ".join(f"{name} {version}" for name, version in library_versions().items()),
    ]
    return f"{_TRAINED}\n\n" + "\n".join(f"* {line}" for line in lines)


def _snippet(policy: Policy, config: Config) -> str:
    """Code that gives the policy's likeliest rewrite with transformers (and peft) alone."""
    vision = ("AutoModelForImageTextToText", "AutoProcessor")
    model, processor = vision if policy.sees else ("AutoModelForCausalLM", "AutoTokenizer")
    imports, text = f"from transformers import {model}, {processor}", policy.format_prompt("{prompt}")
    adapter = config.model_settings.lora is not None
    return _SNIPPET.format(
        imports=f"from peft import PeftModel\n{imports}" if adapter else imports,
        model=model,
        processor=processor,
        weights=repr(_base_model(config)) if adapter else "folder",
        adapter="\nmodel = PeftModel.from_pretrained(model, folder)" if adapter else "",
        text=text,
        special=not policy.writes_start(text),
        tokens=config.generation_settings.max_new_tokens,
    )
