"""A policy's weights in a folder: a transformers model, or a peft adapter."""

from pathlib import Path

import torch

from grpo_kit.config.hub import ModelError, load_failure
from grpo_kit.config.quiet import quiet_libraries
from grpo_kit.grpo.finite import non_finite_weight


def save_weights(model: torch.nn.Module, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write a model, or its adapter alone where it has one.

    Args:
        state: the model's full state dict, where each process holds only parts of the tensors.

    Raises:
        ModelError: a weight is not finite.
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
    """Load what `save_weights` wrote, bit for bit.

    Raises:
        ModelError: the folder cannot be read, or holds another model's weights.
    """
    saved = _read(model, folder)
    if _has_adapter(model):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, saved)
    else:
        model.load_state_dict(saved)


def has_weights_of(model: torch.nn.Module, folder: Path) -> bool:
    """Whether `load_weights` of a folder would change nothing.

    Raises:
        ModelError: the folder cannot be read, or holds another model's weights.
    """
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
    try:
        if _has_adapter(model):
            from peft import load_peft_weights

            saved = load_peft_weights(str(folder), device=str(model.device))
        else:
            loaded, info = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
            differs = info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]
            saved = {} if differs else loaded.state_dict()
    except Exception as error:  # the libraries raise a dozen kinds
        raise load_failure("model_settings.vlm_model", str(folder), error) from error
    shapes = {name: value.shape for name, value in _own(model).items()}
    if shapes != {name: value.shape for name, value in saved.items()}:
        raise ModelError(f"policy {folder}: found other tensors than the policy has; use the run's own config")
    return saved
