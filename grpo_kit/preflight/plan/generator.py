"""The generator's part: the kit's own drawing, run on a pipeline without values. All that it draws can be planned."""

import math
from dataclasses import replace

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from transformers import T5EncoderModel

from grpo_kit.config import Config, one_line
from grpo_kit.config.hardware import choose_dtype
from grpo_kit.config.media import Medium
from grpo_kit.config.quiet import quiet_libraries
from grpo_kit.models.generator import Generator, as_configured
from grpo_kit.models.text_embeddings import KEPT_BYTES, KEPT_TEXTS, TextEmbeddings, has_separate_encoding
from grpo_kit.preflight.plan.architectures import PipelineShape, PlanError, component, pipeline_shape
from grpo_kit.preflight.plan.parts import Part, Phase, Piece, linear_layers, tensors_of
from grpo_kit.preflight.plan.tracing import Cost, Trace, weightless

_DENOISERS = ("transformer", "transformer_2", "unet", "prior")
_SETTING = "generation_settings.image_batch_size"


@quiet_libraries()
def plan_generator(config: Config, dtype: torch.dtype) -> Part:
    """The generator's part of a plan: no sample is drawn twice, no text comes again.

    A `KitError` where the pipeline's shape is not known here, or it cannot draw in this size.
    """
    settings, training, models = config.generation_settings, config.training_settings, config.model_settings
    shape = pipeline_shape(models.generator_config or models.sd_model)
    if models.generator_dtype not in (None, "auto"):
        dtype, _ = choose_dtype("cpu", models.generator_dtype)
    pipeline, pieces = _build(shape, config, dtype)
    generator = as_configured(pipeline, config, torch.device("cpu") if models.text_encoders_on_cpu else None)
    steps = generator.num_inference_steps = min(settings.rollout_steps or math.inf, settings.num_inference_steps)
    notes: tuple[str, ...] = ()
    if settings.image_batch_size == "auto":
        generator.batch_size, notes = 1, ("one image a call; auto takes as many as then fit",)
    texts = training.prompts_per_iteration * training.group_size
    images = texts * settings.images_per_prompt
    calls = math.ceil(images / generator.images_at_once)
    reading, denoising, decoding, sample = _drawing(generator, math.ceil(images / calls), steps)  # as even as can be
    reading, denoising, decoding = (cost.times(calls) for cost in (reading, denoising, decoding))
    raw = training.prompts_per_iteration * models.use_image  # what the policy looks at: drawn before, one by one
    if raw:
        _, step, last, _ = _drawing(generator, 1, steps)
        denoising, decoding = denoising.then(step.times(raw)), decoding.then(last.times(raw))
    if models.text_encoders_on_cpu:
        notes += (f"time not counted: {reading.flops / 1e12:.3g} TFLOP an iteration, for the texts on the CPU",)
        reading = Cost(0, {})
    by = "model_settings.drop_t5" if "text_encoder_3" in shape.components else "model_settings.text_encoders_on_cpu"
    phases = Phase("texts", reading, by), Phase("denoising", denoising, _SETTING), Phase("decoding", decoding, _SETTING)
    held = {"kept texts": _kept(generator, texts)} if has_separate_encoding(pipeline) else {}
    return Part("generator", shape.source, pieces, phases, held, notes, (images + raw) * sample)


def _build(shape: PipelineShape, config: Config, dtype: torch.dtype) -> tuple[DiffusionPipeline, tuple[Piece, ...]]:
    """The pipeline without values, and the models that it is made of."""
    settings = config.model_settings
    named = {name: part for name, part in shape.components.items() if name != "text_encoder_3" or not settings.drop_t5}
    parts = {name: component(*part, dtype) for name, part in named.items()}
    pieces = []
    for name, model in [(name, part) for name, part in parts.items() if isinstance(part, torch.nn.Module)]:
        smaller = settings.t5_8bit and isinstance(model, T5EncoderModel)
        piece = Piece.of(name, model, linear_layers(model) if smaller else ())
        elsewhere = settings.text_encoders_on_cpu and name.startswith("text_encoder")
        pieces.append(replace(piece, weights=0) if elsewhere else piece)
        weightless(model).requires_grad_(False)
    kind = getattr(diffusers, shape.kind)
    takes, options = kind._get_signature_keys(kind)
    given = {name: value for name, value in shape.options.items() if name in options}
    given |= {name: parts.get(name) for name in takes}
    if "safety_checker" in takes:
        given |= {"safety_checker": None, "requires_safety_checker": False}
    return kind(**given), tuple(pieces)


def _drawing(generator: Generator, batch: int, steps: int) -> tuple[Cost, Cost, Cost, int]:
    """One call's cost before, in and after its denoising, and the bytes of a sample."""
    parts = generator.pipeline.components
    there = tensors_of(*parts.values())
    trace, at = Trace(), []  # where in the log a pass of the denoiser begins or ends
    for denoiser in filter(None, map(parts.get, _DENOISERS)):
        denoiser.register_forward_pre_hook(lambda *_: at.append(len(trace.log)))
        denoiser.register_forward_hook(lambda *_: at.append(len(trace.log)))

    def drawn(text: str, count: int) -> tuple[Cost, Cost, Cost, Medium]:
        nonlocal trace
        at.clear()
        with Trace(there) as trace, generator.steps(count):
            sample, *_ = generator.generate_images([f"{text} {row}" for row in range(batch)], range(batch))
        return Cost.of(trace.log[: at[0]]), Cost.of(trace.log[at[0] : at[-1]]), Cost.of(trace.log[at[-1] :]), sample

    try:
        drawn("the first", 1)  # reads what guidance goes away from, too
        reading, *_ = drawn("a new", 1)
        (_, two, *_), (_, three, decoding, sample) = drawn("a new", 2), drawn("a new", 3)  # texts that are kept now
    except (ArithmeticError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        kind, found = type(generator.pipeline).__name__, one_line(f"{type(error).__name__}: {error}")
        raise PlanError(
            f"model_settings.sd_model: a {kind} of this form cannot be planned ({found}); measure a short run"
        ) from error
    values = getattr(sample, "pictures", [getattr(sample, "samples", sample)])  # of any medium
    size = sum(np.asarray(one).nbytes for one in values)
    return reading, three.then(three.then(two.times(-1)).times(max(steps - 3, 0))), decoding, size


def _kept(generator: Generator, texts: int) -> int:
    """The most bytes of texts' embeddings that are kept."""
    with Trace():
        row = TextEmbeddings(generator.pipeline, generator.max_sequence_length).inputs(["a text"], guided=False)
    size = sum(values.nbytes for values in row.values())
    return size * max(min(KEPT_TEXTS, KEPT_BYTES // size), texts + 1)
