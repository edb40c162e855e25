"""A small text-only policy, built from a configuration, whose prompts and completions have exact lengths.

Every word is one token, so a prompt of n words has n tokens. The tokenizer's end of sequence lies one past the model's
vocabulary: the model cannot sample it, so every completion runs to the limit, at no cost to either side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from grpo_kit.models.policy import Policy

VOCABULARY = 4096
SIZE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


@dataclass(frozen=True)
class Shape:
    """How much work an iteration is."""

    prompts: int = 4
    group: int = 8
    prompt_tokens: int = 96
    completion_tokens: int = 32

    def __str__(self) -> str:
        return f"{self.prompts} prompts × {self.group}, {self.prompt_tokens} + {self.completion_tokens} tokens"


def build(folder: Path, vocabulary: int = VOCABULARY, **size: int) -> Path:
    """Write model and tokenizer, the same weights each time; returns the folder.

    `size` is settings of the model's configuration that differ from `SIZE` and `HEADS`.
    """
    tokenizer = word_tokenizer(vocabulary)
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": None}
    settings = SIZE | HEADS | ids | size
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=vocabulary, tie_word_embeddings=True, initializer_range=0.05, **settings)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word: `w1`, `w2`, …; the token that ends a text is one past the vocabulary."""
    words = {"<pad>": 0} | {f"w{i}": i for i in range(1, vocabulary)} | {"<end>": vocabulary}
    raw = Tokenizer(models.WordLevel(words, unk_token="w1"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")


def load_policy(folder: Path, shape: Shape, reference: bool) -> Policy:
    """The kit's policy on the weights of a folder, with a frozen reference where the KL term needs one."""
    model, frozen = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    return Policy(
        model,
        PreTrainedTokenizerFast.from_pretrained(folder),
        instruction="{prompt}",
        temperature=1.0,
        max_new_tokens=shape.completion_tokens,
        reference=frozen.eval().requires_grad_(False) if reference else None,
    )


def prompts(shape: Shape, seed: int = 0) -> list[str]:
    """Prompts of exactly `shape.prompt_tokens` tokens each."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (shape.prompts, shape.prompt_tokens), generator=source)
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


def share_of_even_words(texts: Sequence[str]) -> list[float]:
    """A reward that costs next to nothing: the share of a text's words that end in an even digit."""
    words = [text.split() for text in texts]
    return [sum(word[-1] in "02468" for word in row) / max(len(row), 1) for row in words]
