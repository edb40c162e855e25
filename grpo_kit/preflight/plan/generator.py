"""The generator's part: reading the texts, denoising and decoding, run on a pipeline without values."""

import math

import diffusers
import torch
from diffusers import DiffusionPipeline
from transformers import T5EncoderModel

from grpo_kit.config import Config, one_line
from grpo_kit.config.hardware import choose_dtype
from grpo_kit.config.quiet import quiet_libraries
from grpo_kit.models.pipeline import save_memory, use_scheduler
from grpo_kit.models.text_embeddings import KEPT_BYTES, KEPT_TEXTS, TEXTS_AT_ONCE
from grpo_kit.preflight.plan.architectures import PipelineShape, PlanError, component, pipeline_shape
from grpo_kit.preflight.plan.parts import Part, Phase, Piece, linear_layers, tensors_of
from grpo_kit.preflight.plan.tracing import Cost, Trace, weightless

_SETTING = "generation_settings.image_batch_size"


@quiet_libraries()
def plan_generator(config: Config, dtype: torch.dtype) -> Part:
    """The generator's part of a plan: no picture is drawn twice, no text comes again.

    A `PlanError` where the pipeline's shape is not known here, or how it is called.
    """
    settings, training, models = config.generation_settings, config.training_settings, config.model_settings
    shape = pipeline_shape(models.generator_config or models.sd_model)
    if models.generator_dtype not in (None, "auto"):
        dtype, _ = choose_dtype("cpu", models.generator_dtype)
    pipeline, pieces = _build(shape, config, dtype)
    there = tensors_of(*_models(pipeline.components).values())
    texts = training.prompts_per_iteration * training.group_size
    images = texts * settings.images_per_prompt
    at_once = 1 if settings.image_batch_size == "auto" else settings.image_batch_size
    calls = math.ceil(images / at_once)
    batch = math.ceil(images / calls)  # the kit makes them as even as can be
    embeddings = _embeddings(pipeline, config, dtype)
    text_size = sum(values.nbytes for values in embeddings.values())
    kept = text_size * max(min(KEPT_TEXTS, KEPT_BYTES // text_size), texts + 1)
    reading = _reading(pipeline, config, there).times(calls * math.ceil(batch / TEXTS_AT_ONCE))
    step, latents = _denoising(pipeline, config, embeddings, batch, there)
    shifted = {"mu": 1.0} if pipeline.scheduler.config.get("use_dynamic_shifting") else {}
    steps = min(settings.rollout_steps or settings.num_inference_steps, settings.num_inference_steps)
    pipeline.scheduler.set_timesteps(steps, **shifted)
    steps = len(pipeline.scheduler.timesteps)  # some schedulers begin a step twice
    denoising, decoding = step.times(steps * calls), _decoding(pipeline, latents, there).times(calls)
    raw = training.prompts_per_iteration * models.use_image  # what the policy looks at: drawn before, one by one
    if raw:
        step, latent = _denoising(pipeline, config, embeddings, 1, there)
        denoising = denoising.then(step.times(steps * raw))
        decoding = decoding.then(_decoding(pipeline, latent, there).times(raw))
    phases = (
        Phase("texts", reading, "model_settings.drop_t5"),
        Phase("denoising", denoising, _SETTING),
        Phase("decoding", decoding, _SETTING),
    )
    notes = () if at_once == settings.image_batch_size else ("one image a call; auto takes as many as then fit",)
    pictures = (images + raw) * 3 * latents.shape[-2] * latents.shape[-1] * pipeline.vae_scale_factor**2
    return Part("generator", shape.source, pieces, phases, {"kept texts": kept}, notes, pictures)


def _build(shape: PipelineShape, config: Config, dtype: torch.dtype) -> tuple[DiffusionPipeline, tuple[Piece, ...]]:
    """The pipeline without values, set as the config says, and the models that it is made of."""
    settings = config.model_settings
    named = {name: part for name, part in shape.components.items() if name != "text_encoder_3" or not settings.drop_t5}
    parts = {name: component(*part, dtype) for name, part in named.items()}
    pieces = []
    for name, model in _models(parts).items():
        smaller = settings.t5_8bit and isinstance(model, T5EncoderModel)
        pieces.append(Piece.of(name, model, linear_layers(model) if smaller else ()))
        weightless(model).requires_grad_(False)
    kind = getattr(diffusers, shape.kind)
    takes = kind._get_signature_keys(kind)[0]
    safety = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in takes else {}
    pipeline = kind(**{name: parts.get(name) for name in takes} | safety)
    pipeline.set_progress_bar_config(disable=True)
    if config.generation_settings.scheduler is not None:
        use_scheduler(pipeline, config.generation_settings.scheduler)
    save_memory(pipeline, settings)
    return pipeline, tuple(pieces)


def _models(parts: dict[str, object]) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}


def _embeddings(pipeline: DiffusionPipeline, config: Config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The embeddings of one text, as arguments of the pipeline."""
    tokens = pipeline.text_encoder.config.max_position_embeddings
    if denoiser := getattr(pipeline, "transformer", None):  # Stable Diffusion 3
        t5_tokens = 0 if pipeline.text_encoder_3 is None else _t5_tokens(config)
        shapes = {"prompt_embeds": (tokens + t5_tokens, denoiser.config.joint_attention_dim)}
        shapes["pooled_prompt_embeds"] = (denoiser.config.pooled_projection_dim,)
    else:
        shapes = {"prompt_embeds": (tokens, pipeline.unet.config.cross_attention_dim)}
        if second := getattr(pipeline, "text_encoder_2", None):  # XL
            shapes["pooled_prompt_embeds"] = (second.config.projection_dim,)
    return {name: torch.zeros(1, *shape, dtype=dtype) for name, shape in shapes.items()}


@torch.no_grad()
def _reading(pipeline: DiffusionPipeline, config: Config, there: list[torch.Tensor]) -> Cost:
    """Every text encoder reads a few texts."""
    encoders = [model for name, model in _models(pipeline.components).items() if name.startswith("text_encoder")]
    with Trace(there) as trace:
        for encoder in encoders:
            length = getattr(encoder.config, "max_position_embeddings", None) or max(_t5_tokens(config), 1)
            encoder(torch.zeros(TEXTS_AT_ONCE, length, dtype=torch.long), output_hidden_states=True)
    return trace.cost


def _t5_tokens(config: Config) -> int:
    """Of a text, as T5 reads it: without a setting 256, as SD3's pipeline has it."""
    length = config.generation_settings.max_sequence_length
    return 256 if length is None else length


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
        raise PlanError(f"generation_settings: the pipeline refuses them: {one_line(error)}") from error
    return trace.cost, output.images


@torch.no_grad()
def _decoding(pipeline: DiffusionPipeline, latents: torch.Tensor, there: list[torch.Tensor]) -> Cost:
    """One call's latents, made into pictures as the pipeline does."""
    with Trace(there) as trace:
        decoded = pipeline.vae.decode(latents.to(pipeline.vae.dtype), return_dict=False)[0]
        pictures = pipeline.image_processor.postprocess(decoded, output_type="pt")
        del decoded
        pictures.permute(0, 2, 3, 1).float().contiguous()
    return trace.cost
