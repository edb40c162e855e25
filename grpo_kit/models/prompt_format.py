"""What the policy reads: a user's prompt in its instruction, in the chat template of the model, as token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from PIL import Image

from grpo_kit.config import one_line
from grpo_kit.config.display import Shown
from grpo_kit.config.hub import ModelError
from grpo_kit.config.prompts import without_control_tokens
from grpo_kit.config.quiet import quiet_libraries
from grpo_kit.models.conversation import Conversation, conversations, within_pixels

_TEMPLATE = "vlm_model: its chat template does not fit"
_WITHOUT_SYSTEM = 'set system_prompt to "" and say it in model_settings.instruction, or set another template'
_ONE_TURN = "set generation_settings.turns: 1, or another template"
Said = tuple[str, str, int]  # a turn: role, text, number of pictures before it


_ANY = Image.new("RGB", (1, 1))  # a picture, where only its place in the text counts


@dataclass(frozen=True, repr=False)
class EncodedPrompts(Shown):
    """P prompts as a model reads them, tokenised once: they lie on the CPU until some of them are run."""

    conversations: list[Conversation]  # P
    inputs: dict[str, torch.Tensor]  # ids and mask (P, length), left-padded, and what belongs to the pictures
    rows: dict[str, list[int]]  # name → rows of each prompt, for the tensors that have not just one of each

    def __len__(self) -> int:
        return len(self.conversations)

    def take(self, places: Sequence[int]) -> "EncodedPrompts":
        """Those at the places, in that order, as if they alone had been encoded: padded to the longest of them."""
        places = list(places)
        shape, length = self.inputs["input_ids"].shape, int(self.inputs["attention_mask"][places].sum(dim=1).max())
        inputs = {}
        for name, value in self.inputs.items():
            if name in self.rows:
                if not any(self.rows[name][place] for place in places):
                    continue  # none of them has a picture
                parts = value.split(self.rows[name])
                inputs[name] = torch.cat([parts[place] for place in places])
            else:
                inputs[name] = value[places][:, -length:] if value.shape == shape else value[places]
        rows = {name: [rows[place] for place in places] for name, rows in self.rows.items() if name in inputs}
        return EncodedPrompts([self.conversations[place] for place in places], inputs, rows)

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The model's inputs on its device."""
        return {name: value.to(device) for name, value in self.inputs.items()}


def joined(parts: Sequence[EncodedPrompts], pad_token_id: int) -> EncodedPrompts:
    """Prompts that were encoded apart, one after the other; they may have pictures in some and none in others."""
    ids, inputs, rows = [part.inputs["input_ids"] for part in parts], {}, {}
    length = max(one.shape[1] for one in ids)
    for name in dict.fromkeys(name for part in parts for name in part.inputs):
        values = [part.inputs.get(name) for part in parts]
        first = next(value for value in values if value is not None)
        if next(first.shape == one.shape for value, one in zip(values, ids, strict=True) if value is not None):
            missing = (torch.zeros_like(one) for one in ids)
            filled = [zeros if value is None else value for value, zeros in zip(values, missing, strict=True)]
            fill = pad_token_id if name == "input_ids" else 0
            inputs[name] = torch.cat([F.pad(value, (length - value.shape[1], 0), value=fill) for value in filled])
            continue
        present = [value for value in values if value is not None]
        inputs[name] = torch.cat(_of_one_shape(present))
        if name in {key for part in parts for key in part.rows} or len(present) < len(parts):
            given = [part.rows.get(name, [int(name in part.inputs)] * len(part)) for part in parts]
            rows[name] = [count for counts in given for count in counts]
    return EncodedPrompts([one for part in parts for one in part.conversations], inputs, rows)


