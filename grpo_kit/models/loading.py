"""A policy's model: loading it whole, adding a LoRA adapter, and its weights (or the adapter's) in a folder."""

import re
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from grpo_kit.config import ConfigError, LoraSettings
from grpo_kit.config.hub import ModelError, load_whole, loading
from grpo_kit.config.quiet import loading_quietly, quiet_libraries
from grpo_kit.config.seeds import derive_seed
from grpo_kit.grpo.finite import non_finite_weight

_SETTING = "model_settings.vlm_model"
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
        with loading(_SETTING, name):
            kind = transformers.AutoConfig.from_pretrained(name, **options).model_type
            if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
                model_class, processor_class = transformers.AutoModelForImageTextToText, transformers.AutoProcessor
                own = "processor_config.json"
            else:
                model_class, processor_class = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
                own = "tokenizer_config.json"
            model = load_whole(model_class, name, _SETTING, dtype=dtype, **options, **quantised)
            source = adapter if adapter and _has_file(adapter, own) else name
            processor = processor_class.from_pretrained(source, **options)
    except ModelError as error:
        if adapter is None:
            raise
        raise ModelError(
            f"{error}. It is the model below the adapter {adapter!r}: set vlm_model to where it is, and "
            "policy_adapter to the adapter"
        ) from error
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
    Without torchao it is a `ConfigError` about the `setting`.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError:
        raise ConfigError(
            f"model_settings.{setting}: found true, but torchao is not installed. Install it: "
            "pip install 'torchao>=0.18,<1'"
        ) from None
    return {"quantization_config": transformers.TorchAoConfig(Int8WeightOnlyConfig())}


def add_lora(model: torch.nn.Module, lora: LoraSettings, seed: int) -> torch.nn.Module:
    """The model with a new adapter, initialised from the seed."""
    from peft import LoraConfig, get_peft_model

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
    """
    decoder = model.get_decoder()
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is decoder)
    names = {name.rsplit(".", 1)[-1] for name, module in decoder.named_modules() if isinstance(module, _LINEAR)}
    if not names:
        raise ModelError("model_settings.lora.target_modules: found null, but no linear layers here; name the layers")
    return rf"{re.escape(prefix)}(.*\.)?({'|'.join(sorted(names))})"


# --- weights in a folder ----------------------------------------------------------------------------------------------


def save_weights(model: torch.nn.Module, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write a model, or its adapter alone where it has one; `ModelError` where a weight is not finite.

    Args:
        state: the model's full state dict, where each process holds only parts of the tensors.
    """
    if trouble := non_finite_weight(dict(model.named_parameters()) if state is None else state):
        raise ModelError(
            f"policy: not finite: {trouble.detail}; it is not saved. Load other weights, or set "
            "model_settings.dtype to float32 (float16 overflows at 65504)"
        )
    # peft would ask the hub at every save whether the vocabulary has changed; the kit never changes it
    options = {"save_embedding_layers": False} if _has_adapter(model) else {}
    model.save_pretrained(folder, state_dict=state, **options)


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Load what `save_weights` wrote, bit for bit; `ModelError` where the folder holds no weights of this model."""
    saved = _read(model, folder)
    if _has_adapter(model):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, saved)
    else:
        model.load_state_dict(saved)


def has_weights_of(model: torch.nn.Module, folder: Path) -> bool:
    """Whether `load_weights` of a folder would change nothing; it raises as that does."""
    saved = _read(model, folder)
    return all(torch.equal(value.cpu(), saved[name].to("cpu", value.dtype)) for name, value in _own(model).items())


def _has_adapter(model: torch.nn.Module) -> bool:
    return hasattr(model, "peft_config")


def _own(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights under the names that a saved folder gives them."""
    if not _has_adapter(model):
        return model.state_dict()
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


@quiet_libraries()
def _read(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a folder, checked for the names and shapes of the model's own."""
    with loading(_SETTING, str(folder)):
        if _has_adapter(model):
            from peft import load_peft_weights

            saved = load_peft_weights(str(folder), device=str(model.device))
        else:
            loaded, info = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
            differs = info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]
            saved = {} if differs else loaded.state_dict()
    shapes = {name: value.shape for name, value in _own(model).items()}
    if shapes != {name: value.shape for name, value in saved.items()}:
        raise ModelError(f"policy {folder}: found other tensors than the policy has; use the run's own config")
    return saved
