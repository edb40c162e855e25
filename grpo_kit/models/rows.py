"""Every completion in a row of its own, behind its own copy of the prompt: the plain way that any causal model takes.

It is the way of models that cannot share a prompt (`shared_prefix.reason_not_to_share`), and of scoring with gradient
checkpointing: recomputing a layer needs its whole input, and a cache would be filled a second time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_kit.config.hub import ModelError
from grpo_kit.models.decoding import NextLogits
from grpo_kit.models.shared_prefix import Prefix, last_logits_only, placed


def continued_rows(model: torch.nn.Module, prefix: Prefix, num_generations: int) -> NextLogits:
    """Logits of the next token of G rows for each of P prompts, from caches of their own; the prefix's is used up."""
    places = torch.arange(len(prefix.mask), device=prefix.mask.device).repeat_interleave(num_generations)
    prefix.cache.reorder_cache(places)  # beam search has made every kind of cache take it
    mask, start = prefix.mask[places].long(), prefix.next_position[places]

    def next_logits(ids: torch.Tensor, step: int) -> torch.Tensor:
        seen = torch.cat([mask, mask.new_ones(len(mask), step + 1)], dim=1)
        positions = prefix.on_axes((start + step)[:, None])
        return model(
            input_ids=ids[:, None], attention_mask=seen, position_ids=positions, past_key_values=prefix.cache
        ).logits[:, -1]

    return next_logits


def row_logits(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], completion_ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Logits (N, T, V) that each token of the completions (N, T) was drawn from, in one pass without a cache.

    `inputs` are N left-padded prompts, one for each completion.
    """
    prompt, length = inputs["input_ids"], completion_ids.shape[1]
    # what a policy writes is text, should it write the very token that pictures stand for: the model may not look for
    # one there. It is shown the prompt's last token instead, and embeds what was written
    shown = prompt[:, -1:].expand_as(completion_ids) if "pixel_values" in inputs else completion_ids
    behind = {"input_ids": shown, "attention_mask": mask}
    whole = {
        name: torch.cat([value, behind.get(name, torch.zeros_like(shown)).to(value)], dim=1)
        if value.shape == prompt.shape  # one value a token; what else there is belongs to pictures
        else value
        for name, value in inputs.items()
    }
    written = torch.cat([prompt, completion_ids], dim=1)

    def as_written(module: torch.nn.Module, given: tuple[torch.Tensor, ...], found: torch.Tensor) -> torch.Tensor:
        return module.forward(written) if given[0].shape == written.shape else found

    with model.get_input_embeddings().register_forward_hook(as_written):
        logits = model(**placed(model, whole), use_cache=False, **last_logits_only(model, length + 1)).logits
    return logits[:, -length - 1 : -1]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off, so that two scorings of the same ids agree; afterwards the mode is as it was."""
    was_training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(was_training)


def recomputable_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Layers, of text and of pictures, whose activations may be computed again; `ModelError` where there are none."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            "model_settings.gradient_checkpointing: found true, but this model has no layers to recompute; set false"
        )
    return layers


@contextmanager
def recomputing(model: torch.nn.Module) -> Iterator[None]:
    """Layers keep only their input and compute the rest again in the backward pass (arXiv 1604.06174).

    The backward pass comes when the model may be in training mode again. A layer is therefore put into evaluation mode
    each time it runs: else dropout would be off in the forward pass and on in its repetition, and the gradient wrong.
    """
    layers = recomputable_layers(model)
    for layer in layers:
        forward = evaluating(layer)(layer.forward)
        layer.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # what the class says stands again
