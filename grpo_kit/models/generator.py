"""The generator: a diffusers pipeline that draws from texts, frozen, with one seed for each image (or other medium)."""

import copy
import inspect
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from math import lcm
from typing import Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

from grpo_kit.config import Config, ConfigError
from grpo_kit.config.display import Shown
from grpo_kit.config.hardware import choose_dtype, placement
from grpo_kit.config.hub import ModelError
from grpo_kit.config.media import Kind, Medium
from grpo_kit.config.quiet import quiet_libraries
from grpo_kit.config.threads import computes_best_alone, fitting_threads
from grpo_kit.models.decoding import even_batches
from grpo_kit.models.image_batch import free_memory, largest_batch, memory_of
from grpo_kit.models.media import check_size, drawn_alone, form_of, medium_of, options, raw_media
from grpo_kit.models.painters import Swaps, as_read, painter_of
from grpo_kit.models.pipeline import add_loras, load_pipeline, place, save_memory, size_multiple, use_scheduler
from grpo_kit.models.text_embeddings import TextEmbeddings, has_separate_encoding

logger = logging.getLogger(__name__)
_DRAWING = threading.Lock()  # a pipeline's call changes its scheduler: one thread at a time
_SMALLEST_CONTRAST = 2 / 255  # an image whose lightest and darkest values differ by less is blank
Pair = tuple[str, int]  # a text and a seed, which fix a picture


@dataclass(eq=False, repr=False)
class Generator(Shown):
    """A frozen diffusers pipeline with its sampling settings. Where it gives another medium, "image" means that.

    Raises:
        ConfigError: a size, length or guidance that the pipeline cannot draw with, or a pipeline that is not known.
    """

    pipeline: DiffusionPipeline
    _: KW_ONLY
    num_inference_steps: int  # denoising steps an image
    guidance_scale: float  # classifier-free guidance; at 1 the negative branch is not computed
    negative_prompt: str | None = None  # what that branch reads; None: what the pipeline has by itself
    height: int | None = None  # pixels; None: the pipeline's own size
    width: int | None = None
    max_sequence_length: int | None = None  # tokens for a T5 encoder, where the pipeline has one; None: its default
    batch_size: int | Literal["auto"] = 16  # most images in one call; "auto": as many as fit
    memory: int | None = None  # bytes that "auto" may use; None: what is free then
    painters: Sequence[Swaps] = ()  # who read some words as others; the seed decides who draws. Empty: nobody does
    text_device: torch.device | None = None  # where the text encoders are; None: where the pipeline computes
    frames: int | None = None  # of a video, or views of an object; None: the pipeline's own number
    frame_rate: float | None = None  # frames a second; None: what the pipeline was trained with
    seconds: float | None = None  # of a sound; None: as long as the pipeline makes it

    def __post_init__(self) -> None:
        self.pipeline.set_progress_bar_config(disable=True)
        self.flagged = 0  # images that the pipeline's own safety checker replaced by black ones
        self._takes = inspect.signature(self.pipeline.__call__).parameters
        self._form = form_of(self.pipeline)
        self.medium: Kind = self._form.medium
        self.clipped = 0  # sounds with values beyond -1 and 1, which were cut off there
        self._texts = None
        if has_separate_encoding(self.pipeline):
            texts = (self.pipeline, self.max_sequence_length, self.text_device, self.negative_prompt)
            self._texts = TextEmbeddings(*texts)
        self._check_arguments()

    def _shown(self) -> dict[str, object]:
        settings = {name: getattr(self, name) for name in ("num_inference_steps", "guidance_scale", "height", "width")}
        return {"pipeline": type(self.pipeline).__name__, **settings, "device": self.pipeline.device}

    @property
    def images_at_once(self) -> int:
        """Most images in one call; where that is "auto", it is measured when this is first read."""
        if drawn_alone(self.pipeline):
            return 1
        return self._measured_batch if self.batch_size == "auto" else self.batch_size

    @property
    def truncated(self) -> int:
        """How many texts were longer than the pipeline's text encoder reads, and were cut."""
        return 0 if self._texts is None else self._texts.truncated

    @contextmanager
    def steps(self, count: int | None) -> Iterator[None]:
        """Draw with so many denoising steps meanwhile, where that is fewer; None leaves them as they are."""
        before = self.num_inference_steps
        self.num_inference_steps = min(count or before, before)
        try:
            yield
        finally:
            self.num_inference_steps = before

    def generate_image(self, prompt: str, seed: int = 0) -> Medium:
        """One picture of a prompt; the same prompt and seed give the same picture.

        Raises:
            ModelError: the picture came out blank or not finite.
        """
        image = self.generate_images([prompt], [seed])[0]
        if image is None:
            raise ModelError(
                f"image: prompt {prompt!r} with seed {seed} came out blank or not finite; try another seed or dtype"
            )
        return image

    @torch.no_grad()
    def generate_images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Medium | None]:
        """One picture for each prompt and seed; None where it came out blank or not finite.

        Equal (prompt, seed) pairs are drawn once. A picture depends on its prompt and seed alone, up to rounding:
        another batch may change a value of 0 to 255 by one.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"seeds: found {len(seeds)} for {len(prompts)} prompts, one each is needed")
        wanted = [(self.as_read(str(prompt), seed), int(seed)) for prompt, seed in zip(prompts, seeds, strict=True)]
        distinct = list(dict.fromkeys(wanted))
        drawn: dict[Pair, Medium | None] = {}
        calls = list(even_batches(distinct, self.images_at_once if len(distinct) > 1 else 1))
        with _DRAWING, _infinities_as_nan(self.pipeline):
            for pairs, images in zip(calls, self._draw_calls(calls), strict=True):
                drawn.update(zip(pairs, images, strict=True))
        return [drawn[pair] for pair in wanted]

    def as_read(self, prompt: str, seed: int) -> str:
        """The prompt as the painter of a seed reads it; as it is where there are none."""
        return as_read(prompt, self.painters[painter_of(int(seed), self.painters)]) if self.painters else prompt

    def _draw_calls(self, calls: list[list[Pair]]) -> list[list[Medium | None]]:
        """The pictures of several calls; a small pipeline on a CPU draws them in as many threads as torch has.

        Threads that draw different pictures never wait for each other, as those that share an operator do.
        """
        models = [part for part in vars(self.pipeline).values() if isinstance(part, torch.nn.Module)]
        threads = min(len(calls), torch.get_num_threads())
        shared = self._texts is not None and self.batch_size != "auto" and not torch.is_autocast_enabled("cpu")
        if threads < 2 or not shared or not computes_best_alone(models):
            with fitting_threads(*models):
                return [self._draw(pairs) for pairs in calls]
        local, twins, before = threading.local(), [], (self.flagged, self.clipped)

        def prepare() -> None:
            torch.set_num_threads(1)  # it becomes that of all later threads of the process, until it is set back
            local.twin = self._twin()
            twins.append(local.twin)

        @torch.no_grad()
        def draw(pairs: list[Pair]) -> list[Medium | None]:
            return local.twin._draw(pairs)

        with fitting_threads(*models), ThreadPoolExecutor(threads, "drawing", prepare) as executor:
            images = list(executor.map(draw, calls))
        self.flagged, self.clipped = (
            counted + sum(getattr(twin, name) - counted for twin in twins)
            for name, counted in zip(("flagged", "clipped"), before, strict=True)
        )
        return images

    def _twin(self) -> "Generator":
        """Itself with a scheduler of its own, which counts steps; weights and kept texts are the same objects."""
        twin = copy.copy(self)
        twin.pipeline = copy.copy(self.pipeline)
        twin.pipeline.scheduler = copy.deepcopy(self.pipeline.scheduler)
        if self.medium == "video":
            twin.pipeline.vae = copy.copy(self.pipeline.vae)  # Wan's keeps what it decoded last
        return twin

    @quiet_libraries()
    def _draw(self, pairs: list[Pair]) -> list[Medium | None]:
        """One call of the pipeline; each image's noise comes from its own seed, on the CPU: the same on all devices."""
        generators = [torch.Generator().manual_seed(seed) for _, seed in pairs]
        arguments = self._text_inputs([text for text, _ in pairs]) | self._options()
        kind = "latent" if self.medium == "views" else "np"
        output = self.pipeline(**arguments, generator=generators, output_type=kind)
        if self.medium != "image":
            return self._media(output, [seed for _, seed in pairs])
        flagged = sum(map(bool, getattr(output, "nsfw_content_detected", None) or []))
        if flagged and not self.flagged:
            logger.warning(
                "generator: its safety checker blackened a picture, which counts as failed; generator.flagged counts "
                "them (model_settings.safety_checker: false draws without it)"
            )
        self.flagged += flagged
        return [_checked_image(pixels) for pixels in output.images]

    def _media(self, output: object, seeds: list[int]) -> list[Medium | None]:
        """The media of a call that gave no pictures; None where there is nothing to see or hear."""
        found = raw_media(self.pipeline, output, seeds, self._size)
        if self.medium == "sound" and (loud := sum(bool((abs(values) > 1).any()) for values in found)):
            if not self.clipped:
                logger.warning("generator: a sound's values were beyond -1 and 1 and cut off there, as in a WAV file")
            self.clipped += loud
        return [medium_of(self.pipeline, values, self._size) for values in found]

    @property
    def _size(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in ("frames", "frame_rate", "seconds", "height", "width")}

    def _options(self) -> dict[str, object]:
        """Steps, size and guidance, as far as the pipeline's call takes them; it may neither resize nor reword."""
        steps = self.num_inference_steps
        given = {"num_inference_steps": steps, "guidance_scale": self.guidance_scale}
        given |= {name: size for name, size in (("height", self.height), ("width", self.width)) if size is not None}
        given |= options(self._form, self._size)
        given |= {"use_resolution_binning": False, "clean_caption": False}
        if isinstance(self.pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            given["sigmas"] = [1 - i / steps for i in range(steps)]  # the default's last step, to almost 0, is wasted
        if self._texts is not None:
            given["negative_prompt"] = None  # some have a text by default, which would contradict the embeddings
        return {name: value for name, value in given.items() if name in self._takes}

    def _text_inputs(self, texts: list[str]) -> dict[str, object]:
        """The prompts as kept embeddings, or as texts for pipelines that the kit cannot encode for."""
        if self._texts is not None:
            return self._texts.inputs(texts, guided=self.guidance_scale > 1)
        unwanted = {} if self.negative_prompt is None else {"negative_prompt": [self.negative_prompt] * len(texts)}
        return {"prompt": texts} | unwanted

    def _check_arguments(self) -> None:
        """Refuse a pipeline that does not draw from texts, or cannot use the size or the guidance that is asked for."""
        kind, takes, scale = type(self.pipeline).__name__, self._takes.keys(), self.guidance_scale
        if missing := sorted({"prompt", "generator", "num_inference_steps", "output_type"} - takes):
            raise ConfigError(
                f"model_settings.sd_model: found {kind}, which takes no {', '.join(missing)}; allowed: a pipeline that "
                "draws from a text and a seed"
            )
        if "guidance_scale" not in takes and scale != 1:
            raise ConfigError(f"generation_settings.guidance_scale: found {scale}, but {kind} takes none; set 1")
        takes_none = "negative_prompt" not in takes or "true_cfg_scale" in takes  # FLUX: distilled
        if self.negative_prompt is not None and (takes_none or scale <= 1):
            reason = f"{kind} takes none" if takes_none else f"guidance_scale is {scale:g}, not above 1"
            raise ConfigError(f"generation_settings.negative_prompt: found one, but {reason}; set null")
        check_size(self.pipeline, self._form, self._size)
        multiple = lcm(size_multiple(self.pipeline), self._form.multiple)
        for name, pixels in (("height", self.height), ("width", self.width)):
            if pixels is not None and pixels % multiple:
                raise ConfigError(
                    f"generation_settings.{name}: found {pixels}, allowed for {kind}: multiples of {multiple}, such as "
                    f"{max(pixels // multiple, 1) * multiple}"
                )

    @cached_property
    def _measured_batch(self) -> int:
        """The most images that fit at once, by drawing one and two images after a first one, which allocates more."""
        device = self.pipeline._execution_device

        def draw(count: int) -> int:
            pairs = [("a red circle", seed) for seed in range(count)]
            return memory_of(lambda: self._draw(pairs), device)

        with _DRAWING, torch.no_grad():
            draw(1)
            free = self.memory or free_memory(device)
            found = largest_batch(draw, free)
        logger.info("generator: image_batch_size auto is %d, measured with %.1f GB of memory", found, free / 1e9)
        return found


def load_generator(config: Config) -> Generator:
    """The generator of a config, frozen, on its device."""
    settings = config.model_settings
    device, _ = placement(settings)["generator_device"]
    dtype, _ = choose_dtype(device, settings.generator_dtype or settings.dtype)
    pipeline = load_pipeline(settings, dtype)
    add_loras(pipeline, settings.generator_lora or [])
    return as_configured(pipeline, config, place(pipeline, device, settings))


def as_configured(pipeline: DiffusionPipeline, config: Config, text_device: torch.device | None) -> Generator:
    """A pipeline as the generator of a config, with its scheduler and what saves memory; `text_device` as there."""
    generation = config.generation_settings
    if generation.scheduler is not None:
        use_scheduler(pipeline, generation.scheduler)
    save_memory(pipeline, config.model_settings)
    drawn = {"num_inference_steps", "guidance_scale", "negative_prompt", "height", "width", "max_sequence_length"}
    drawn |= {"frames", "frame_rate", "seconds"}
    gigabytes = generation.image_memory_gb
    return Generator(
        pipeline,
        text_device=text_device,
        batch_size=generation.image_batch_size,
        memory=None if gigabytes is None else int(gigabytes * 1e9),
        painters=config.model_settings.painters or (),
        **generation.model_dump(include=drawn),
    )


def _infinities_as_nan(pipeline: DiffusionPipeline) -> AbstractContextManager:
    """Meanwhile infinite values of the decoder are NaN: the pipeline would clip them to 0 or 1, and hide them."""
    decoder = getattr(getattr(pipeline, "vae", None), "decoder", None)
    if decoder is None:
        return nullcontext()

    def marked(module: torch.nn.Module, arguments: object, values: torch.Tensor | tuple) -> torch.Tensor | tuple:
        return (marked(module, arguments, values[0]), *values[1:]) if type(values) is tuple else values + values * 0

    return decoder.register_forward_hook(marked)


def _checked_image(pixels: np.ndarray) -> Image.Image | None:
    """(H, W, 3) values in [0, 1] as a picture, or None where they are not finite or show nothing."""
    if not np.isfinite(pixels).all() or np.ptp(pixels) < _SMALLEST_CONTRAST:
        return None
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))