def _of_one_shape(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors with zeros added at the end of each axis but the first, so that they can stand below each other."""
    sizes = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    return [
        F.pad(value, [n for size, own in zip(sizes[::-1], value.shape[:0:-1], strict=True) for n in (0, size - own)])
        for value in values
    ]


def _help(said: Sequence[Said]) -> str:
    """What to do about a template: what refuses later turns has taken the first."""
    return _ONE_TURN if len(said) > 1 else _WITHOUT_SYSTEM


@dataclass(eq=False, repr=False)
class PromptFormat:
    """How a model is asked."""

    processor: object  # the model's processor (vision-language) or tokenizer (text only)
    _: KW_ONLY
    instruction: str  # the user turn, with "{prompt}" where the user's prompt goes
    look_instruction: str = "{prompt}"  # the user turn that shows the picture of an earlier turn
    system_prompt: str = ""
    chat_template_kwargs: Mapping[str, object] | None = None  # variables, such as Qwen3's `enable_thinking`
    min_pixels: int | None = None  # of a picture that the model reads; smaller ones are made larger; None: as they are
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.sees = self.tokenizer is not self.processor

    def encode(
        self, prompts: Sequence[str | Conversation], images: Sequence[Image.Image] | None = None
    ) -> EncodedPrompts:
        """Prompts (with one picture each), or conversations, as the model reads them.

        A `ModelError` where there are pictures and the policy is text-only.
        """
        asked = conversations(prompts, images)
        counts = {len(one.pictures) for one in asked}
        if counts != {0}:
            self.require_eyes()
        if len(counts) > 1 or max(counts) > 1:  # processors differ in how they read these in one call
            alone = [self._encoded_alike([one]) for one in asked]
            return joined(alone, self.tokenizer.pad_token_id or 0)
        return self._encoded_alike(asked)

    def require_eyes(self) -> None:
        """Raise `ModelError` where the policy is text-only."""
        if not self.sees:
            raise ModelError(
                "pictures: found some for the policy to read, but it is text-only; take a vision-language model, or "
                "set model_settings.use_image: false, or look_at: nothing"
            )

    def _encoded_alike(self, asked: list[Conversation]) -> EncodedPrompts:
        """Conversations that have none or one picture each, or a single one with any number."""
        texts = [self.format_prompt(one) for one in asked]
        bounds, sees = (self.min_pixels, self.max_pixels), bool(asked[0].pictures)
        images = [[within_pixels(one, *bounds) for one in each.pictures] for each in asked] if sees else None
        inputs = self._processed(texts, images)
        uneven = [name for name, value in inputs.items() if len(value) != len(texts)]
        if uneven == ["pixel_values"] and "image_grid_thw" in inputs:  # Qwen-VL: all pictures' patches below each other
            rows = {"pixel_values": inputs["image_grid_thw"].prod(dim=1).tolist()}
        elif len(texts) == 1:
            rows = {name: [len(inputs[name])] for name in uneven}
        else:
            alone = [self._processed([text], images and [images[place]]) for place, text in enumerate(texts) if uneven]
            rows = {name: [len(one[name]) for one in alone] for name in uneven}
        return EncodedPrompts(asked, inputs, rows)

    @quiet_libraries()
    def _processed(self, texts: Sequence[str], images: Sequence[list[Image.Image]] | None) -> dict[str, torch.Tensor]:
        """What processor or tokenizer make of formatted prompts and their pictures, a list a prompt."""
        start = self.tokenizer.bos_token  # a processor's template may leave it to the tokenizer (LLaVA 1.5)
        written = self.chats and (not self.sees or (start is not None and texts[0].startswith(start)))
        options = {"padding": True, "padding_side": "left", "add_special_tokens": not written, "return_tensors": "pt"}
        if self.sees:
            try:
                batch = self.processor(text=list(texts), images=images, **options)
            except (ValueError, TypeError, IndexError, RuntimeError) as error:
                if max(map(len, images or [[]])) < 2:
                    raise
                raise ModelError(
                    f"vlm_model: its processor refuses several pictures in one conversation ({one_line(error)}); "
                    "set generation_settings.turns: 1, or model_settings.look_at: words"
                ) from error
        else:
            batch = self.tokenizer(list(texts), **options)
        return {name: value for name, value in batch.items() if name != "token_type_ids"}

    def format_prompt(self, prompt: str | Conversation, with_image: bool = False) -> str:
        """The text that the model reads: instruction and prompt in its chat template, or plainly where it has none.

        It is a `ModelError` where the template refuses the turns, or leaves one of them out.
        """
        one = conversations([prompt], [_ANY] if with_image else None)[0]
        said = self._said(one)
        if not self.chats:
            lines = [line for _, text, pictures in said for line in (*[self._image_token] * pictures, text)]
            pictures = lines[: len(one.images)]
            return "\n".join(line for line in (*pictures, self.system_prompt, *lines[len(pictures) :]) if line)
        read = self._rendered(said)
        if self.system_prompt.strip() not in read:
            raise ModelError(f"{_TEMPLATE}: it leaves out {self.system_prompt.strip()[:60]!r}; {_WITHOUT_SYSTEM}")
        self._require_all(said, read)
        return read

    def _rendered(self, said: Sequence[Said]) -> str:
        """The turns in the chat template."""
        turns = [{"role": role, "content": self._content(text, pictures)} for role, text, pictures in said]
        if self.system_prompt:
            turns.insert(0, {"role": "system", "content": self._content(self.system_prompt)})
        variables = {name: value for name, value in (self.chat_template_kwargs or {}).items() if name in self._template}
        try:
            return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **variables)
        except TemplateError as error:
            raise ModelError(f"{_TEMPLATE}: it refuses the turns ({error}); {_help(said)}") from error

    def _require_all(self, said: Sequence[Said], read: str) -> None:
        """Raise where the template left out a turn's text or picture; texts may repeat, and stand in their order."""
        end = 0
        for place, (role, text, pictures) in enumerate(said):
            start = read.find(text.strip(), end)
            if start < 0:
                raise ModelError(f"{_TEMPLATE}: it leaves out {text.strip()[:60]!r}; {_help(said)}")
            end = start + len(text.strip())
            if pictures and self._rendered([*said[:place], (role, text, pictures - 1), *said[place + 1 :]]) == read:
                raise ModelError(f"{_TEMPLATE}: it leaves out a picture of turn {place // 2 + 1}; {_help(said)}")

    def _said(self, one: Conversation) -> list[Said]:
        prompt = without_control_tokens(one.prompt, self.tokenizer)
        said = [("user", self.instruction.replace("{prompt}", prompt), len(one.images))]
        for turn in one.turns:
            looked = self.look_instruction.replace("{prompt}", prompt)
            if turn.words:
                looked = f"{without_control_tokens(turn.words, self.tokenizer)} {looked}"
            said.append(("assistant", without_control_tokens(turn.rewrite, self.tokenizer), 0))
            said.append(("user", looked, int(turn.image is not None)))
        return said

    @property
    def _image_token(self) -> str:
        return getattr(self.processor, "image_token", "")

    def _content(self, text: str, pictures: int = 0) -> str | list[dict[str, str]]:
        """A turn's content: in parts for a model that sees, whose templates look for them; else the text."""
        if not self.sees:
            return text
        return [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]

    @property
    def _template(self) -> str:
        """The chat template, "" where there is none."""
        template = getattr(self.processor, "chat_template", None) or ""
        return template if isinstance(template, str) else "\n".join(template.values())  # several, by name

    @property
    def chats(self) -> bool:
        """Whether prompts are put into a chat template."""
        return bool(self._template)
