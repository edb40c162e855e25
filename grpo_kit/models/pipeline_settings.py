"""How a pipeline is set up before it draws: its scheduler, where its models are, and memory traded for time."""

from inspect import signature
from math import lcm

import diffusers
import torch
from diffusers import DiffusionPipeline, FluxPipeline, LCMScheduler, SanaPipeline, SchedulerMixin, TCDScheduler

from grpo_kit.config import ConfigError, ModelSettings

_FEW_STEPS = {"LCMScheduler": LCMScheduler, "TCDScheduler": TCDScheduler}  # no scheduler names them as compatible
_OWN_NOISE = {"DPMSolverSDEScheduler"}  # it draws noise from a stream of its own: one seed would not be one picture


def use_scheduler(pipeline: DiffusionPipeline, name: str) -> None:
    """Let another scheduler take the steps, with the settings of the pipeline's own.

    Raises:
        ConfigError: diffusers has none of that name, or it does not fit the pipeline's.
    """
    now = pipeline.scheduler
    allowed = _fitting(now)
    if name not in allowed:
        raise ConfigError(
            f"generation_settings.scheduler: found {name!r}, allowed for a pipeline with {type(now).__name__}: "
            f"{', '.join(sorted(allowed))}, or null for its own"
        )
    pipeline.scheduler = getattr(diffusers, name).from_config(now.config)


def _fitting(scheduler: SchedulerMixin) -> set[str]:
    """The names of the schedulers that can stand in for one."""
    kinds = {kind.__name__: kind for kind in (*scheduler.compatibles, type(scheduler))}
    if "EulerDiscreteScheduler" in kinds:
        kinds |= _FEW_STEPS
    if getattr(scheduler.config, "prediction_type", None) == "flow_prediction":  # the list does not look at that
        kinds = {name: kind for name, kind in kinds.items() if "use_flow_sigmas" in signature(kind.__init__).parameters}
    return kinds.keys() - _OWN_NOISE


def save_memory(pipeline: DiffusionPipeline, settings: ModelSettings) -> None:
    """Turn on what the settings ask for: the decoder's slicing and tiling, sliced attention.

    Raises:
        ConfigError: the pipeline has nothing that a setting would change.
    """
    if settings.vae_slicing:
        _decoder(pipeline, "vae_slicing", "enable_slicing").enable_slicing()
    if settings.vae_tiling:
        _decoder(pipeline, "vae_tiling", "enable_tiling").enable_tiling()
    if settings.attention_slicing:
        denoiser = getattr(pipeline, "unet", None)
        if not hasattr(denoiser, "set_attention_slice"):
            raise ConfigError(
                f"model_settings.attention_slicing: found true, but {type(pipeline).__name__} has no U-Net whose "
                "attention could be sliced. Set false; vae_slicing and image_batch_size save more"
            )
        pipeline.enable_attention_slicing()


def _decoder(pipeline: DiffusionPipeline, setting: str, method: str) -> torch.nn.Module:
    decoder = getattr(pipeline, "vae", None)
    if not hasattr(decoder, method):
        raise ConfigError(
            f"model_settings.{setting}: found true, but the autoencoder of {type(pipeline).__name__} cannot. Set false"
        )
    return decoder


def place(pipeline: DiffusionPipeline, device: torch.device, settings: ModelSettings) -> torch.device | None:
    """Put the pipeline's models where they compute; the text encoders' place where it is another than the rest's.

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
    """What a picture's height and width have to be multiples of: pixels of a latent, and latents of a patch."""
    pixels = getattr(pipeline, "vae_scale_factor", 1)
    denoiser = getattr(pipeline, "transformer", None)
    if isinstance(pipeline, FluxPipeline):
        return 2 * pixels  # it packs patches itself
    if isinstance(pipeline, SanaPipeline):
        return lcm(32, pixels)  # it asks for that, whatever its autoencoder
    return pixels * (1 if denoiser is None else denoiser.config.patch_size)
