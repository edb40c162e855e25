"""The outputs of a pipeline's text encoders, kept, so that each text is encoded once however often it is drawn."""

import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import diffusers
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)
KEPT_TEXTS = 256  # the texts used longest ago are dropped: a rewrite comes again soon or never
KEPT_BYTES = 256 * 2**20  # with T5, a text of FLUX takes 4 MB
TEXTS_AT_ONCE = 8  # every call encodes so many, so that an embedding does not depend on how many texts came with it

_ENCODING = threading.Lock()  # tokenizers and the kept texts serve one thread at a time
_GUIDED = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = (*_GUIDED, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
_RETURNS = {  # pipeline → what `encode_prompt` returns, by the names of its call's arguments
    "StableDiffusionPipeline": _GUIDED,
    "StableDiffusionXLPipeline": _POOLED,
    "StableDiffusion3Pipeline": _POOLED,
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds"),  # positions too, which depend on no text
    "PixArtSigmaPipeline": _MASKED,
    "SanaPipeline": _MASKED,
    "WanPipeline": _GUIDED,
    "LTXPipeline": _MASKED,
    "CogVideoXPipeline": _GUIDED,
    "StableAudioPipeline": ("prompt_embeds", "attention_mask", "negative_prompt_embeds", "negative_attention_mask"),
}
_Row = dict[str, torch.Tensor]


def has_separate_encoding(pipeline: DiffusionPipeline) -> bool:
    """Whether the kit can encode the pipeline's texts apart from drawing; other pipelines are given the texts."""
    return type(pipeline).__name__ in _RETURNS


@dataclass(eq=False, repr=False)
class TextEmbeddings:
    """A pipeline's inputs for texts; `truncated` counts the texts that were longer than its encoder reads, and cut."""

    pipeline: DiffusionPipeline  # one that `has_separate_encoding`
    max_sequence_length: int | None = None  # tokens for a T5 encoder; None: the pipeline's default
    device: torch.device | None = None  # where the text encoders are; None: where the pipeline computes
    negative_prompt: str | None = None  # what the negative branch reads; None: what the pipeline has by itself

    def __post_init__(self) -> None:
        self.truncated = 0
        self._names = _RETURNS[type(self.pipeline).__name__]
        self._projects_again = type(self.pipeline).__name__ == "StableAudioPipeline"
        self._options = _encoding_options(self.pipeline, self.max_sequence_length)
        self._at_once = TEXTS_AT_ONCE if self.device is None else 1  # on the CPU, texts that only fill up take too long
        self._kept: OrderedDict[str | None, _Row] = OrderedDict()  # None: the negative branch

    def inputs(self, texts: Sequence[str], guided: bool) -> dict[str, torch.Tensor]:
        """Arguments of the pipeline's call for N texts: name → (N, …), with a negative branch where `guided`."""
        guided = guided and "negative_prompt_embeds" in self._names
        if self._projects_again and self.negative_prompt is None:
            guided = False  # its call takes zeros then, behind the projection
        with _ENCODING:
            self._keep(texts, guided)
            inputs = _stacked([self._kept[text] for text in texts])
            return inputs | _stacked([self._kept[None]] * len(texts)) if guided else inputs

    def _keep(self, texts: Sequence[str], guided: bool) -> None:
        """Encode the texts that are not kept yet, beside empty ones where they are too few; drop the oldest."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        for start in range(0, len(new), self._at_once):
            part = new[start : start + self._at_once]
            for text in part:
                self._count_truncated(text)
            rows = self._encoded(part + [""] * (self._at_once - len(part)))
            self._kept.update(zip(part, rows, strict=False))
        if guided and None not in self._kept:
            if self.negative_prompt is not None:
                self._count_truncated(self.negative_prompt)
            self._kept[None] = self._encoded([""] * self._at_once, guided=True)[0]
        for key in (*texts, *([None] if guided else [])):
            self._kept.move_to_end(key)
        size = sum(tensor.nbytes for tensor in self._kept[texts[0]].values())
        while len(self._kept) > max(min(KEPT_TEXTS, KEPT_BYTES // size), len(texts) + 1):
            self._kept.popitem(last=False)

    def _encoded(self, texts: list[str], guided: bool = False) -> list[_Row]:
        """The embeddings of each text, or with `guided` those of the negative branch beside it."""
        draws_on = self.pipeline._execution_device
        options = self._options | {"device": self.device or draws_on, "do_classifier_free_guidance": guided}
        if self.negative_prompt is not None:
            options["negative_prompt"] = [self.negative_prompt] * len(texts)
        if self._projects_again:
            returned = self._hidden_states(options["negative_prompt"] if guided else texts, options["device"]) * 2
        else:
            takes = inspect.signature(type(self.pipeline).encode_prompt).parameters
            returned = self.pipeline.encode_prompt(texts, **{name: options[name] for name in takes if name in options})
        named = zip(self._names, returned, strict=False)
        columns = {name: values for name, values in named if name.startswith("negative") == guided}
        return [{name: v[row].to(draws_on, copy=True) for name, v in columns.items()} for row in range(len(texts))]

    def _hidden_states(self, texts: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """What T5 reads, and its mask: Stable Audio's call projects what it is given, as `encode_prompt` does."""
        length = {"padding": "max_length", "max_length": self.pipeline.tokenizer.model_max_length}
        tokens = self.pipeline.tokenizer(texts, **length, truncation=True, return_tensors="pt").to(device)
        states = self.pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return states, tokens.attention_mask

    def _count_truncated(self, text: str) -> None:
        """Count a text that is too long; only the first one is reported."""
        tokenizer = self.pipeline.tokenizer
        longest = tokenizer.model_max_length
        if not isinstance(tokenizer, CLIPTokenizer):  # T5 and Gemma read as many tokens as `encode_prompt` says
            longest = self._options.get("max_sequence_length", longest)
        if len(tokenizer(text, verbose=False).input_ids) > longest:
            if not self.truncated:
                logger.warning(
                    "generator: a prompt of more than %d tokens was cut by its text encoder: %r", longest, text
                )
            self.truncated += 1


def _encoding_options(pipeline: DiffusionPipeline, max_sequence_length: int | None) -> dict[str, object]:
    """Arguments of `encode_prompt` in any family, with the defaults of the pipeline's call."""
    options: dict[str, object] = {"prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1}
    defaults = {name: p.default for name, p in inspect.signature(type(pipeline).__call__).parameters.items()}
    for name in ("max_sequence_length", "complex_human_instruction"):  # the latter is Sana's instruction to Gemma
        if name in defaults:
            options[name] = defaults[name]
    if max_sequence_length is not None:
        options["max_sequence_length"] = max_sequence_length
    if isinstance(pipeline, diffusers.StableDiffusion3Pipeline) and pipeline.text_encoder_3 is None:
        options["max_sequence_length"] = 0  # else a T5 that was left out adds rows of zeros
    return options


def _stacked(rows: list[_Row]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
