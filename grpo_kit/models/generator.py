"""The generator: any diffusers text-to-image pipeline, frozen, drawn from with one seed per image."""

import inspect
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers import logging as transformers_logging

from grpo_kit.config import Config
from grpo_kit.hardware import choose_dtype, placement
from grpo_kit.models.loading import ModelError, load_failure

logger = logging.getLogger(__name__)
_KEPT_TEXTS = 256  # prompt embeddings kept, the oldest go first: a rewrite comes again soon or never
_DRAWING = threading.Lock()  # a pipeline keeps a call's schedule in itself: one thread at a time
_TEXTS_AT_ONCE = 8  # always exactly so many, so that a text's embedding does not depend on how many came with it
_SMALLEST_CONTRAST = 2 / 255  # an image whose lightest and darkest values differ by less is blank
Pair = tuple[str, int]  # a text and a seed: what makes a picture


class Generator:
    """A frozen pipeline with its sampling settings.

    Args:
        pipeline: a diffusers text-to-image pipeline.
        num_inference_steps: denoising steps an image.
        guidance_scale: classifier-free guidance; at 1 the negative branch is not computed.
        height, width: pixels; None means the pipeline's own size.
        max_sequence_length: tokens for a T5 encoder, where the pipeline has one; None means its default.
        batch_size: most images drawn in one call.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        batch_size: int = 16,
    ) -> None:
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.height, self.width = height, width
        self.max_sequence_length = max_sequence_length
        self.batch_size = batch_size
        self.truncated = 0  # texts that were longer than the pipeline's CLIP encoders read, and were cut
        self._embeddings: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def generate_image(self, prompt: str, seed: int = 0) -> Image.Image:
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
    def generate_images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        """One picture for each prompt and seed; None where it came out blank or not finite.

        Equal (prompt, seed) pairs are drawn once. A picture depends on its prompt and seed, not on the batch around it,
        up to rounding: batched matrix products may move a value of 255 by one.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"seeds: found {len(seeds)} for {len(prompts)} prompts, one each is needed")
        wanted = [(str(prompt), int(seed)) for prompt, seed in zip(prompts, seeds, strict=True)]
        distinct = list(dict.fromkeys(wanted))
        drawn: dict[Pair, Image.Image | None] = {}
        for pairs in even_batches(distinct, self.batch_size):
            with _DRAWING:
                drawn.update(zip(pairs, self._draw(pairs), strict=True))
        return [drawn[pair] for pair in wanted]

    def _draw(self, pairs: list[Pair]) -> list[Image.Image | None]:
        """One pipeline call; each image's noise comes from its own seed, on the CPU, so that devices agree."""
        generators = [torch.Generator().manual_seed(seed) for _, seed in pairs]
        sizes = {name: value for name, value in (("height", self.height), ("width", self.width)) if value}
        inputs = self._text_inputs([text for text, _ in pairs])
        with _infinities_as_nan(self.pipeline):
            output = self.pipeline(
                **inputs,
                **self._schedule(),
                **sizes,
                guidance_scale=self.guidance_scale,
                generator=generators,
                output_type="np",
            )
        return [_checked_image(pixels) for pixels in output.images]

    def _schedule(self) -> dict[str, object]:
        """Steps, evenly spaced down to 1/n where the scheduler allows it (its own last step would be wasted)."""
        steps = self.num_inference_steps
        takes_sigmas = "sigmas" in inspect.signature(self.pipeline.__call__).parameters
        if takes_sigmas and isinstance(self.pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            return {"num_inference_steps": steps, "sigmas": [1 - i / steps for i in range(steps)]}
        return {"num_inference_steps": steps}

    def _text_inputs(self, texts: list[str]) -> dict[str, object]:
        """The prompts as kept embeddings (SD3), or as text for the pipelines that encode in their own ways."""
        if not isinstance(self.pipeline, StableDiffusion3Pipeline):
            return {"prompt": texts}
        self._remember(texts)
        inputs = self._stacked(texts, "prompt_embeds", "pooled_prompt_embeds")
        if self.guidance_scale > 1:
            self._remember([""])
            negative = self._stacked([""] * len(texts), "negative_prompt_embeds", "negative_pooled_prompt_embeds")
            inputs |= negative
        return inputs

    def _stacked(self, texts: list[str], *names: str) -> dict[str, torch.Tensor]:
        columns = zip(*(self._embeddings[text] for text in texts), strict=True)
        return {name: torch.stack(column) for name, column in zip(names, columns, strict=True)}

    def _remember(self, texts: list[str]) -> None:
        """Embed the texts that are not yet kept."""
        new = [text for text in dict.fromkeys(texts) if text not in self._embeddings]
        for start in range(0, len(new), _TEXTS_AT_ONCE):
            self._embed(new[start : start + _TEXTS_AT_ONCE])
        for text in texts:
            self._embeddings.move_to_end(text)
        while len(self._embeddings) > max(_KEPT_TEXTS, len(texts) + 1):
            self._embeddings.popitem(last=False)

    def _embed(self, texts: list[str]) -> None:
        """Keep the embeddings of a few texts, encoded beside empty ones where they are too few."""
        for text in texts:
            self._count_truncated(text)
        filled = texts + [""] * (_TEXTS_AT_ONCE - len(texts))
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            filled, None, None, do_classifier_free_guidance=False, **self._t5_length()
        )
        for text, *kept in zip(texts, embeddings, pooled, strict=False):
            self._embeddings[text] = tuple(tensor.clone() for tensor in kept)

    def _count_truncated(self, text: str) -> None:
        """Count over-long texts; only the first is reported, since a flood of warnings hides everything else."""
        longest = self.pipeline.tokenizer.model_max_length
        if len(self.pipeline.tokenizer(text).input_ids) > longest:
            if not self.truncated:
                logger.warning(
                    "generator: a prompt longer than %d tokens was cut, as CLIP encoders do: %r", longest, text
                )
            self.truncated += 1

    def _t5_length(self) -> dict[str, int]:
        if self.pipeline.text_encoder_3 is None:
            return {"max_sequence_length": 0}  # a dropped T5 must not leave a row of zero tokens behind
        return {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}


