"""The generator's part: reading the texts, denoising and decoding, run on a pipeline without values."""

import math

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5EncoderModel

from grpo_kit.config import Config
from grpo_kit.config.hardware import choose_dtype
from grpo_kit.models.pipeline import save_memory, use_scheduler
from grpo_kit.models.text_embeddings import KEPT_BYTES, KEPT_TEXTS, TEXTS_AT_ONCE
from grpo_kit.preflight.plan.architectures import PipelineShape, PlanError, component, pipeline_shape
from grpo_kit.preflight.plan.parts import Part, Phase, Piece, linear_layers, tensors_of, total_bytes
from grpo_kit.preflight.plan.tracing import NOTHING, Cost, Trace, weightless

_T5_TOKENS = 256  # of SD3's pipeline, where generation_settings.max_sequence_length is null
_SETTING = "generation_settings.image_batch_size"


def plan_generator(config: Config, dtype: torch.dtype) -> Part:
    """The generator's part of a plan: no picture is drawn twice, no text comes again.

    Raises:
        PlanError: the pipeline's shape is not known here, or the planner does not know how it is called.
    """
    diffusers_logging.set_verbosity_error()
    settings, training = config.generation_settings, config.training_settings
    shape = pipeline_shape(config.model_settings.sd_model)
    if config.model_settings.generator_dtype not in (None, "auto"):
        dtype, _ = choose_dtype("cpu", config.model_settings.generator_dtype)
    parts = _components(shape, config.model_settings.drop_t5, dtype)
    models = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    smaller = [part for part in models.values() if config.model_settings.t5_8bit and isinstance(part, T5EncoderModel)]
    pieces = tuple(
        Piece.of(name, model, linear_layers(model) if model in smaller else ()) for name, model in models.items()
    )
    mode = FakeTensorMode()
    for model in models.values():
        weightless(model, mode).requires_grad_(False)
    there = tensors_of(*models.values())
    pipeline = _pipeline(shape, parts)
    if settings.scheduler is not None:
        use_scheduler(pipeline, settings.scheduler)
    save_memory(pipeline, config.model_settings)
    texts = training.prompts_per_iteration * training.group_size
    images = texts * settings.images_per_prompt
    at_once = 1 if settings.image_batch_size == "auto" else settings.image_batch_size
    calls = math.ceil(images / at_once)
    batch = math.ceil(images / calls)  # the kit makes them as even as can be
    embeddings = _embeddings(pipeline, config, dtype)
    kept = _kept_texts(total_bytes(embeddings.values()), texts)
    reading = _reading(models, config, there).times(calls * math.ceil(batch / TEXTS_AT_ONCE))
    step, latents = _denoising(pipeline, config, embeddings, batch, there)
    decoding = _decoding(pipeline, latents, there)
    steps = _steps(pipeline, settings.num_inference_steps)
    denoising, decoding = step.times(steps * calls), decoding.times(calls)
    if seen := training.prompts_per_iteration * config.model_settings.use_image:  # drawn before the others, one by one
        step, latent = _denoising(pipeline, config, embeddings, 1, there)
        denoising = denoising.then(step.times(steps * seen))
        decoding = decoding.then(_decoding(pipeline, latent, there).times(seen))
    phases = (
        Phase("texts", reading, "model_settings.drop_t5"),
        Phase("denoising", denoising, _SETTING),
        Phase("decoding", decoding, _SETTING),
    )
    notes = () if at_once == settings.image_batch_size else ("one image a call; auto takes as many as then fit",)
    pictures = (images + seen) * 3 * latents.shape[-2] * latents.shape[-1] * pipeline.vae_scale_factor**2
    return Part("generator", shape.source, pieces, phases, {"kept texts": kept}, notes, pictures)


