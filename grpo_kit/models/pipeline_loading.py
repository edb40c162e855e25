"""Loading a diffusers pipeline: without the parts that the settings leave out, with every weight of the others."""

from collections.abc import Collection, Mapping

import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers import PreTrainedModel, T5EncoderModel
from transformers import logging as transformers_logging

from grpo_kit.config import ConfigError, ModelSettings
from grpo_kit.config.hub import ModelError, load_failure, require_weights
from grpo_kit.models.loading import eight_bits


def load_pipeline(settings: ModelSettings, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of the settings' `sd_model`, a folder or hub id, on the CPU.

    Raises:
        ModelError: it cannot be loaded, or a weight of it is in no file.
        ConfigError: `t5_8bit` without a T5, or without torchao.
    """
    t5_options = eight_bits("t5_8bit") if settings.t5_8bit else {}
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()  # they warn of every cut prompt; the generator counts them instead
    name, left_out = settings.sd_model, {}
    if settings.drop_t5:
        left_out |= {"text_encoder_3": None, "tokenizer_3": None}
    if not settings.safety_checker:
        left_out |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        parts, missing = _transformers_parts(name, dtype, left_out, t5_options)
        pipeline = DiffusionPipeline.from_pretrained(name, dtype=dtype, **left_out, **parts)
    except Exception as error:  # the libraries raise a dozen kinds; each becomes one line that says what to do
        raise ModelError(load_failure("sd_model", name, error)) from error
    for part, weights in (_without_values(pipeline) | missing).items():
        require_weights(weights, "model_settings.sd_model", name, part)
    if settings.t5_8bit and not any(isinstance(part, T5EncoderModel) for part in parts.values()):
        raise ConfigError(
            f"model_settings.t5_8bit: found true, but {type(pipeline).__name__} has no T5 here. Set false, or with "
            "Stable Diffusion 3 drop_t5: false"
        )
    return pipeline


def _transformers_parts(
    name: str, dtype: torch.dtype, left_out: Collection[str], t5_options: Mapping[str, object]
) -> tuple[dict[str, PreTrainedModel], dict[str, Collection[str]]]:
    """The models of a pipeline that transformers loads, and their weights that are in no file, by the part's name.

    They are read here, since transformers draws such weights at random and a pipeline does not tell.
    """
    parts, missing = {}, {}
    for part, kind in DiffusionPipeline.load_config(name).items():
        library, class_name = kind if isinstance(kind, list) else (None, "")
        model_class = getattr(transformers, class_name, None) if library == "transformers" else None
        if part not in left_out and isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
            options = t5_options if issubclass(model_class, T5EncoderModel) else {}
            parts[part], found = model_class.from_pretrained(
                name, subfolder=part, dtype=dtype, output_loading_info=True, **options
            )
            missing[part] = found["missing_keys"]
    return parts, missing


def _without_values(pipeline: DiffusionPipeline) -> dict[str, list[str]]:
    """Weights that are in no file, by the part's name: diffusers leaves those of its own models without a value."""
    models = {part: model for part, model in pipeline.components.items() if isinstance(model, torch.nn.Module)}
    return {
        part: [weight for weight, values in model.state_dict().items() if values.is_meta]
        for part, model in models.items()
    }
