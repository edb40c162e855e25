"""Generators and LoRAs that come as files: a pipeline's checkpoint in one file, and LoRAs on a pipeline."""

import warnings
from collections.abc import Mapping, Sequence

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

from grpo_kit.config import one_line
from grpo_kit.config.hub import ModelError
from grpo_kit.config.settings import GeneratorLora


def load_single_file(
    file: str, layout: str | None, dtype: torch.dtype, left_out: Mapping[str, object]
) -> DiffusionPipeline:
    """The pipeline of a checkpoint in one file, on the CPU.

    Args:
        file: .safetensors or .ckpt (tensors only), in the form of the model's authors.
        layout: folder or hub id of a pipeline with the same configuration and tokenizers; None means the one that
            diffusers takes the file for.
        left_out: parts and options that replace those of the layout.

    Raises:
        ModelError: the file cannot be read, or its configuration is not on this machine.
    """
    advice = "the file is damaged, or holds more than tensors: fetch it again"
    try:
        own = fetch_diffusers_config(load_single_file_checkpoint(file))["pretrained_model_name_or_path"]
        advice = (
            f"its configuration and tokenizers are those of {own!r}: fetch them once where there is network (hf "
            f"download {own} --include '*.json' '*.txt' '*.model'), or set generator_config to such a pipeline"
        )
        kind = getattr(diffusers, DiffusionPipeline.load_config(layout or own)["_class_name"])
        return kind.from_single_file(file, config=layout or own, dtype=dtype, **left_out)
    except Exception as error:  # the libraries raise a dozen kinds
        found = f"{type(error).__name__}: {one_line(error, 300)}"
        raise ModelError(f"model_settings.sd_model: could not load the file {file!r} ({found}); {advice}") from error


def add_loras(pipeline: DiffusionPipeline, loras: Sequence[GeneratorLora]) -> None:
    """Put LoRAs onto a pipeline, each with its weight, one beside the other.

    Raises:
        ModelError: one cannot be loaded, or has weights that fit no layer of the pipeline.
    """
    names = [f"lora_{place}" for place in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        try:
            given = pipeline.lora_state_dict(lora.path, weight_name=lora.weight_name)
            with warnings.catch_warnings(action="ignore"):  # of other LoRAs beside it
                pipeline.load_lora_weights(lora.path, adapter_name=name, weight_name=lora.weight_name)
        except Exception as error:  # the libraries raise a dozen kinds
            raise ModelError(
                f"model_settings.generator_lora: could not load {lora.path!r} onto {type(pipeline).__name__} "
                f"({type(error).__name__}: {one_line(error, 300)}); check the path, and that it was made for this "
                "generator; of a folder or hub id with several files, name one: weight_name"
            ) from error
        weights = given[0] if isinstance(given, tuple) else given
        wanted = sum(not key.endswith("alpha") for key in weights)
        models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        loaded = sum(f".{name}." in key for model in models for key, _ in model.named_parameters())
        if loaded < wanted:
            raise ModelError(
                f"model_settings.generator_lora: found {lora.path!r}, of which {wanted - loaded} of {wanted} weights "
                f"fit no layer of this {type(pipeline).__name__}; take a LoRA that was made for it"
            )
    if names:
        pipeline.set_adapters(names, [lora.weight for lora in loras])