def _kept_texts(size: int, texts: int) -> int:
    """Bytes of the embeddings that the kit keeps, `size` each."""
    return size * max(min(KEPT_TEXTS, KEPT_BYTES // size), texts + 1)


def _components(shape: PipelineShape, drop_t5: bool, dtype: torch.dtype) -> dict[str, object]:
    """What a pipeline is made of, on the meta device, without a third text encoder where that is dropped."""
    dropped = {"text_encoder_3"} if drop_t5 else set()
    wanted = {name: part for name, part in shape.components.items() if name not in dropped}
    return {name: component(*part, dtype) for name, part in wanted.items()}


def _pipeline(shape: PipelineShape, parts: dict[str, object]) -> DiffusionPipeline:
    kind = getattr(diffusers, shape.kind, None)
    if shape.kind not in _CALLS:
        raise PlanError(
            f"model_settings.sd_model: found a {shape.kind}, allowed in a plan: {', '.join(_CALLS)}; plan with one of "
            "these, or measure a short run"
        )
    takes = kind._get_signature_keys(kind)[0]
    given = {name: parts.get(name) for name in takes if name != "safety_checker"}
    safety = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in takes else {}
    pipeline = kind(**given, **safety)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- how each pipeline takes its texts: {argument: shape of one} ------------------------------------------------------


def _clip_tokens(pipeline: DiffusionPipeline) -> int:
    return pipeline.text_encoder.config.max_position_embeddings


def _of_sd3(pipeline: DiffusionPipeline, t5_tokens: int) -> dict[str, tuple[int, ...]]:
    sizes = pipeline.transformer.config
    text = (_clip_tokens(pipeline) + t5_tokens, sizes.joint_attention_dim)
    return {"prompt_embeds": text, "pooled_prompt_embeds": (sizes.pooled_projection_dim,)}


def _of_sd(pipeline: DiffusionPipeline, t5_tokens: int) -> dict[str, tuple[int, ...]]:
    return {"prompt_embeds": (_clip_tokens(pipeline), pipeline.unet.config.cross_attention_dim)}


def _of_sdxl(pipeline: DiffusionPipeline, t5_tokens: int) -> dict[str, tuple[int, ...]]:
    pooled = pipeline.text_encoder_2.config.projection_dim
    return _of_sd(pipeline, t5_tokens) | {"pooled_prompt_embeds": (pooled,)}


_CALLS = {"StableDiffusion3Pipeline": _of_sd3, "StableDiffusionPipeline": _of_sd, "StableDiffusionXLPipeline": _of_sdxl}


def _embeddings(pipeline: DiffusionPipeline, config: Config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The embeddings of one text, as arguments of the pipeline."""
    shapes = _CALLS[type(pipeline).__name__](pipeline, _t5_tokens(pipeline, config))
    return {name: torch.zeros(1, *shape, dtype=dtype) for name, shape in shapes.items()}


def _t5_tokens(pipeline: DiffusionPipeline, config: Config) -> int:
    if getattr(pipeline, "text_encoder_3", None) is None:
        return 0
    length = config.generation_settings.max_sequence_length
    return _T5_TOKENS if length is None else length


# --- the phases -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _reading(models: dict[str, torch.nn.Module], config: Config, there: list[torch.Tensor]) -> Cost:
    """Every text encoder reads a few texts."""
    encoders = {name: model for name, model in models.items() if name.startswith("text_encoder")}
    if not encoders:
        return NOTHING
    with Trace(there) as trace:
        for encoder in encoders.values():
            own = getattr(encoder.config, "max_position_embeddings", None)
            given = config.generation_settings.max_sequence_length
            length = own or (_T5_TOKENS if given is None else max(given, 1))
            encoder(torch.zeros(TEXTS_AT_ONCE, length, dtype=torch.long), output_hidden_states=True)
    return trace.cost


def _denoising(
    pipeline: DiffusionPipeline,
    config: Config,
    embeddings: dict[str, torch.Tensor],
    batch: int,
    there: list[torch.Tensor],
) -> tuple[Cost, torch.Tensor]:
    """One step of one call of the pipeline, and the latents (batch, channels, height, width) that it gives."""
    settings = config.generation_settings
    inputs = {name: value.repeat(batch, *[1] * (value.dim() - 1)) for name, value in embeddings.items()}
    if settings.guidance_scale > 1:
        inputs |= {f"negative_{name}": value for name, value in inputs.items()}
    size = {name: value for name in ("height", "width") if (value := getattr(settings, name))}
    noise = [torch.Generator().manual_seed(0) for _ in range(batch)]
    given = {**inputs, **size, "guidance_scale": settings.guidance_scale, "generator": noise}
    try:
        with Trace(there) as trace:
            output = pipeline(**given, num_inference_steps=1, output_type="latent")
    except ValueError as error:  # a size that it cannot draw
        raise PlanError(f"generation_settings: the pipeline refuses them: {' '.join(str(error).split())}") from error
    return trace.cost, output.images


def _steps(pipeline: DiffusionPipeline, wanted: int) -> int:
    """How often the model is asked for so many steps of the settings: some schedulers begin one twice."""
    scheduler = pipeline.scheduler
    shifted = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(wanted, **shifted)
    return len(scheduler.timesteps)


@torch.no_grad()
def _decoding(pipeline: DiffusionPipeline, latents: torch.Tensor, there: list[torch.Tensor]) -> Cost:
    """One call's latents, made into pictures as the pipeline does."""
    with Trace(there) as trace:
        decoded = pipeline.vae.decode(latents.to(pipeline.vae.dtype), return_dict=False)[0]
        pictures = pipeline.image_processor.postprocess(decoded, output_type="pt")
        del decoded
        pictures.permute(0, 2, 3, 1).float().contiguous()
    return trace.cost
