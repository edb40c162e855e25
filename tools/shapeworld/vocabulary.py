"""The embedded models' tokenizers: each library class trained on the world's own captions."""

import json
import random
import re
from collections.abc import Sequence
from functools import cache
from string import ascii_lowercase

from transformers import CLIPTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer, T5Tokenizer

from grpo_kit.shapeworld.captions import IDLE_WORDS, STYLE_WORDS, describe
from grpo_kit.shapeworld.scene import random_scenes
from tools.shapeworld.captions import generator_caption

QWEN_SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
INSTRUCTIONS = ("Improve: a cat", "system\n", "user\n", "assistant\n") * 200
TEXT_LENGTH = 24  # tokens; the longest caption of the grammar has 17


@cache
def corpus() -> list[str]:
    """Captions of both dialects, every style word and idle word among them."""
    rng = random.Random(0)
    scenes = random_scenes(6000, seed=0)
    texts = [describe(scene, rng.choice(("user", "generator")), rng) for scene in scenes]
    texts += [generator_caption(scene, rng) for scene in scenes]
    return texts + [word for words in (*STYLE_WORDS.values(), IDLE_WORDS) for word in words for _ in range(50)]


def clip_tokenizer(texts: Sequence[str] | None = None) -> PreTrainedTokenizerBase:
    """For the generator's CLIP text encoders and the reward model; trained on `texts`, or the world's corpus.

    The end-of-text token gets the highest id, because open_clip finds a text's end as its highest id.
    """
    trained = CLIPTokenizer().train_new_from_iterator(texts or corpus(), vocab_size=720)
    special = ("<|startoftext|>", "<|endoftext|>")
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    merged = list(dict.fromkeys("".join(merge) for merge in merges))
    letters = sorted(set(model["vocab"]) - set(merged) - set(special))  # the trainer numbers them anew each time
    vocabulary = {piece: i for i, piece in enumerate([*letters, *merged, *special])}
    return CLIPTokenizer(vocabulary, merges, model_max_length=TEXT_LENGTH)


def t5_tokenizer() -> PreTrainedTokenizerBase:
    """For the generator's third text encoder; trained on the world's corpus."""
    trained = T5Tokenizer().train_new_from_iterator(corpus(), vocab_size=320)
    trained.model_max_length = 256
    return trained


def word_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """A T5 tokenizer with every word of `texts` as one token, and letters for all others.

    Training one counts each word once, finds few that repeat in others, and so spells most of them out.
    """
    words = sorted(set(re.findall("[a-z]+", " ".join(texts))))
    scores = dict.fromkeys(["▁", ",", *ascii_lowercase], -8.0) | {f"▁{word}": -4.0 for word in words}
    special = dict.fromkeys(["<pad>", "</s>", "<unk>"], 0.0)
    return T5Tokenizer([*special.items(), *scores.items()], extra_ids=0, model_max_length=TEXT_LENGTH)


def qwen_tokenizer(texts: Sequence[str] | None = None) -> PreTrainedTokenizerBase:
    """For the policy: Qwen's byte-level BPE with the special tokens of chat, images and video; trained as those."""
    trained = Qwen2Tokenizer().train_new_from_iterator([*(texts or corpus()), *INSTRUCTIONS], vocab_size=700)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIAL)})
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer
