"""A policy's weights in a folder, as transformers (or, of an adapter, peft) writes and loads them."""

from pathlib import Path

import torch

from grpo_kit.config.hub import ModelError, load_failure
from grpo_kit.grpo.finite import non_finite_weight


def save_weights(model: torch.nn.Module, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write a model, or its adapter alone where it has one.

    `state` is the model's state dict where its own has only a part of each tensor.

    Raises:
        ModelError: a weight is not finite.
    """
    if trouble := non_finite_weight(dict(model.named_parameters()) if state is None else state):
        raise ModelError(
            f"policy: not finite: {trouble.detail}; it is not saved. Load other weights, or set "
            "model_settings.dtype to float32 (float16 overflows at 65504)"
        )
    # peft would ask the hub whether the vocabulary has grown, at every save; the kit never changes it
    options = {"save_embedding_layers": False} if _adapted(model) else {}
    model.save_pretrained(folder, state_dict=state, **options)


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Put in what `save_weights` wrote, bit for bit.

    Raises:
        ModelError: it cannot be read, or belongs to another model.
    """
    saved = _saved(model, folder)
    if _adapted(model):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, saved)
    else:
        model.load_state_dict(saved)


def has_weights_of(model: torch.nn.Module, folder: Path) -> bool:
    """Whether `load_weights` of a folder would change nothing.

    Raises:
        ModelError: what is there cannot be read, or belongs to another model.
    """
    saved = _saved(model, folder)
    return all(torch.equal(value.cpu(), saved[name].to("cpu", value.dtype)) for name, value in _own(model).items())


def _adapted(model: torch.nn.Module) -> bool:
    """Whether an adapter is trained, rather than the model itself."""
    return hasattr(model, "peft_config")


def _own(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the names that a saved folder gives them."""
    if not _adapted(model):
        return model.state_dict()
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _saved(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """A folder's weights, which have the names and shapes of this model's own."""
    try:
        saved = _read_adapter(model, folder) if _adapted(model) else _read_model(model, folder)
    except Exception as error:  # the libraries raise a dozen kinds
        raise ModelError(load_failure("vlm_model", str(folder), error)) from error
    shapes = {name: value.shape for name, value in _own(model).items()}
    if shapes != {name: value.shape for name, value in saved.items()}:
        raise ModelError(f"policy {folder}: found other tensors than the policy has; use the run's own config")
    return saved


def _read_adapter(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    from peft import load_peft_weights

    return load_peft_weights(str(folder), device=str(model.device))


def _read_model(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Nothing where a weight is not there, or is not this model's."""
    saved, told = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    incomplete = told["missing_keys"] or told["unexpected_keys"] or told["mismatched_keys"]
    return {} if incomplete else saved.state_dict()
