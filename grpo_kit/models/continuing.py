"""A group's next tokens behind its prompt, one of each completion at a time.

`plain`: the cache shows what it holds so far, so a step costs what it must and has its own shape.
`static`: transformers' static cache; all the room is there, and attended to, from the start, so that every step has the
same shapes. That alone saves nothing; it is what a compiled step needs.
`compiled`: the same, and the step is compiled by torch.compile (backend inductor, mode default). Sizes are symbolic from
the start: which kernels are used then does not depend on what was sampled before, so a resumed run samples the same.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Literal

import torch
from transformers.cache_utils import Cache, StaticCache

from grpo_kit.models.decoding import NextLogits
from grpo_kit.models.loading import ModelError
from grpo_kit.models.prefix import Prefix

Decoding = Literal["plain", "static", "compiled"]
_SETTING = "generation_settings.decoding"
_VARIANTS = 64  # compiled steps kept: of policy and reference, with an adapter and without, of one row and of several


def continued_groups(
    model: torch.nn.Module, prefix: Prefix, num_generations: int, max_new_tokens: int, decoding: Decoding = "plain"
) -> NextLogits:
    """Logits of the next token of G completions behind each of P prompts; each sees its prompt and itself."""
    P, G = len(prefix.mask), num_generations
    room = G * max_new_tokens
    held = prefix.room_for(room) if decoding == "plain" else _static(model, prefix, room)
    run = partial(_compiled_step(), model) if decoding == "compiled" else model
    device = prefix.mask.device
    places = torch.arange(room, device=device)
    own = places % G == torch.arange(G, device=device)[:, None]  # a completion's tokens stand G places apart

    def next_logits(ids: torch.Tensor, step: int) -> torch.Tensor:
        taken = (step + 1) * G
        sees = own[:, :taken] if decoding == "plain" else own & (places < taken)
        steps = torch.full((P, G), step, device=device)
        return prefix.extend(run, ids.reshape(P, G), steps, sees.expand(P, -1, -1), held).flatten(0, 1)

    return _explained(next_logits) if decoding == "compiled" else next_logits


def require_decoding(decoding: Decoding, not_shared: str | None) -> None:
    """Raise where completions do not share their prompt, which is the only way that fixed shapes are laid out in."""
    if decoding != "plain" and not_shared:
        raise ModelError(
            f"{_SETTING}: found {decoding!r}, but this policy's completions cannot share a prompt: {not_shared}; "
            "set 'plain'"
        )


def _static(model: torch.nn.Module, prefix: Prefix, room: int) -> Cache:
    """The prompts' keys and values in a static cache with room for so many tokens more a row."""
    static = StaticCache(config=model.config, max_cache_len=prefix.mask.shape[1] + room)
    for number, layer in enumerate(prefix.cache.layers):
        static.update(layer.keys, layer.values, number)
    return static


def _step(model: torch.nn.Module, **inputs: object) -> object:
    return model(**inputs)


@cache
def _compiled_step() -> Callable:
    """One for all models: torch keeps a compiled version for each of them."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    return torch.compile(_step, fullgraph=True, dynamic=True)


def _explained(next_logits: NextLogits) -> NextLogits:
    """The same, with one line where the step does not compile."""
    from torch._dynamo.exc import TorchDynamoException

    def compiling(ids: torch.Tensor, step: int) -> torch.Tensor:
        try:
            return next_logits(ids, step)
        except TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ModelError(
                f"{_SETTING}: found 'compiled', but torch.compile fails on this model or machine "
                f"({type(error).__name__}: {reason.strip()[:200]}); set 'plain'"
            ) from error

    return compiling