def even_batches(items: Sequence[Pair], most: int) -> Iterator[list[Pair]]:
    """Consecutive parts of at most `most` items, as even as can be: the last few would cost more an image."""
    calls = math.ceil(len(items) / most)
    size = math.ceil(len(items) / max(calls, 1))
    for start in range(0, len(items), max(size, 1)):
        yield list(items[start : start + size])


def load_generator(config: Config) -> Generator:
    """The generator of a config, frozen, on its device."""
    settings, generation = config.model_settings, config.generation_settings
    device, _ = placement(settings)["generator_device"]
    dtype, _ = choose_dtype(device, settings.dtype)
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()  # they warn of every cut prompt; the generator counts them instead
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None} if settings.drop_t5 else {}
    try:
        pipeline = DiffusionPipeline.from_pretrained(settings.sd_model, dtype=dtype, **without_t5)
    except Exception as error:  # the libraries raise a dozen kinds; each becomes one line that says what to do
        raise ModelError(load_failure("sd_model", settings.sd_model, error)) from error
    return Generator(
        pipeline.to(device),
        num_inference_steps=generation.num_inference_steps,
        guidance_scale=generation.guidance_scale,
        height=generation.height,
        width=generation.width,
        max_sequence_length=generation.max_sequence_length,
        batch_size=generation.image_batch_size,
    )


@contextmanager
def _infinities_as_nan(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Let an infinite value that the decoder gives become NaN: a pipeline cuts it to 0 or 1, where nobody sees it."""
    decoder = getattr(getattr(pipeline, "vae", None), "decoder", None)
    if decoder is None:
        yield
        return
    hook = decoder.register_forward_hook(lambda module, arguments, values: values + values * 0)
    try:
        yield
    finally:
        hook.remove()


def _checked_image(pixels: np.ndarray) -> Image.Image | None:
    """(H, W, 3) values in [0, 1] as a picture, or None where they are not finite or show nothing."""
    if not np.isfinite(pixels).all() or np.ptp(pixels) < _SMALLEST_CONTRAST:
        return None
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))
