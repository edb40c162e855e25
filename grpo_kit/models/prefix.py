"""Prompts that are run once, and the completions that go on from them.

A prompt stands in the cache once, and all its completions are laid into one row behind it, told apart by the attention
mask: each token sees the prompt and its own completion. So nothing is repeated, and a batch has a row a prompt:

    prompt          | completion 0 | completion 1 | …       in scoring: all tokens at once
    prompt          | 0 1 2 | 0 1 2 | 0 1 2 | …             in sampling: one token of each completion at a time
"""

import copy
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicLayer

from grpo_kit.models.loading import ModelError


@dataclass(frozen=True)
class Prefix:
    """The cache of P left-padded prompts and what continuing it needs."""

    cache: object
    last_logits: torch.Tensor  # (P, V)
    mask: torch.Tensor  # (P, L) bool
    next_position: torch.Tensor  # (P,) position of the first completion token
    three_axes: bool  # multimodal rotary positions: (3, P, S)

    def room_for(self, tokens: int) -> object:
        """A copy of the cache with room for `tokens` more a row, so that appending one copies nothing; no gradients."""
        return self._with_layers([_Roomy.of(layer, tokens) for layer in self.cache.layers])

    def extend(
        self, model: torch.nn.Module, ids: torch.Tensor, steps: torch.Tensor, sees: torch.Tensor, cache: object = None
    ) -> torch.Tensor:
        """Logits of tokens that stand behind the prompts.

        Args:
            ids: (P, S).
            steps: (P, S) how far into its completion each token is, from 0.
            sees: (P, S, own) bool: which of the tokens laid behind the prompt so far, these included, each one sees.
            cache: from `room_for`; None leaves the prompts' cache as it is and carries gradients.

        Returns:
            (P, S, V).
        """
        prompt = self.mask[:, None].expand(-1, ids.shape[1], -1)
        hidden = ~torch.cat([prompt, sees], dim=2).unsqueeze(1)  # (P, 1, S, L + own)
        dtype = self.last_logits.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)
        positions = self.next_position[:, None] + steps
        return model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions.expand(3, *positions.shape) if self.three_axes else positions,
            past_key_values=self._with_layers(map(copy.copy, self.cache.layers)) if cache is None else cache,
        ).logits

    def _with_layers(self, layers: object) -> object:
        cache = copy.copy(self.cache)
        cache.layers = list(layers)
        return cache


def run_prompts(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Prefix:
    """Run left-padded prompts once and keep their cache (with its gradients, where enabled)."""
    mask = inputs["attention_mask"]
    length = mask.sum(dim=1)
    with_picture = "pixel_values" in inputs
    if not with_picture:
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": mask}
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    kinds = {type(layer) for layer in output.past_key_values.layers} - {DynamicLayer}
    if kinds:
        raise ModelError(
            f"vlm_model: found a cache of {min(kind.__name__ for kind in kinds)}, allowed: full attention in every "
            "layer, since completions share their prompt's cache; take another model"
        )
    deltas = _rope_deltas(model) if with_picture else None
    shift = 0 if deltas is None else deltas.reshape(-1).to(length.device)
    return Prefix(output.past_key_values, output.logits[:, -1], mask.bool(), length + shift, deltas is not None)


def _rope_deltas(model: torch.nn.Module) -> torch.Tensor | None:
    """How far pictures moved the text's positions, in models with multimodal rotary positions (Qwen-VL)."""
    return next((m.rope_deltas for m in model.modules() if getattr(m, "rope_deltas", None) is not None), None)


@dataclass(frozen=True)
class Packing:
    """Where each completion token stands when the completions of a prompt are laid into one row, without padding.

    A completion's last token is left out: it predicts nothing. M tokens of N completions of P prompts are laid out.
    """

    rows: torch.Tensor  # (M,) which completion
    steps: torch.Tensor  # (M,) how far into it
    place: tuple[torch.Tensor, torch.Tensor]  # (M,), (M,): prompt and slot
    shape: tuple[int, int]  # (P, S), S the most tokens behind a prompt

    @classmethod
    def of(cls, mask: torch.Tensor, group_ids: torch.Tensor, num_prompts: int) -> "Packing":
        """Lay out completions, (N, T) mask, that answer the prompts `group_ids` (N,)."""
        rows, steps = mask[:, 1:].nonzero(as_tuple=True)  # a token is laid out where there is one after it
        counts = mask[:, 1:].sum(dim=1)
        before = torch.zeros_like(counts)
        for group in range(num_prompts):
            members = group_ids == group
            before[members] = counts[members].cumsum(dim=0) - counts[members]
        slots = before[rows] + steps
        longest = int(slots.max()) + 1 if len(slots) else 1
        return cls(rows, steps, (group_ids[rows], slots), (num_prompts, longest))

    def lay_out(self, values: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """(P, S) with the tokens' (M,) values in their places."""
        return values.new_full(self.shape, fill).index_put(self.place, values)

    def take_out(self, laid: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(N, T - 1) values of the completions' later tokens, from (P, S) values at the tokens before them."""
        return laid.new_zeros(mask[:, 1:].shape).index_put((self.rows, self.steps), laid[self.place])

    def sees(self) -> torch.Tensor:
        """(P, S, S) bool: a token sees its own completion up to itself; a place without a token nothing."""
        owner, steps = self.lay_out(self.rows, fill=-1), self.lay_out(self.steps)
        own = (owner[:, :, None] == owner[:, None]) & (owner >= 0)[:, :, None]
        return own & (steps[:, :, None] >= steps[:, None])


class _Roomy(DynamicLayer):
    """A cache layer that writes new tokens into room made beforehand, where `DynamicLayer` copies all it holds."""

    @classmethod
    def of(cls, layer: DynamicLayer, room: int) -> "_Roomy":
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
