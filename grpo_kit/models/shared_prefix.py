"""A shared prefix: prompts that are run once, and the completions that go on from them.

A prompt stands in the cache once, and its completions are laid behind it, told apart by the attention mask: each token
sees the prompt and its own completion.

    prompt          | 0 1 2 | 0 1 2 | 0 1 2 | …             in sampling: one token of each completion at a time
    prompt          | completion 0 | completion 1 | …       in scoring: all tokens at once

In scoring attention pays for all pairs of tokens in a row, so the completions may share several rows, *lanes*, each
behind the prompt. Models that cannot be continued like this say why (`reason_not_to_share`) and take `models.rows`.

Sampling has three ways (`Decoding`). `plain`: the cache shows what it holds so far, so every step has another shape.
`static`: transformers' static cache, attended to as a whole from the start, so that all steps have the same shapes,
which a compiled step needs. `compiled`: the same with torch.compile. Sizes are symbolic from the start: one version
serves all batches of several prompts and samples, so that a resumed run computes with the same one.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from grpo_kit.config import one_line
from grpo_kit.config.hub import ModelError
from grpo_kit.models.decoding import NextLogits

Decoding = Literal["plain", "static", "compiled"]
_SETTING = "generation_settings.decoding"
_VERSIONS = 64  # compiled ones kept: for policy and reference, with an adapter and without, four kinds of size each
_TAKE_MASKS_OF_PAIRS = ("sdpa", "eager")  # attention that takes any (query, key) mask; flash attention takes none


@dataclass(frozen=True)
class Prefix:
    """The cache of P left-padded prompts and what continuing it needs."""

    cache: object
    last_logits: torch.Tensor  # (P, V)
    mask: torch.Tensor  # (P, L) bool
    next_position: torch.Tensor  # (P,) position of the first completion token
    three_axes: bool  # multimodal rotary positions: (3, P, S)

    def in_lanes(self, lanes: int) -> "Prefix":
        """Every prompt that many times in a row, where its gradients meet."""
        cache = self._with_layers(map(copy.copy, self.cache.layers))
        cache.batch_repeat_interleave(lanes)
        mask, position = (values.repeat_interleave(lanes, dim=0) for values in (self.mask, self.next_position))
        return replace(self, cache=cache, mask=mask, next_position=position)

    def room_for(self, tokens: int) -> object:
        """A copy of the cache with room for `tokens` more a row, so that appending one copies nothing; no gradients."""
        return self._with_layers([PreallocatedLayer.of(layer, tokens) for layer in self.cache.layers])

    def extend(
        self, model: torch.nn.Module, ids: torch.Tensor, steps: torch.Tensor, sees: torch.Tensor, cache: object = None
    ) -> torch.Tensor:
        """Logits (P, S, V) of tokens that stand behind the prompts.

        Args:
            ids: (P, S).
            steps: (P, S) how far into its completion each token is, from 0.
            sees: (P, S, own) bool: which of the tokens laid behind the prompt so far, these included, each one sees.
            cache: from `room_for`; None leaves the prompts' cache as it is and carries gradients.
        """
        prompt = self.mask[:, None].expand(-1, ids.shape[1], -1)
        hidden = ~torch.cat([prompt, sees], dim=2).unsqueeze(1)  # (P, 1, S, L + own)
        dtype = self.cache.layers[0].keys.dtype  # attention's own: some models give logits in float32 whatever they are
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)
        positions = self.next_position[:, None] + steps
        return model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=self.on_axes(positions),
            past_key_values=self._with_layers(map(copy.copy, self.cache.layers)) if cache is None else cache,
        ).logits

    def on_axes(self, positions: torch.Tensor) -> torch.Tensor:
        """(P, S) positions of text as the model takes them: (3, P, S) where pictures have time, height and width."""
        return positions.expand(3, *positions.shape) if self.three_axes else positions

    def _with_layers(self, layers: object) -> object:
        cache = copy.copy(self.cache)
        cache.layers = list(layers)
        return cache


def run_prompts(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Prefix:
    """Run left-padded prompts once and keep their cache (with its gradients, where enabled)."""
    mask = inputs["attention_mask"]
    output = model(**placed(model, inputs), use_cache=True, **last_logits_only(model, 1))
    if getattr(output, "past_key_values", None) is None:
        raise ModelError(f"vlm_model: found {type(model).__name__}, which gives no cache to go on from; take another")
    deltas = None
    if "pixel_values" in inputs:  # models with multimodal rotary positions (Qwen-VL): pictures moved the text's
        deltas = next((m.rope_deltas for m in model.modules() if getattr(m, "rope_deltas", None) is not None), None)
    shift = 0 if deltas is None else deltas.reshape(-1).to(mask.device)
    position = mask.sum(dim=1) + shift
    return Prefix(output.past_key_values, output.logits[:, -1], mask.bool(), position, deltas is not None)


def placed(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's inputs with each token's position counted from its row's first token, wherever the padding stands."""
    with_picture = "pixel_values" in inputs
    if with_picture and any(hasattr(module, "get_rope_index") for module in model.modules()):
        return inputs  # the model counts by itself: pictures have positions of their own (Qwen-VL)
    named = inputs if with_picture else {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return {**named, "position_ids": (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)}


def learned_positions(model: torch.nn.Module) -> int | None:
    """How many positions a model has an embedding for; None where it computes them (rotary), at any length."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return None
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens]
    decoder = {id(module) for module in model.get_decoder().modules()}
    return longest if any(id(table) in decoder and table.num_embeddings >= longest for table in tables) else None


def last_logits_only(model: torch.nn.Module, tokens: int) -> dict[str, int]:
    """The option that keeps a model from computing logits of more than the last tokens, where it has one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes = "logits_to_keep" in inspect.signature(base.forward).parameters
    return {"logits_to_keep": tokens} if takes else {}


def reason_not_to_share(model: torch.nn.Module) -> str | None:
    """Why completions cannot stand behind one prompt in a model's cache; None where they can."""
    attention = model.config.get_text_config()._attn_implementation
    if attention not in _TAKE_MASKS_OF_PAIRS:
        return f"its attention ({attention}) takes no mask of pairs; sdpa and eager do"
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {DynamicLayer.__name__}
    if kinds:
        return f"some of its layers keep less than the whole past ({', '.join(sorted(kinds))})"
    return None


@dataclass(frozen=True)
class Packing:
    """Where each completion token stands when completions are laid behind their prompts, without padding between them.

    A completion's last token is left out: it predicts nothing. M tokens of N completions are laid out in R rows, which
    are P prompts in so many lanes each.
    """

    rows: torch.Tensor  # (M,) which completion
    steps: torch.Tensor  # (M,) how far into it
    place: tuple[torch.Tensor, torch.Tensor]  # (M,), (M,): row and slot
    shape: tuple[int, int]  # (R, S), S the most tokens in a row

    @classmethod
    def of(cls, mask: torch.Tensor, group_ids: torch.Tensor, num_prompts: int, lanes: int = 1) -> "Packing":
        """Lay out completions, (N, T) mask, that answer the prompts `group_ids` (N,), in turn into a prompt's lanes."""
        rows, steps = mask[:, 1:].nonzero(as_tuple=True)  # a token is laid out where there is one after it
        counts = mask[:, 1:].sum(dim=1)
        lane, before = torch.zeros_like(counts), torch.zeros_like(counts)
        for group in range(num_prompts):
            members = (group_ids == group).nonzero().flatten()
            for number in range(lanes):
                own = members[number::lanes]
                lane[own] = group * lanes + number
                before[own] = counts[own].cumsum(dim=0) - counts[own]
        slots = before[rows] + steps
        longest = int(slots.max()) + 1 if len(slots) else 1
        return cls(rows, steps, (lane[rows], slots), (num_prompts * lanes, longest))

    def lay_out(self, values: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """(R, S) with the tokens' (M,) values in their places."""
        return values.new_full(self.shape, fill).index_put(self.place, values)

    def take_out(self, laid: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(N, T - 1) values of the completions' later tokens, from (R, S) values at the tokens before them."""
        return laid.new_zeros(mask[:, 1:].shape).index_put((self.rows, self.steps), laid[self.place])

    def sees(self) -> torch.Tensor:
        """(R, S, S) bool: a token sees its own completion up to itself; a place without a token nothing."""
        owner, steps = self.lay_out(self.rows, fill=-1), self.lay_out(self.steps)
        own = (owner[:, :, None] == owner[:, None]) & (owner >= 0)[:, :, None]
        return own & (steps[:, :, None] >= steps[:, None])


class PreallocatedLayer(DynamicLayer):
    """A cache layer that writes new tokens into room made beforehand, where `DynamicLayer` copies all it holds."""

    @classmethod
    def of(cls, layer: DynamicLayer, room: int) -> "PreallocatedLayer":
        """A layer with the same keys and values and room for `room` more tokens."""
        roomy = cls()
        roomy.lazy_initialization(layer.keys, layer.values)
        roomy._rooms = [torch.nn.functional.pad(held, (0, 0, 0, room)) for held in (layer.keys, layer.values)]
        roomy._show(layer.keys.shape[-2])
        return roomy

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **options: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (P, heads, new, size) keys and values; returns all held so far."""
        start = self.get_seq_length()
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start : start + states.shape[-2]] = states
        self._show(start + key_states.shape[-2])
        return self.keys, self.values

    def _show(self, length: int) -> None:
        self.keys, self.values = (room[:, :, :length] for room in self._rooms)


# --- sampling ---------------------------------------------------------------------------------------------------------


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
    """(G, room) bool: a completion's own places that hold a token; a static cache is attended to as a whole."""
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
                raise ModelError(
                    f"{_SETTING}: found 'compiled', but torch.compile fails on this model or machine "
                    f"({type(error).__name__}: {one_line(error)}); set 'plain'"
                ) from error

    return run
