"""Loading models by folder or hub id, and saying in one line what to do where that fails."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    TorchAoConfig,
)
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from grpo_kit.config import ConfigError, KitError, LoraSettings
from grpo_kit.hardware import derive_seed

_MIRRORS = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
_OPEN = {  # of the same kind as those that people meet a licence at; none of them asks for one
    "sd_model": "stabilityai/stable-diffusion-xl-base-1.0, stable-diffusion-v1-5/stable-diffusion-v1-5",
    "vlm_model": "Qwen/Qwen2.5-VL-3B-Instruct, HuggingFaceTB/SmolVLM-500M-Instruct",
}
_GATED = ("stabilityai/stable-diffusion-3", "black-forest-labs/FLUX.1-dev", "meta-llama/", "google/gemma-")
_LINEAR = (torch.nn.Linear, Conv1D)  # GPT-2's linear layers are called Conv1D


class ModelError(KitError):
    """A model that cannot be loaded or used; the message says what to do."""


def load_language_model(
    name: str, dtype: torch.dtype, trust_remote_code: bool = False, base_8bit: bool = False
) -> tuple[torch.nn.Module, object]:
    """A vision-language model with its processor, or a causal model with its tokenizer, from a folder or the hub."""
    quantised = eight_bits("base_8bit") if base_8bit else {}
    options = {"trust_remote_code": trust_remote_code}
    transformers_logging.disable_progress_bar()
    try:
        kind = AutoConfig.from_pretrained(name, **options).model_type
        if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            model_class, processor_class = AutoModelForImageTextToText, AutoProcessor
        else:
            model_class, processor_class = AutoModelForCausalLM, AutoTokenizer
        model, found = model_class.from_pretrained(name, dtype=dtype, output_loading_info=True, **options, **quantised)
        processor = processor_class.from_pretrained(name, **options)
    except Exception as error:  # the libraries raise a dozen kinds; each becomes one line that says what to do
        raise ModelError(load_failure("vlm_model", name, error)) from error
    require_weights(found["missing_keys"], "model_settings.vlm_model", name)
    if base_8bit and not any(hasattr(weight, "qdata") for weight in model.parameters()):
        raise ConfigError(
            f"model_settings.base_8bit: found true, but {type(model).__name__} has no layer that can be kept so. Set "
            "false"
        )
    return model.eval(), processor


def eight_bits(setting: str) -> dict[str, object]:
    """How `from_pretrained` keeps the weights of linear layers in 8 bits, with a scale for each row (torchao).

    They are multiplied in the model's dtype, so that a row's result does not depend on what stands beside it.

    Raises:
        ConfigError: torchao is not installed; the line names the `setting`.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError:
        raise ConfigError(
            f"model_settings.{setting}: found true, but torchao is not installed. Install it: "
            "pip install 'torchao>=0.18,<1'"
        ) from None
    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}


def require_weights(missing: Collection[str], setting: str, name: str, part: str = "model") -> None:
    """Raise where weights of a model came from no file: the libraries warn, and draw them at random.

    Raises:
        ModelError: `missing`, the names of such weights, is not empty; the line names the `setting`.
    """
    if missing:
        raise ModelError(
            f"{setting}: found {name!r} without {len(missing)} weights of its {part} ({min(missing)} …), which would "
            "be random; a file there is damaged or of another model: fetch it again, or take a folder that "
            "save_pretrained wrote"
        )


def add_lora(model: torch.nn.Module, lora: LoraSettings, trained: Path | None, seed: int) -> torch.nn.Module:
    """The model with a new adapter, whose start the seed fixes, or with the trained one of a run's folder."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if trained is not None:
        return PeftModel.from_pretrained(model, str(trained), is_trainable=True)
    targets = lora.target_modules or language_layers(model)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with torch.random.fork_rng(devices=[]):  # peft draws the adapter's start from the global stream
        torch.manual_seed(derive_seed(seed, "adapter"))
        return get_peft_model(model, config)


def language_layers(model: torch.nn.Module) -> str:
    """A regular expression of the names of the linear layers of the language model, for peft.

    Neither the vision tower and what joins it to the text, which a policy that reads words alone would never train, nor
    the head, which may share its weights with the embeddings.
    """
    decoder = model.get_decoder()
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is decoder)
    names = {name.rsplit(".", 1)[-1] for name, module in decoder.named_modules() if isinstance(module, _LINEAR)}
    if not names:
        raise ModelError(
            "model_settings.lora.target_modules: found null, but no linear layers in this model; name the layers"
        )
    return rf"{re.escape(prefix)}(.*\.)?({'|'.join(sorted(names))})"


def load_failure(setting: str, name: str, error: Exception, repository: str | None = None) -> str:
    """One line for a model that did not load: which, why, and what to do about it.

    Args:
        setting: the key of `model_settings` that named it, or another dotted place.
        repository: where the hub has it, if its name does not say so.
    """
    place = setting if "." in setting else f"model_settings.{setting}"
    reason = " ".join(str(error).split())[:300]
    advice = _advice(setting, repository or name, error)
    return f"{place}: could not load {name!r} ({type(error).__name__}: {reason}); {advice}"


def _advice(setting: str, name: str, error: Exception) -> str:
    """What to do about a model that did not load, by what the hub answered, deep down in the error."""
    kinds = {type(cause) for cause in _causes(error)}
    repository = "/".join(name.removeprefix("hf-hub:").split("/")[:2])  # what comes behind is a file in it
    page = f"https://huggingface.co/{repository}"
    if Path(name).is_dir():
        return "a file there is missing or damaged: restore it (git checkout), or train it again (make models)"
    if Path(name).is_absolute():
        return "there is no such folder on this machine: check the path, or give a hub id"
    if name in _MIRRORS:
        return (
            f"its owner took it off the hub, where the same weights are {(mirror := _MIRRORS[name])!r}: set that, and "
            f"fetch it once where there is network (`hf download {mirror}`)"
        )
    if GatedRepoError in kinds:
        others = f", or take one that asks for no licence: {_OPEN[setting]}" if setting in _OPEN else ""
        return f"accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN{others}"
    if RepositoryNotFoundError in kinds:
        return (
            f"check the name: the hub shows no {page}; where it is private, log in with `hf auth login` or set HF_TOKEN"
        )
    gated = f" (it asks for a licence first, at {page}, and for HF_TOKEN)" if name.startswith(_GATED) else ""
    return (
        f"check the name, or the folder; fetch a model once where there is network (`hf download {repository}`)"
        f"{gated}, or take HF_HOME along from there; without network use profile tiny"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what led to it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
