"""Loading language models, and adding LoRA adapters to them."""

import re
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from grpo_kit.config import ConfigError, LoraSettings
from grpo_kit.config.hub import ModelError, load_failure, require_weights
from grpo_kit.config.quiet import loading_quietly
from grpo_kit.config.seeds import derive_seed
from grpo_kit.models.adapters import load_adapter

_LINEAR = (torch.nn.Linear, Conv1D)  # GPT-2's linear layers are Conv1D


@loading_quietly()
def load_language_model(
    name: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    base_8bit: bool = False,
    adapter: str | None = None,
) -> tuple[torch.nn.Module, object]:
    """A vision-language model with its processor, or a text-only one with its tokenizer, by folder or hub id.

    The processor is that of the `adapter` which will stand on the model, where it brings one.

    Raises:
        ModelError: it cannot be loaded, or lacks weights.
        ConfigError: `base_8bit` without torchao, or for a model without layers that it changes.
    """
    quantised = eight_bits("base_8bit") if base_8bit else {}
    options = {"trust_remote_code": trust_remote_code}
    try:
        kind = transformers.AutoConfig.from_pretrained(name, **options).model_type
        if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            model_class, processor_class = transformers.AutoModelForImageTextToText, transformers.AutoProcessor
        else:
            model_class, processor_class = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
        model, found = model_class.from_pretrained(name, dtype=dtype, output_loading_info=True, **options, **quantised)
        own = "processor_config.json" if processor_class is transformers.AutoProcessor else "tokenizer_config.json"
        source = adapter if adapter and _has_file(adapter, own) else name
        processor = processor_class.from_pretrained(source, **options)
    except Exception as error:  # the libraries raise a dozen kinds
        failure = load_failure("model_settings.vlm_model", name, error)
        if adapter is None:
            raise failure from error
        raise ModelError(
            f"{failure}. It is the model below the adapter {adapter!r}: set vlm_model to where it is, and "
            "policy_adapter to the adapter"
        ) from error
    require_weights(found["missing_keys"], "model_settings.vlm_model", name)
    if base_8bit and not any(hasattr(weight, "qdata") for weight in model.parameters()):
        raise ConfigError(
            f"model_settings.base_8bit: found true, but {type(model).__name__} has no layer that can be kept so. Set "
            "false"
        )
    return model.eval(), processor


def _has_file(name: str, file: str) -> bool:
    """Whether a model, by folder or hub id, has a file."""
    absent = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    return cached_file(name, file, **absent) is not None


def eight_bits(setting: str) -> dict[str, object]:
    """Arguments of `from_pretrained` that keep linear layers' weights in 8 bits, with one scale for each row (torchao).

    The layers multiply in the model's dtype, so that a row's result does not depend on the other rows of its batch.

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
    return {"quantization_config": transformers.TorchAoConfig(Int8WeightOnlyConfig())}


def add_lora(model: torch.nn.Module, lora: LoraSettings, trained: Path | None, seed: int) -> torch.nn.Module:
    """The model with a new adapter, initialised from the seed, or with the trained adapter in a folder."""
    from peft import LoraConfig, get_peft_model

    if trained is not None:
        return load_adapter(model, str(trained))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or language_layers(model),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with torch.random.fork_rng(devices=[]):  # peft initialises the adapter from the global random numbers
        torch.manual_seed(derive_seed(seed, "adapter"))
        return get_peft_model(model, config)


def language_layers(model: torch.nn.Module) -> str:
    """A regular expression for the names of the decoder's linear layers, for peft.

    Left out are the vision tower with its projection, which a policy that reads text alone would not train, and the
    language head, which may share its weights with the embeddings.

    Raises:
        ModelError: there are no such layers.
    """
    decoder = model.get_decoder()
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is decoder)
    names = {name.rsplit(".", 1)[-1] for name, module in decoder.named_modules() if isinstance(module, _LINEAR)}
    if not names:
        raise ModelError(
            "model_settings.lora.target_modules: found null, but no linear layers in this model; name the layers"
        )
    return rf"{re.escape(prefix)}(.*\.)?({'|'.join(sorted(names))})"
