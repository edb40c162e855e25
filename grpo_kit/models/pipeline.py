"""A diffusers pipeline: loading it, its scheduler, the devices of its models, and memory traded for time."""

import logging
import re
from collections.abc import Collection, Mapping
from inspect import signature
from math import lcm
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, FluxPipeline, LCMScheduler, SanaPipeline, TCDScheduler
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel, T5EncoderModel

from grpo_kit.config import ConfigError, ModelSettings
from grpo_kit.config.hub import load_failure, require_weights
from grpo_kit.config.quiet import loading_quietly
from grpo_kit.models.loading import eight_bits
from grpo_kit.models.single_file import load_single_file

logger = logging.getLogger(__name__)
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
    if settings.generator_config and not Path(name).is_file():
        raise ConfigError(
            f"model_settings.generator_config: found {settings.generator_config!r}, allowed where sd_model is one "
            "file. Set null"
        )
    if Path(name).is_file():
        parts, missing, pipeline = {}, {}, load_single_file(name, settings.generator_config, dtype, left_out)
    else:
        try:
            parts, missing = _parts(name, dtype, left_out, t5_options)
            pipeline = DiffusionPipeline.from_pretrained(name, dtype=dtype, **left_out, **parts)
        except Exception as error:  # the libraries raise a dozen kinds
            raise load_failure("model_settings.sd_model", name, error) from error
    for part, model in pipeline.components.items():
        if isinstance(model, torch.nn.Module):  # diffusers leaves weights that are in no file without a value
            absent = [weight for weight, values in model.state_dict().items() if values.is_meta]
            require_weights(missing.get(part, absent), "model_settings.sd_model", name, part)
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
) -> tuple[dict[str, torch.nn.Module], dict[str, Collection[str]]]:
    """part → a model of transformers, or one in a variant; and part → its weights that are in no file.

    They are loaded one by one: transformers initialises such weights at random, and a pipeline does not report them.
    """
    parts, missing, variants = {}, {}, _variants(name, dtype)
    for part, kind in DiffusionPipeline.load_config(name).items():
        library, class_name = kind if isinstance(kind, list) else (None, "")
        if part in left_out or not (library == "transformers" or part in variants):
            continue
        home = {"transformers": transformers, "diffusers": diffusers}.get(library)
        model_class = getattr(home or getattr(diffusers.pipelines, library), class_name, None)
        place = {"subfolder": part, "dtype": dtype, "variant": variants.get(part)}
        if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
            options = t5_options if issubclass(model_class, T5EncoderModel) else {}
            parts[part], found = model_class.from_pretrained(name, output_loading_info=True, **place, **options)
            missing[part] = found["missing_keys"]
        elif part in variants:
            parts[part] = model_class.from_pretrained(name, **place)
    return parts, missing


def use_scheduler(pipeline: DiffusionPipeline, name: str) -> None:
    """Replace the scheduler by another one, with the settings of the pipeline's own.

    Raises:
        ConfigError: diffusers has none of that name, or it does not fit the pipeline's.
    """
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
    """Switch on VAE slicing, VAE tiling and attention slicing, as the settings say.

    Raises:
        ConfigError: the pipeline cannot do it.
    """
    name = type(pipeline).__name__
    for setting, method in (("vae_slicing", "enable_slicing"), ("vae_tiling", "enable_tiling")):
        if getattr(settings, setting):
            decoder = getattr(pipeline, "vae", None)
            if not hasattr(decoder, method):
                raise ConfigError(
                    f"model_settings.{setting}: found true, but the autoencoder of {name} cannot. Set false"
                )
            getattr(decoder, method)()
    if settings.attention_slicing:
        if not hasattr(getattr(pipeline, "unet", None), "set_attention_slice"):
            raise ConfigError(
                f"model_settings.attention_slicing: found true, but {name} has no U-Net whose "
                "attention could be sliced. Set false; vae_slicing and image_batch_size save more"
            )
        pipeline.enable_attention_slicing()


def place(pipeline: DiffusionPipeline, device: torch.device, settings: ModelSettings) -> torch.device | None:
    """Move the pipeline's models to their devices.

    Returns:
        The text encoders' device, where it is another one than the pipeline's.

    Raises:
        ConfigError: offloading without an accelerator.
    """
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
    pixels = getattr(pipeline, "vae_scale_factor", 1)
    denoiser = getattr(pipeline, "transformer", None)
    if isinstance(pipeline, FluxPipeline):
        return 2 * pixels  # it packs patches itself
    if isinstance(pipeline, SanaPipeline):
        return lcm(32, pixels)  # it asks for 32, whatever its autoencoder
    return pixels * (1 if denoiser is None else denoiser.config.patch_size)
