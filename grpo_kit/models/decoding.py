"""Sampling token ids on a prefix that is computed once for a whole group, in calls of even size."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from grpo_kit.config.seeds import derive_seed
from grpo_kit.grpo.logprobs import token_logprobs

NextLogits = Callable[[torch.Tensor, int], torch.Tensor]  # (ids (N,), step) → (N, V)


def row_uniforms(seeds: Sequence[int], length: int) -> torch.Tensor:
    """(N, length) uniform numbers, each row from its own seed, so that its sample does not depend on the batch."""
    own = torch.float32  # whatever the default is here: the numbers would be others
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=own) for seed in seeds]
    return torch.stack(rows)


def row_seeds(seed: int, num_prompts: int, num_generations: int, first_prompt: int = 0) -> list[int]:
    """One seed per (prompt, sample), group-major; the prompts are counted from `first_prompt`."""
    places = range(first_prompt, first_prompt + num_prompts)
    return [derive_seed(seed, "tokens", p, g) for p in places for g in range(num_generations)]


def choose_tokens(logits: torch.Tensor, uniforms: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """(N,) ids for logits (N, V): the likeliest ones without `uniforms`, else drawn from softmax(logits / temperature).

    The uniforms (N,) in [0, 1) are turned into tokens through the cumulative distribution. Logits with a NaN or plus
    infinity are no distribution. Their row gets an id without meaning, which exists, and its log-probability is NaN:
    that is how the step on the rollout sees it, and is skipped.
    """
    if uniforms is None:
        return logits.argmax(dim=-1)
    precise = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    cumulative = (logits.float() / temperature).softmax(dim=-1).cumsum(dim=-1, dtype=precise)
    threshold = uniforms.to(cumulative).unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def decode(
    first_logits: torch.Tensor,
    next_logits: NextLogits,
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
    temperature: float,
    uniforms: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample until every row has ended, or has `max_new_tokens`: (N, T) ids and their log-probabilities."""
    ends = torch.tensor(list(eos_token_ids), device=first_logits.device)
    logits, ended = first_logits, torch.zeros_like(first_logits[:, 0], dtype=torch.bool)
    columns, logprobs = [], []
    for step in range(max_new_tokens):
        ids = choose_tokens(logits, None if uniforms is None else uniforms[:, step], temperature)
        ids = torch.where(ended, pad_token_id, ids)
        columns.append(ids)
        logprobs.append(token_logprobs(logits, ids, temperature))  # here, so that no (N, T, V) logits need be kept
        ended = ended | torch.isin(ids, ends)
        if bool(ended.all()) or step + 1 == max_new_tokens:
            break
        logits = next_logits(ids, step)
    return torch.stack(columns, dim=1), torch.stack(logprobs, dim=1)


def even_batches(items: Sequence, most: int) -> Iterator[list]:
    """Consecutive parts of at most `most` items, of nearly equal size: a small last part would cost more an item."""
    calls = math.ceil(len(items) / most)
    size = math.ceil(len(items) / max(calls, 1))
    for start in range(0, len(items), max(size, 1)):
        yield list(items[start : start + size])


def stacked(parts: Sequence[torch.Tensor], fill: float) -> torch.Tensor:
    """(N, T) rows of several batches below each other, filled up on the right to the longest of them."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts])
