"""What the policy reads: a user's prompt in its instruction, in the chat template of the model, as token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from jinja2 import TemplateError
from PIL import Image

from grpo_kit.config.display import Shown
from grpo_kit.config.hub import ModelError
from grpo_kit.config.prompts import without_control_tokens
from grpo_kit.config.quiet import quiet_libraries

_TEMPLATE = "vlm_model: its chat template does not fit"
_WITHOUT_SYSTEM = 'set system_prompt to "" and say it in model_settings.instruction, or set another template'


@dataclass(frozen=True, repr=False)
class EncodedPrompts(Shown):
    """P prompts as a model reads them, tokenised once: they lie on the CPU until some of them are run."""

    prompts: list[str]  # P, the users'
    images: list[Image.Image] | None  # P, where the policy sees one with each prompt
    inputs: dict[str, torch.Tensor]  # ids and mask (P, length), left-padded, and what belongs to the pictures
    rows: dict[str, list[int]]  # name → rows of each prompt, for the tensors that have not just one of each

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, places: Sequence[int]) -> "EncodedPrompts":
        """Those at the places, in that order, as if they alone had been encoded: padded to the longest of them."""
        places = list(places)
        shape, length = self.inputs["input_ids"].shape, int(self.inputs["attention_mask"][places].sum(dim=1).max())
        inputs = {}
        for name, value in self.inputs.items():
            if name in self.rows:
                parts = value.split(self.rows[name])
                inputs[name] = torch.cat([parts[place] for place in places])
            else:
                inputs[name] = value[places][:, -length:] if value.shape == shape else value[places]
        return EncodedPrompts(
            [self.prompts[place] for place in places],
            self.images and [self.images[place] for place in places],
            inputs,
            {name: [rows[place] for place in places] for name, rows in self.rows.items()},
        )

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The model's inputs on its device."""
        return {name: value.to(device) for name, value in self.inputs.items()}


@dataclass(eq=False, repr=False)
class PromptFormat:
    """How a model is asked."""

    processor: object  # the model's processor (vision-language) or tokenizer (text only)
    _: KW_ONLY
    instruction: str  # the user turn, with "{prompt}" where the user's prompt goes
    system_prompt: str = ""
    chat_template_kwargs: Mapping[str, object] | None = None  # variables, such as Qwen3's `enable_thinking`

    def __post_init__(self) -> None:
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.sees = self.tokenizer is not self.processor

    def encode(self, prompts: Sequence[str], images: Sequence[Image.Image] | None = None) -> EncodedPrompts:
        """User prompts (and one picture each, which a text-only policy refuses) as the model reads them."""
        if images is not None and not self.sees:
            raise ModelError("use_image: found true, but this policy is text-only; set model_settings.use_image: false")
        texts = [self.format_prompt(prompt, with_image=images is not None) for prompt in prompts]
        inputs = self._processed(texts, images)
        uneven = [name for name, value in inputs.items() if len(value) != len(texts)]
        if uneven == ["pixel_values"] and "image_grid_thw" in inputs:  # Qwen-VL: all pictures' patches below each other
            rows = {"pixel_values": inputs["image_grid_thw"].prod(dim=1).tolist()}
        else:
            alone = [self._processed([text], images and [images[place]]) for place, text in enumerate(texts) if uneven]
            rows = {name: [len(one[name]) for one in alone] for name in uneven}
        return EncodedPrompts(list(prompts), images and list(images), inputs, rows)

    @quiet_libraries()
    def _processed(self, texts: Sequence[str], images: Sequence[Image.Image] | None) -> dict[str, torch.Tensor]:
        """What processor or tokenizer make of formatted prompts and their pictures."""
        start = self.tokenizer.bos_token  # a processor's template may leave it to the tokenizer (LLaVA 1.5)
        written = self.chats and (not self.sees or (start is not None and texts[0].startswith(start)))
        options = {"padding": True, "padding_side": "left", "add_special_tokens": not written, "return_tensors": "pt"}
        if self.sees:
            pictures = None if images is None else [[image] for image in images]  # one list a prompt
            batch = self.processor(text=list(texts), images=pictures, **options)
        else:
            batch = self.tokenizer(list(texts), **options)
        return {name: value for name, value in batch.items() if name != "token_type_ids"}

    def format_prompt(self, prompt: str, with_image: bool = False) -> str:
        """The text that the model reads: instruction and prompt in its chat template, or plainly where it has none.

        It is a `ModelError` where the template refuses the turns, or leaves one of them out.
        """
        text = self.instruction.replace("{prompt}", without_control_tokens(prompt, self.tokenizer))
        if not self.chats:
            picture = self.processor.image_token if with_image else ""
            return "\n".join(part for part in (picture, self.system_prompt, text) if part)
        turns = [{"role": "user", "content": self._content(text, with_image)}]
        if self.system_prompt:
            turns.insert(0, {"role": "system", "content": self._content(self.system_prompt)})
        variables = {name: value for name, value in (self.chat_template_kwargs or {}).items() if name in self._template}
        try:
            read = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **variables)
        except TemplateError as error:
            raise ModelError(f"{_TEMPLATE}: it refuses the turns ({error}); {_WITHOUT_SYSTEM}") from error
        for part in (self.system_prompt, text):
            if part.strip() not in read:
                raise ModelError(f"{_TEMPLATE}: it leaves out {part.strip()[:60]!r}; {_WITHOUT_SYSTEM}")
        return read

    def _content(self, text: str, with_image: bool = False) -> str | list[dict[str, str]]:
        """A turn's content: in parts for a model that sees, whose templates look for them; else the text."""
        if not self.sees:
            return text
        return [*([{"type": "image"}] if with_image else []), {"type": "text", "text": text}]

    @property
    def _template(self) -> str:
        """The chat template, "" where there is none."""
        template = getattr(self.processor, "chat_template", None) or ""
        return template if isinstance(template, str) else "\n".join(template.values())  # several, by name

    @property
    def chats(self) -> bool:
        """Whether prompts are put into a chat template."""
        return bool(self._template)
