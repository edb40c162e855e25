"""A run's three parts, policy, generator and reward: what lies in memory all the time, and what each phase adds."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from grpo_kit.preflight.plan.tracing import Cost


@dataclass(frozen=True)
class Piece:
    """A model that is loaded whole."""

    name: str
    parameters: int
    weights: int  # bytes, buffers that are saved among them

    @classmethod
    def of(cls, name: str, model: torch.nn.Module, in_8_bits: Iterable[torch.nn.Linear] = ()) -> "Piece":
        """The piece that a model is, with the weights of some layers in 8 bits and a scale for each of their rows."""
        saved = model.state_dict(keep_vars=True)
        tensors = {id(tensor): tensor for tensor in saved.values()}.values()  # a tied one is there once
        weights = [layer.weight for layer in in_8_bits]
        spared = sum(weight.numel() * (weight.element_size() - 1) - weight[:, :1].nbytes for weight in weights)
        return cls(name, count_parameters(model), total_bytes(tensors) - spared)


@dataclass(frozen=True)
class Phase:
    """Something that a part does in every iteration."""

    name: str
    cost: Cost
    turned_down_by: str  # the setting that its memory goes with


@dataclass(frozen=True)
class Part:
    """One of the three.

    Args:
        source: where its shape was read.
        held: bytes that stay in memory besides the weights, by what they are.
        notes: what the plan had to suppose.
        pictures: bytes of the rollout's pictures, which lie in the host's memory.
    """

    name: str
    source: str
    pieces: tuple[Piece, ...]
    phases: tuple[Phase, ...]
    held: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pictures: int = 0

    @property
    def parameters(self) -> int:
        """How many weights its models have; a reference that is a copy is not counted again."""
        return sum(piece.parameters for piece in self.pieces)

    @property
    def weights(self) -> int:
        """Bytes of its models' weights."""
        return sum(piece.weights for piece in self.pieces)

    @property
    def resident(self) -> int:
        """Bytes that it holds all the time."""
        return self.weights + sum(self.held.values())

    @property
    def working(self) -> int:
        """The most bytes that one of its phases adds."""
        return max((phase.cost.peak for phase in self.phases), default=0)


def count_parameters(model: torch.nn.Module) -> int:
    """How many weights a model has; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def linear_layers(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """What transformers keeps in 8 bits where it is asked to: linear layers, but for the head."""
    head = model.get_output_embeddings()
    return [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]


def total_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What some tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def tensors_of(*models: torch.nn.Module | None) -> list[torch.Tensor]:
    """The parameters and buffers of some models."""
    there = [model for model in models if model is not None]
    return [tensor for model in there for tensor in (*model.parameters(), *model.buffers())]
