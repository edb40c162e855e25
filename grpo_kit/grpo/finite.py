"""Numbers that are not finite: how a step finds them without looking for them, and where they came up first.

A NaN or an infinity in what the loss is made of makes the loss NaN (`nan_unless_finite`), backward hands that to every
gradient, and the gradients' norm, which clipping needs anyway, shows it: one number that is read, whatever went wrong.
Only a step that is skipped asks further.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NonFinite:
    """The first part of a step, in the order of computing, that had a NaN or an infinity."""

    part: str  # weights, sampling, pictures, rewards, reference, scoring, loss, gradient, optimizer
    detail: str  # what exactly, as a part of a sentence


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be spread over processes (all of which have to ask)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The part that this process holds of a tensor that may be spread over processes."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def nan_unless_finite(*numbers: torch.Tensor | None) -> torch.Tensor | float:
    """A factor for the loss: exactly 1, or NaN where any of the numbers is not finite; nothing is read from a device.

    Without it a log-probability of minus infinity would pass: the loss bounds its ratios.
    """
    return 1 + sum((tensor.detach() * 0).sum() for tensor in numbers if tensor is not None)


def named_not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of those tensors that have a NaN or an infinity (of weights in 8 bits, in their scales), in order."""
    return [name for name, tensor in tensors.items() if not getattr(tensor, "scale", tensor).isfinite().all()]


def rows_not_finite(numbers: torch.Tensor | None) -> int:
    """In how many rows of (N, T) a number is not finite."""
    return 0 if numbers is None else int((~numbers.isfinite()).any(dim=1).sum())


def step_or_restore(optimizer: torch.optim.Optimizer, agreed: Callable[[bool], bool] = bool) -> bool:
    """Run the optimizer; where its result is not finite, put weights and momentum back, bit for bit, and return False.

    The copies that this takes live while a step needs least memory: its activations are gone.

    Args:
        agreed: whether the result is finite everywhere, from whether it is here: processes may hold parts of it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in parameters]
    state = {parameter: _copied(values) for parameter, values in optimizer.state.items()}
    optimizer.step()
    moments = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    # one number is read from the device: a tenth of the time that `isfinite` on each takes
    if agreed(math.isfinite(nan_unless_finite(*map(local_tensor, [*parameters, *moments])))):
        return True
    with torch.no_grad():
        for parameter, kept in zip(parameters, before, strict=True):
            parameter.copy_(kept)
    optimizer.state.clear()
    optimizer.state.update(state)
    return False


def _copied(values: Mapping[str, object]) -> dict[str, object]:
    return {name: value.clone() if torch.is_tensor(value) else value for name, value in values.items()}


def non_finite_gradient(parameters: Mapping[str, torch.nn.Parameter], norm: float) -> NonFinite:
    """Which gradient is not finite: of several the one next to the output, where backward began; or only their norm."""
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if bad := named_not_finite(gradients):
        return NonFinite("gradient", f"the gradient of {bad[-1]} ({len(bad)} of {len(gradients)} gradients)")
    largest = max(gradients, key=lambda name: float(gradients[name].abs().max()))
    return NonFinite("gradient", f"the gradients' norm ({norm}); the largest is that of {largest}")


def non_finite_loss(
    sampled: torch.Tensor | None, reference: torch.Tensor | None, scored: torch.Tensor, loss: float
) -> NonFinite | None:
    """Which number on the way to the loss is not finite, if any.

    Args:
        sampled, reference, scored: (N, T) log-probabilities: the sampler's record, the reference's, the policy's.
    """
    for part, numbers in (("sampling", sampled), ("reference", reference), ("scoring", scored)):
        if rows := rows_not_finite(numbers):
            return NonFinite(part, f"log-probabilities in {part} ({rows} of {len(numbers)} completions)")
    return None if math.isfinite(loss) else NonFinite("loss", f"the loss ({loss})")


def non_finite_weight(parameters: Mapping[str, torch.Tensor]) -> NonFinite | None:
    """Which of a policy's weights is not finite, if any."""
    bad = named_not_finite(parameters)
    return NonFinite("weights", f"the policy's weights: {bad[0]} ({len(bad)} of {len(parameters)})") if bad else None
