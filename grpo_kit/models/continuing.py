"""A group's next tokens behind its prompt, one of each completion at a time.

`plain`: the cache shows what it holds so far, so every step has a shape of its own.
`static`: transformers' static cache. All room is there and attended to from the start, so that all steps have the same
shapes. That alone saves nothing; it is what a compiled step needs.
`compiled`: the same, with the step compiled by torch.compile (backend inductor, mode default). Sizes are symbolic from
the start: one version serves all batches of several prompts and samples, whatever was sampled before, so that a resumed
run computes with the same one.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from transformers.cache_utils import Cache, StaticCache

from grpo_kit.config.hub import ModelError
from grpo_kit.models.decoding import NextLogits
from grpo_kit.models.prefix import Prefix

Decoding = Literal["plain", "static", "compiled"]
_SETTING = "generation_settings.decoding"
_VERSIONS = 64  # compiled ones kept: for policy and reference, with an adapter and without, four kinds of size each


def continued_groups(
    model: torch.nn.Module, prefix: Prefix, num_generations: int, max_new_tokens: int, decoding: Decoding = "plain"
) -> NextLogits:
    """Logits of the next token of G completions behind each of P prompts; each sees its prompt and itself."""
    P, G = len(prefix.mask), num_generations
    room = G * max_new_tokens
    held = prefix.room_for(room) if decoding == "plain" else _static(model, prefix, room)
    run = _compiled(model) if decoding == "compiled" else model
    device = prefix.mask.device
    places = torch.arange(room, device=device)
    own = places % G == torch.arange(G, device=device)[:, None]  # a completion's tokens stand G places apart

    def next_logits(ids: torch.Tensor, step: int) -> torch.Tensor:
        taken = (step + 1) * G
        sees = own[:, :taken] if decoding == "plain" else _seen(own, places, taken)
        steps = torch.full((P, G), step, device=device)
        return prefix.extend(run, ids.reshape(P, G), steps, sees.expand(P, -1, -1), held).flatten(0, 1)

    return next_logits


def require_decoding(decoding: Decoding, not_shared: str | None) -> None:
    """Raise where completions do not share their prompt, which is the only way that fixed shapes are laid out in."""
    if decoding != "plain" and not_shared:
        raise ModelError(
            f"{_SETTING}: found {decoding!r}, but this policy's completions cannot share a prompt: {not_shared}; "
            "set 'plain'"
        )


def _seen(own: torch.Tensor, places: torch.Tensor, taken: int) -> torch.Tensor:
    """(G, room) bool: a completion's own places that hold a token already."""
    return own & (places < taken)


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
    return torch.compile(_step, fullgraph=True, dynamic=True)


def _compiled(model: torch.nn.Module) -> Callable:
    """The model as a function whose calls are compiled; one line where that fails."""
    from torch._dynamo import config
    from torch._dynamo.exc import TorchDynamoException
    from torch.fx.experimental import _config as shapes

    def run(**inputs: object) -> object:
        # without the second setting as many prompts as samples would be a version of its own
        with config.patch(recompile_limit=_VERSIONS), shapes.patch(use_duck_shape=False):
            try:
                return _compiled_step()(model, **inputs)
            except TorchDynamoException as error:
                reason = " ".join(str(error).split())[:200]
                raise ModelError(
                    f"{_SETTING}: found 'compiled', but torch.compile fails on this model or machine "
                    f"({type(error).__name__}: {reason}); set 'plain'"
                ) from error

    return run
