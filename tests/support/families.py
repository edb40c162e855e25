"""Policies as users have them, each a tiny model of its family's own classes, written in the hub's form.

The chat templates are those that the families publish, without tools, videos and reasoning.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Gemma3TextConfig,
    GPT2Config,
    GPT2Tokenizer,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

SEED = 0
WORDS = ["Rewrite this request: a red circle, sharp, above two tiny golden pyramids at night. You help. user assistant"]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3, **HEADS}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"image_size": 32, "patch_size": 8}  # 16 patches
LONGEST = 512  # positions

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
)
ONEVISION = (
    "{% for message in messages %}<|im_start|>{{ message.role + ' ' }}"
    "{% for part in message.content | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}\n{{ part.text }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS3 = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
LLAVA = (
    "{% for message in messages %}{% if message.role != 'system' %}{{ message.role.upper() + ': ' }}{% endif %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAVA_NEXT = (
    "{% for message in messages %}{% if message.role == 'system' %}<<SYS>>\n{{ message.content[0].text }}\n<</SYS>>\n\n"
    "{% elif message.role == 'user' %}[INST] "
    "{% for part in message.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content[0].text }}<\\s> {% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DIALOGPT = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A policy of one architecture: `write` puts it into a folder, as `save_pretrained` does."""

    name: str
    write: Callable[[Path], None]
    sees: bool
    system: bool = True  # its template takes a system turn
    needs: str | None = None  # a package that its processor imports

    @property
    def views(self) -> list[bool]:
        """Whether a prompt comes with a picture: both for a model that sees."""
        return [False, True] if self.sees else [False]


# --- tokenizers, each of its family's class, trained on a few words ---------------------------------------------------


@cache
def _pieces(kind: type[PreTrainedTokenizerBase], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a class's own algorithm."""
    trained = kind().train_new_from_iterator(WORDS * 20, vocab_size=size)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _byte_level(kind: type[PreTrainedTokenizerBase], special: Sequence[str], **options: object) -> object:
    """A tokenizer of byte pieces (Qwen, GPT-2), with special tokens."""
    tokenizer = kind(*_pieces(kind, 300), **options)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def _sentence_pieces(special: Sequence[str], **options: object) -> LlamaTokenizer:
    """Llama 2's tokenizer, which writes `<s>` before a text, and bytes for what it does not know."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for text in WORDS for letter in text.replace(" ", "▁")})
    vocabulary = {piece: number for number, piece in enumerate([*names, *letters])}
    tokenizer = LlamaTokenizer(vocabulary, [], add_bos_token=True, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def _with_start(special: Sequence[str], start: str, **options: object) -> PreTrainedTokenizerFast:
    """Byte pieces behind a start token, in no class of its own: Llama 3's form."""
    from tokenizers.processors import TemplateProcessing

    plain = _byte_level(Qwen2Tokenizer, [start, *special])
    raw = plain.backend_tokenizer
    raw.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, plain.convert_tokens_to_ids(start))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=start, extra_special_tokens=[start, *special], **options
    )


# --- writing ----------------------------------------------------------------------------------------------------------


def _ids(tokenizer: PreTrainedTokenizerBase, **names: str) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _write(folder: Path, config: PretrainedConfig, processor: object, ends: Sequence[str]) -> None:
    """Random weights from the config's own class, with the processor and several tokens that end a completion.

    One token in eight ends a completion too: else an untrained model would hardly ever stop.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    kind = AutoModelForCausalLM if tokenizer is processor else AutoModelForImageTextToText
    torch.manual_seed(SEED)
    model = kind.from_config(config)
    own = [tokenizer.convert_tokens_to_ids(end) for end in ends]
    model.generation_config.eos_token_id = [*own, *range(40, 256, 8)]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _text(tokenizer: PreTrainedTokenizerBase, **options: object) -> dict[str, object]:
    """The settings of a decoder for a tokenizer."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": LONGEST, "pad_token_id": tokenizer.pad_token_id}
    return DECODER | size | ends | options


QWEN = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen_tokenizer() -> Qwen2Tokenizer:
    tokenizer = _byte_level(Qwen2Tokenizer, QWEN, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(["<think>", "</think>"])  # added, not special
    return tokenizer


def _qwen_pictures(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    places = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return _ids(tokenizer, **names, **places)


PATCHES = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
PIXELS = {"size": {"shortest_edge": 32 * 32, "longest_edge": 48 * 48}}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def qwen2_5_vl(folder: Path) -> None:
    tokenizer = _qwen_tokenizer()
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**PATCHES, **PIXELS),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**PATCHES, **PIXELS),
        chat_template=CHATML,
    )
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = _text(tokenizer, rope_parameters=ROPE)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_pictures(tokenizer))
    _write(folder, config, processor, ["<|im_end|>", "<|endoftext|>"])


def qwen3_vl(folder: Path) -> None:
    tokenizer = _qwen_tokenizer()
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**PATCHES, **PIXELS),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**PATCHES, **PIXELS),
        chat_template=CHATML,
    )
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    text = _text(tokenizer, head_dim=8, rope_parameters=ROPE | {"mrope_interleaved": True})
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_pictures(tokenizer))
    _write(folder, config, processor, ["<|im_end|>", "<|endoftext|>"])


