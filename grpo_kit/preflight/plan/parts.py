"""What a plan is made of: a run's three parts on a device, what each holds and does, and whether they fit."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from grpo_kit.preflight.plan.speed import Speed
from grpo_kit.preflight.plan.tracing import Cost

USABLE = 0.9  # of a device's memory: what is freed comes back in pieces that do not fill it again


@dataclass(frozen=True)
class Piece:
    """A model that is loaded whole."""

    name: str
    parameters: int
    weights: int  # bytes, buffers that are saved among them

    @classmethod
    def of(cls, name: str, model: torch.nn.Module, in_8_bits: Iterable[torch.nn.Linear] = ()) -> "Piece":
        """The piece that a model is, with the weights of some layers in 8 bits and a scale for each of their rows."""
        tensors = set(model.state_dict(keep_vars=True).values())  # a tied one once
        weights = [layer.weight for layer in in_8_bits]
        spared = sum(weight.numel() * (weight.element_size() - 1) - weight[:, :1].nbytes for weight in weights)
        return cls(name, count_parameters(model), sum(tensor.nbytes for tensor in tensors) - spared)


@dataclass(frozen=True)
class Phase:
    """Something that a part does in every iteration."""

    name: str
    cost: Cost
    turned_down_by: str  # the setting that its memory goes with


@dataclass(frozen=True)
class Part:
    """Policy, generator or reward."""

    name: str
    source: str  # where its shape was read
    pieces: tuple[Piece, ...]
    phases: tuple[Phase, ...]
    held: dict[str, int] = field(default_factory=dict)  # bytes that stay in memory besides the weights
    notes: tuple[str, ...] = ()  # what the plan had to suppose
    pictures: int = 0  # bytes of the rollout's, which lie in the host's memory

    @property
    def parameters(self) -> int:
        """How many weights its models have; a reference that is a copy is not counted again."""
        return sum(piece.parameters for piece in self.pieces)

    @property
    def resident(self) -> int:
        """Bytes that it holds all the time."""
        return sum(piece.weights for piece in self.pieces) + sum(self.held.values())

    @property
    def working(self) -> int:
        """The most bytes that one of its phases adds."""
        return max((phase.cost.peak for phase in self.phases), default=0)


@dataclass(frozen=True)
class Placement:
    """A way to place the parts: the most memory that one device needs then, and whether it is there."""

    name: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What an iteration of training needs."""

    parts: tuple[Part, ...]  # policy, generator, reward
    speed: Speed
    iterations: int

    @property
    def room(self) -> float:
        """Bytes that tensors may take."""
        return USABLE * (self.speed.memory - self.speed.taken)

    @property
    def resident(self) -> int:
        """Bytes that lie in memory in every phase, with all parts together on the device."""
        return sum(map(self._resident, self.parts))

    @property
    def peak(self) -> int:
        """The most bytes held at once, all parts together on the device. Phases come one after the other."""
        return self.resident + max(part.working for part in self.parts)

    @property
    def fits(self) -> bool:
        """Whether all parts fit together."""
        return self.peak <= self.room

    @property
    def largest(self) -> tuple[Part, Phase]:
        """The phase that sets the peak, and whose it is."""
        return max(((part, p) for part in self.parts for p in part.phases), key=lambda found: found[1].cost.peak)

    @property
    def seconds(self) -> float:
        """Of one iteration."""
        return sum(map(self.part_seconds, self.parts))

    def part_seconds(self, part: Part) -> float:
        """Of one part in one iteration."""
        return sum(self.speed.seconds(phase.cost) for phase in part.phases)

    @property
    def minutes(self) -> float:
        """Of the whole training, without validations and start."""
        return self.seconds * self.iterations / 60

    @property
    def placements(self) -> tuple[Placement, ...]:
        """The ways to place the parts, the quickest first."""
        alone = [self._resident(part) + part.working for part in self.parts]
        others = replace(self, parts=self.parts[1:]).peak
        peaks = {
            "together on one device": self.peak,
            "policy on one device, generator and reward on another": max(alone[0], others),
            "offloaded in turn: each part on the device while it works": max(alone),
            "a device for each part": max(alone),
        }
        return tuple(Placement(name, peak, peak <= self.room) for name, peak in peaks.items())

    def _resident(self, part: Part) -> int:
        """Bytes that a part holds on this device all the time."""
        return part.resident + (part.pictures if self.speed.shares_host else 0)


def count_parameters(model: torch.nn.Module) -> int:
    """How many weights a model has; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def linear_layers(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """What transformers keeps in 8 bits where it is asked to: linear layers, but for the head."""
    head = model.get_output_embeddings()
    return [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]


def tensors_of(*parts: object) -> list[torch.Tensor]:
    """The parameters and buffers of the models among them."""
    models = [part for part in parts if isinstance(part, torch.nn.Module)]
    return [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
