"""A diffusers pipeline: loading it and LoRAs on it, its scheduler, its models' devices, memory traded for time."""

import logging
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from inspect import signature
from math import lcm
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, FluxPipeline, LCMScheduler, SanaPipeline, TCDScheduler
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel, T5EncoderModel

from grpo_kit.config import ConfigError, ModelSettings, one_line
from grpo_kit.config.hub import ModelError, load_whole, loading, require_weights
from grpo_kit.config.quiet import loading_quietly
from grpo_kit.config.settings import GeneratorLora
from grpo_kit.models.loading import eight_bits

logger = logging.getLogger(__name__)
_SETTING = "model_settings.sd_model"
_FILES = re.compile(  # of weights, whole or in shards, with the name of their variant
    r"(?:model|pytorch_model|diffusion_pytorch_model)(?:-\d+-of-\d+)?(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
_PREFERRED = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_FEW_STEPS = {"LCMScheduler": LCMScheduler, "TCDScheduler": TCDScheduler}  # no scheduler lists them as compatible
_OWN_NOISE = {"DPMSolverSDEScheduler"}  # it has a random stream of its own: a seed would not fix the picture


@loading_quietly()
def load_pipeline(settings: ModelSettings, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of `sd_model`, a folder or hub id, on the CPU, without the parts that the settings leave out.

    Raises:
        ModelError: it cannot be loaded, or a weight of it is in no file.
        ConfigError: `t5_8bit` without a T5, or without torchao.
    """
    t5_options = eight_bits("t5_8bit") if settings.t5_8bit else {}
    name, left_out = settings.sd_model, {}
    if settings.drop_t5:
        left_out |= {"text_encoder_3": None, "tokenizer_3": None}
    if not settings.safety_checker:
        left_out |= {"safety_checker": None, "requires_safety_checker": False}
    layout = settings.generator_config
    if Path(name).is_file():
        parts, pipeline = {}, _from_file(name, layout, dtype, left_out)
    elif layout:
        raise ConfigError(f"model_settings.generator_config: found {layout!r}, allowed where sd_model is one file")
    else:
        with loading(_SETTING, name):
            parts = _parts(name, dtype, left_out, t5_options)
            pipeline = DiffusionPipeline.from_pretrained(name, dtype=dtype, **left_out, **parts)
    for part, model in pipeline.components.items():
        if isinstance(model, torch.nn.Module):  # diffusers leaves weights that are in no file without a value
            absent = [weight for weight, values in model.state_dict().items() if values.is_meta]
            require_weights(absent, _SETTING, name, part)
    if settings.t5_8bit and not any(isinstance(part, T5EncoderModel) for part in parts.values()):
        raise ConfigError(
            f"model_settings.t5_8bit: found true, but {type(pipeline).__name__} has no T5 here. Set false, or with "
            "Stable Diffusion 3 drop_t5: false"
        )
    return pipeline


def _variants(name: str, dtype: torch.dtype) -> dict[str, str]:
    """part → the variant of its weights (`model.fp16.safetensors`) to load, where it has no plain ones.

    Of several variants it is that of the dtype. What is still to be fetched from the hub has none.
    """
    index = f"{name}/model_index.json" if Path(name).is_dir() else try_to_load_from_cache(name, "model_index.json")
    chosen = {}
    for part in filter(Path.is_dir, Path(index).parent.iterdir()) if isinstance(index, str) else ():
        found = {match[1] for file in part.iterdir() if (match := _FILES.fullmatch(file.name))}
        if found and None not in found:
            chosen[part.name] = min(found, key=lambda variant: (variant != _PREFERRED.get(dtype), variant))
    if chosen:
        logger.info("generator: %s has variants of weights alone; loading %s", name, chosen)
    return chosen


def _parts(
    name: str, dtype: torch.dtype, left_out: Collection[str], t5_options: Mapping[str, object]
) -> dict[str, torch.nn.Module]:
    """part → a model of transformers, or one in a variant.

    They are loaded one by one: of weights that are in no file, which are random then, a pipeline says nothing.
    """
    parts, variants = {}, _variants(name, dtype)
    for part, kind in DiffusionPipeline.load_config(name).items():
        library, class_name = kind if isinstance(kind, list) else (None, "")
        if part in left_out or not (library == "transformers" or part in variants):
            continue
        home = {"transformers": transformers, "diffusers": diffusers}.get(library)
        model_class = getattr(home or getattr(diffusers.pipelines, library), class_name, None)
        place = {"subfolder": part, "dtype": dtype, "variant": variants.get(part)}
        if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
            options = t5_options if issubclass(model_class, T5EncoderModel) else {}
            parts[part] = load_whole(model_class, name, _SETTING, part, **place, **options)
        elif part in variants:
            parts[part] = model_class.from_pretrained(name, **place)
    return parts


def _from_file(file: str, layout: str | None, dtype: torch.dtype, left_out: Mapping[str, object]) -> DiffusionPipeline:
    """The pipeline of a checkpoint in one file (tensors only), in the form of the model's authors.

    Configuration and tokenizers are those of the pipeline `layout`; of None, the one that diffusers takes the file for.
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
        raise ModelError(f"{_SETTING}: could not load the file {file!r} ({found}); {advice}") from error


def add_loras(pipeline: DiffusionPipeline, loras: Sequence[GeneratorLora]) -> None:
    """Put LoRAs onto a pipeline, each with its weight; `ModelError` where one does not load, or not all of it fits."""
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


def use_scheduler(pipeline: DiffusionPipeline, name: str) -> None:
    """Replace the scheduler by another one with the settings of its own; `ConfigError` where none fits that name."""
    own = pipeline.scheduler
    kinds = {kind.__name__: kind for kind in (*own.compatibles, type(own))}
    if "EulerDiscreteScheduler" in kinds:
        kinds |= _FEW_STEPS
    if getattr(own.config, "prediction_type", None) == "flow_prediction":  # `compatibles` does not check that
        kinds = {kind: c for kind, c in kinds.items() if "use_flow_sigmas" in signature(c.__init__).parameters}
    allowed = kinds.keys() - _OWN_NOISE
    if name not in allowed:
        raise ConfigError(
            f"generation_settings.scheduler: found {name!r}, allowed for a pipeline with {type(own).__name__}: "
            f"{', '.join(sorted(allowed))}, or null for its own"
        )
    pipeline.scheduler = getattr(diffusers, name).from_config(own.config)


def save_memory(pipeline: DiffusionPipeline, settings: ModelSettings) -> None:
    """Switch on VAE slicing, VAE tiling and attention slicing as set; `ConfigError` where the pipeline cannot."""
    name = type(pipeline).__name__
    for setting, method in (("vae_slicing", "enable_slicing"), ("vae_tiling", "enable_tiling")):
        if getattr(settings, setting):
            decoder = getattr(pipeline, "vae", None)
            if not hasattr(decoder, method):
                raise ConfigError(f"model_settings.{setting}: found true, but the VAE of {name} cannot. Set false")
            getattr(decoder, method)()
    if settings.attention_slicing:
        if not hasattr(getattr(pipeline, "unet", None), "set_attention_slice"):
            raise ConfigError(
                f"model_settings.attention_slicing: found true, but {name} has no U-Net whose "
                "attention could be sliced. Set false; vae_slicing and image_batch_size save more"
            )
        pipeline.enable_attention_slicing()


def place(pipeline: DiffusionPipeline, device: torch.device, settings: ModelSettings) -> torch.device | None:
    """Move the pipeline's models to their devices; returns the text encoders', where it is not the pipeline's."""
    if settings.offload_generator:
        if device.type == "cpu":
            raise ConfigError(
                "model_settings.offload_generator: found true, but the generator computes on the CPU: there is nothing "
                "to move its models away from. Set false, or generator_device to an accelerator"
            )
        pipeline.enable_model_cpu_offload(device=device)
        return None
    if not settings.text_encoders_on_cpu:
        pipeline.to(device)
        return None
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and not name.startswith("text_encoder"):
            part.to(device)
    return torch.device("cpu")


def size_multiple(pipeline: DiffusionPipeline) -> int:
    """The number that a picture's height and width are multiples of: pixels of a latent times latents of a patch."""
    names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
    pixels = next((getattr(pipeline, name) for name in names if hasattr(pipeline, name)), 1)
    if isinstance(pipeline, FluxPipeline):
        return 2 * pixels  # it packs patches itself
    if isinstance(pipeline, SanaPipeline):
        return lcm(32, pixels)  # it asks for 32, whatever its autoencoder
    denoiser = getattr(pipeline, "transformer", None)
    patch = 1 if denoiser is None else getattr(denoiser.config, "patch_size", 1)
    return pixels * (patch if isinstance(patch, int) else patch[-1])  # of a video's: frames, rows, columns