def _smolvlm_tokenizer() -> GPT2Tokenizer:
    parts = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    special = ["<|im_start|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *parts]
    ends = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    return _byte_level(GPT2Tokenizer, [*special, "<|im_end|>"], **ends)


PARTS = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def _smolvlm(folder: Path, kind: type[PretrainedConfig], processor: object) -> None:
    tokenizer = processor.tokenizer
    config = kind(
        text_config=_text(tokenizer) | {"model_type": "llama"},
        vision_config=VISION | SQUARE,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        **_ids(tokenizer, image_token_id="<image>"),
    )
    _write(folder, config, processor, ["<end_of_utterance>", "<|im_end|>"])


def smolvlm(folder: Path) -> None:
    """SmolVLM in its first form, which is Idefics3's: a picture is cut into parts, the whole beside them."""
    pictures = Idefics3ImageProcessor(**PARTS)
    processor = Idefics3Processor(pictures, _smolvlm_tokenizer(), image_seq_len=4, chat_template=IDEFICS3)
    _smolvlm(folder, Idefics3Config, processor)


def smolvlm2(folder: Path) -> None:
    """SmolVLM 2, which has classes of its own."""
    pictures, videos = SmolVLMImageProcessor(**PARTS), SmolVLMVideoProcessor(**PARTS)
    processor = SmolVLMProcessor(pictures, _smolvlm_tokenizer(), videos, image_seq_len=4, chat_template=IDEFICS3)
    _smolvlm(folder, SmolVLMConfig, processor)


def llava(folder: Path) -> None:
    """LLaVA 1.5: Llama 2's tokenizer, whose start token the template leaves to it; CLIP's patches without the first."""
    tokenizer = _sentence_pieces(["<image>", "<pad>"], pad_token="<pad>")
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=LLAVA,
        num_additional_image_tokens=1,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=_text(tokenizer) | {"model_type": "llama"},
        vision_config=VISION | SQUARE | {"model_type": "clip_vision_model"},
        image_seq_length=16,
        vision_feature_layer=-2,
        **_ids(tokenizer, image_token_index="<image>"),
    )
    _write(folder, config, processor, ["</s>"])


PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def llava_next(folder: Path) -> None:
    """LLaVA 1.6 with Mistral: a picture in tiles of any proportion."""
    tokenizer = _sentence_pieces(["<image>", "<pad>"], pad_token="<pad>")
    pictures = LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=LLAVA_NEXT,
        num_additional_image_tokens=1,
    )  # fmt: skip
    config = LlavaNextConfig(
        text_config=_text(tokenizer, sliding_window=None) | {"model_type": "mistral"},
        vision_config=VISION | SQUARE | {"model_type": "clip_vision_model"},
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        vision_feature_layer=-2,
        **_ids(tokenizer, image_token_index="<image>"),
    )
    _write(folder, config, processor, ["</s>"])


def llava_onevision(folder: Path) -> None:
    """LLaVA-OneVision: Qwen2 and SigLIP."""
    special = ["<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tokenizer = _byte_level(Qwen2Tokenizer, special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    pictures = LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS)
    processor = LlavaOnevisionProcessor(
        pictures, tokenizer, LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}), num_image_tokens=16,
        vision_feature_select_strategy="full", chat_template=ONEVISION,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        text_config=_text(tokenizer) | {"model_type": "qwen2"},
        vision_config=VISION | SQUARE | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        **_ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    _write(folder, config, processor, ["<|im_end|>"])


def qwen3(folder: Path) -> None:
    tokenizer = _qwen_tokenizer()
    tokenizer.chat_template = THINKING
    _write(folder, Qwen3Config(**_text(tokenizer, head_dim=8)), tokenizer, ["<|im_end|>", "<|endoftext|>"])


def llama(folder: Path) -> None:
    """Llama 3: no padding token, a start token in the template and in the tokenizer, three tokens that end."""
    special = ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    tokenizer = _with_start(special, "<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA3)
    _write(folder, LlamaConfig(**_text(tokenizer)), tokenizer, ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])


def _gpt2(folder: Path, chat_template: str | None) -> None:
    """Learned positions, and one token that starts, ends and pads."""
    tokenizer = _byte_level(GPT2Tokenizer, ["<|endoftext|>"])
    tokenizer.chat_template = chat_template
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LONGEST, "initializer_range": 0.3}
    _write(folder, GPT2Config(vocab_size=len(tokenizer), **size, **ends), tokenizer, ["<|endoftext|>"])


def gpt2(folder: Path) -> None:
    """Without a chat template."""
    _gpt2(folder, None)


def dialogpt(folder: Path) -> None:
    """GPT-2 with the template of a dialogue."""
    _gpt2(folder, DIALOGPT)


def gemma(folder: Path) -> None:
    """A sliding window in all but one layer, and a template that refuses system turns."""
    special = ["<start_of_turn>", "<end_of_turn>", "<eos>", "<pad>"]
    tokenizer = _with_start(special, "<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=GEMMA)
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "head_dim": 8}
    _write(folder, Gemma3TextConfig(**_text(tokenizer, **layers)), tokenizer, ["<eos>", "<end_of_turn>"])


FAMILIES = [
    Family("Qwen2.5-VL", qwen2_5_vl, sees=True),
    Family("Qwen3-VL", qwen3_vl, sees=True),
    Family("SmolVLM", smolvlm, sees=True),
    Family("SmolVLM 2", smolvlm2, sees=True, needs="num2words"),
    Family("LLaVA 1.5", llava, sees=True),
    Family("LLaVA-NeXT", llava_next, sees=True),
    Family("LLaVA-OneVision", llava_onevision, sees=True),
    Family("Qwen3", qwen3, sees=False),
    Family("Llama 3", llama, sees=False),
    Family("GPT-2", gpt2, sees=False),
    Family("DialoGPT", dialogpt, sees=False),
    Family("Gemma 3 (text)", gemma, sees=False, system=False),
]
