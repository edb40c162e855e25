"""The plan: the three parts on a device, whether they fit, and where each should live."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from grpo_kit.config import Config
from grpo_kit.preflight.plan.generator import plan_generator
from grpo_kit.preflight.plan.parts import Part, Phase
from grpo_kit.preflight.plan.policy import plan_policy
from grpo_kit.preflight.plan.reward import plan_reward
from grpo_kit.preflight.plan.speed import Speed, speed_of

USABLE = 0.9  # of a device's memory: what is freed comes back in pieces that do not fill it again


@dataclass(frozen=True)
class Home:
    """A way to place the parts: the most memory that one device needs then, and whether it is there."""

    name: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What an iteration of training needs."""

    parts: tuple[Part, ...]
    speed: Speed
    iterations: int

    @property
    def room(self) -> float:
        """Bytes that tensors may take."""
        return USABLE * (self.speed.memory - self.speed.taken)

    @property
    def resident(self) -> int:
        """Bytes that lie in memory in every phase, with all parts together on the device."""
        return sum(part.resident + self._pictures(part) for part in self.parts)

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
        phases = ((part, phase) for part in self.parts for phase in part.phases)
        return max(phases, key=lambda found: found[1].cost.peak)

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
    def homes(self) -> tuple[Home, ...]:
        """The ways to place the parts, the quickest first."""
        apart = {part.name: part.resident + self._pictures(part) + part.working for part in self.parts}
        drawing = self.resident - self._part("policy").resident
        drawing += max(self._part(name).working for name in ("generator", "reward"))
        ways = {
            "together on one device": self.peak,
            "policy on one device, generator and reward on another": max(apart["policy"], drawing),
            "offloaded in turn: each part on the device while it works": max(apart.values()),
            "a device for each part": max(apart.values()),
        }
        return tuple(Home(name, peak, peak <= self.room) for name, peak in ways.items())

    def _part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def _pictures(self, part: Part) -> int:
        return part.pictures if self.speed.shares_host else 0


def plan(config: Config, device: str | None = None, memory: float | None = None, speed: Speed | None = None) -> Plan:
    """What a config needs, worked out without any weights.

    Args:
        device: a named accelerator, or a device of this machine; None is the config's own.
        memory: bytes to plan for; None is all that the device has.
        speed: of the device, where it is known already.

    Raises:
        KitError: a model's shape is not known here, or the device is none.
    """
    settings = config.model_settings
    speed = speed or speed_of(device or settings.device, settings.dtype, memory)
    parts = tuple(make(config, speed) for make in PARTS.values())
    return Plan(parts, speed, config.training_settings.num_iterations)


def planned_again(before: Plan, config: Config, name: str) -> Plan:
    """A plan after a change to the settings of one part alone; the other parts are taken over."""
    parts = tuple(PARTS[name](config, before.speed) if part.name == name else part for part in before.parts)
    return replace(before, parts=parts)


PARTS: dict[str, Callable[[Config, Speed], Part]] = {
    "policy": lambda config, speed: plan_policy(config, speed.dtype),
    "generator": lambda config, speed: plan_generator(config, speed.dtype),
    "reward": lambda config, speed: plan_reward(config),
}
