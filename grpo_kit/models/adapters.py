"""LoRA adapters that a policy goes on from: finding the model below, loading, keeping a reference, merging."""

import copy
import json
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from transformers.utils.peft_utils import find_adapter_config_file

from grpo_kit.config import PROJECT_ROOT, ConfigError, KitError, ModelSettings, load_config, one_line
from grpo_kit.config.hub import ModelError, loading
from grpo_kit.config.paths import working_folder


def base_and_adapter(settings: ModelSettings, *, fetch: bool = True) -> tuple[str, str | None]:
    """The whole model, and the adapter on it (None without one), that `vlm_model` and `policy_adapter` name.

    `vlm_model` may be an adapter itself, a folder or hub id with an adapter_config.json. The model below is then the
    one that the adapter's run had, or the one that it names. Without `fetch` the hub is not asked for that file.

    Raises:
        KitError: the model below is not known; the adapter is no LoRA, or another one than `lora` says.
    """
    name, adapter = settings.vlm_model, settings.policy_adapter
    own = _adapter_config(name, "vlm_model", fetch)
    if adapter is None and own is None:
        return name, None
    if adapter is None:
        _require_fit(settings, name, own)
        return _base_of(name, own), name
    content = _adapter_config(adapter, "policy_adapter", fetch)
    if own is not None or content is None:
        key, found = ("vlm_model", name) if content else ("policy_adapter", adapter)
        allowed = "the whole model below policy_adapter" if content else "a peft adapter, with an adapter_config.json"
        raise ConfigError(f"model_settings.{key}: found {found!r}, allowed: the folder or hub id of {allowed}")
    _require_fit(settings, adapter, content)
    return name, adapter


def _adapter_config(name: str, setting: str, fetch: bool) -> dict | None:
    """The content of an adapter's configuration; None where the name is no adapter's, or not known at all."""
    with loading(f"model_settings.{setting}", name), suppress(OSError):  # of which loading the model says why
        place = find_adapter_config_file(name, local_files_only=not fetch)
        return None if place is None else json.loads(Path(place).read_text(encoding="utf-8"))
    return None


def _base_of(adapter: str, content: dict) -> str:
    """The model that an adapter was trained on: in its run's config, whose path is whole, else by its own account."""
    for folder in list(Path(adapter).parents)[:3] if Path(adapter).is_dir() else []:
        if (folder / "config.json").is_file():
            with suppress(KitError):  # another program's config.json
                base, _ = base_and_adapter(load_config(folder).model_settings, fetch=False)
                if not Path(base).is_absolute() or Path(base).is_dir():
                    return base
    named = content.get("base_model_name_or_path")
    for root in (working_folder(), PROJECT_ROOT) if named else ():
        if (root / named).is_dir():
            return str(root / named)
    if not named or Path(named).is_absolute() or named.startswith("."):
        raise ModelError(
            f"model_settings.vlm_model: found the adapter {adapter!r}, trained on {named!r}, which is not "
            "here. Set vlm_model to that model's folder or hub id, and model_settings.policy_adapter to the adapter"
        )
    return named


def _require_fit(settings: ModelSettings, adapter: str, content: dict) -> None:
    """Refuse an adapter that cannot be trained on, or that `lora` describes otherwise than it is."""
    if (kind := content.get("peft_type")) != "LORA":
        raise ModelError(f"model_settings: found the adapter {adapter!r} of kind {kind!r}, allowed: 'LORA'")
    if settings.lora is None:
        return
    found, there = [], []
    for key, name in {"r": "r", "alpha": "lora_alpha", "target_modules": "target_modules"}.items():
        wanted, own = getattr(settings.lora, key), content.get(name)
        if key == "target_modules":
            wanted, own = (sorted(one) if isinstance(one, list) else one for one in (wanted or own, own))
        if wanted != own:
            found.append(f"{key} {wanted}")
            there.append(f"{key} {own}")
    if found:
        raise ConfigError(
            f"model_settings.lora: found {', '.join(found)}, but the adapter {adapter!r} has {', '.join(there)}. Set "
            "lora so to go on from it, or lora: null to merge it and train all weights"
        )


def load_adapter(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The model with a trained LoRA adapter on it, by folder or hub id, ready to be trained on.

    It is a `ModelError` where the adapter belongs to another model, or lacks weights.
    """
    from huggingface_hub import snapshot_download
    from peft import PeftModel

    advice = "set the model that it was trained on, or fetch the adapter again"
    mapping = getattr(model, "_checkpoint_conversion_mapping", None)  # names that older versions gave
    try:
        with warnings.catch_warnings(action="ignore"):  # of missing weights, which are looked for below
            # peft asks the hub whether there are weights, which fails without a network even if they are in the cache
            folder = name if Path(name).is_dir() else snapshot_download(name, allow_patterns=["adapter_*"])
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=True)
            found = adapted.load_adapter(folder, "default", is_trainable=True, key_mapping=mapping)
    except Exception as error:  # the libraries raise a dozen kinds
        raise ModelError(
            f"model_settings: could not load the adapter {name!r} onto {type(model).__name__} ({type(error).__name__}: "
            f"{one_line(error, 300)}); {advice}"
        ) from error
    if lost := [*found.missing_keys, *found.unexpected_keys]:
        raise ModelError(
            f"model_settings: found the adapter {name!r}, whose file lacks {len(found.missing_keys)} weights and has "
            f"{len(found.unexpected_keys)} that {type(model).__name__} has no place for ({min(lost)} …); {advice}"
        )
    return adapted


def frozen_copy(adapted: torch.nn.Module) -> torch.nn.Module:
    """A copy of an adapter as it is now, frozen; the weights below it, which training does not change, are shared."""
    shared = {id(weight): weight for weight in adapted.parameters() if not weight.requires_grad}
    return copy.deepcopy(adapted, shared).requires_grad_(False)


def merged(adapted: torch.nn.Module) -> torch.nn.Module:
    """The whole model that an adapter and the model below it are together.

    It is a `ModelError` where the adapter is not finite, or changes one of two layers that share their weights.
    """
    whole = adapted.get_base_model()
    ends = (whole.get_input_embeddings(), whole.get_output_embeddings())
    changed = any(type(end).__module__.startswith("peft.") for end in ends)
    configs = (whole.config, whole.config.get_text_config())  # a model that sees may say it in either
    if changed and any(getattr(config, "tie_word_embeddings", False) for config in configs):
        raise ModelError(
            "model_settings: found an adapter on embeddings that the language head shares, which cannot be merged. Set "
            "model_settings.lora to go on from it as an adapter"
        )
    try:
        return adapted.merge_and_unload(safe_merge=True).requires_grad_(True)
    except ValueError as error:
        raise ModelError(f"model_settings: the adapter cannot be merged: {one_line(error)}") from error
