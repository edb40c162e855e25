"""What a workload hands over: figures with their goals, the gates they had to pass, and everything measured."""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from grpo_kit.config import PROJECT_ROOT, KitError
from grpo_kit.config.hardware import library_versions


class BenchmarkError(KitError):
    """A measurement that cannot be made, or whose sides do not do the same work."""


@dataclass(frozen=True)
class Gate:
    """Two sides that must agree before their times are compared: a difference and the most that it may be."""

    name: str
    measured: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within its limit; a NaN is not."""
        return self.measured <= self.limit


def require(gates: Sequence[Gate]) -> list[Gate]:
    """The gates, all passed.

    Raises:
        BenchmarkError: the first that failed. No time of such a case may be reported.
    """
    for gate in gates:
        if not gate.passed:
            raise BenchmarkError(
                f"gate {gate.name!r}: found {gate.measured:.3g}, allowed: at most {gate.limit:.3g}; "
                "the two sides do not do the same work, so their times are not compared"
            )
    return list(gates)


@dataclass(frozen=True)
class Figure:
    """One number that is promised: what was measured, with its interval, and the two goals.

    Args:
        value: the estimate; by processor time where it is one of seconds.
        low, high: its interval; None where there is none.
        must, aim: the goals; None where there is none.
        more_is_better: whether a goal is a least value or a most value.
        wall: the same by the wall's clock.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    must: float | None = None
    aim: float | None = None
    more_is_better: bool = True
    unit: str = "×"
    wall: float | None = None

    def reaches(self, goal: float) -> bool:
        """Whether the estimate is at least (or at most) the goal, by both clocks where there are two."""
        values = [self.value] if self.wall is None else [self.value, self.wall]
        return min(values) >= goal if self.more_is_better else max(values) <= goal


@dataclass(frozen=True)
class Settings:
    """How long to measure: rounds of alternation, and whether only a part of the cases."""

    pairs: int = 7
    quick: bool = False
    threads: int = 1


@dataclass(frozen=True)
class Result:
    """One workload, measured."""

    id: str
    workload: str
    figures: list[Figure]
    cases: list[dict]
    gates: list[Gate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write(result: Result, path: Path, settings: dict[str, object]) -> Path:
    """Write a result beside the machine and settings that it was measured with; the file appears complete or not."""
    record = asdict(result) | {"settings": settings, "machine": machine(), "versions": library_versions()}
    record["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps(record, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text)
    unfinished.replace(path)
    return path


def read(path: Path) -> dict:
    """A record that `write` wrote."""
    return json.loads(path.read_text())


def figures_of(record: dict) -> list[Figure]:
    """The figures of a record."""
    return [Figure(**figure) for figure in record["figures"]]


def fingerprint(settings: Settings) -> dict[str, object]:
    """The settings and a digest of the code: records with another one are measured again."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in ("grpo_kit", "benchmarks"):
        for path in sorted((PROJECT_ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return asdict(settings) | {"code": digest.hexdigest()}


def machine() -> dict[str, object]:
    """The processor's model and how many of it; nothing that names a host."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"processor": models[0] if models else platform.processor() or platform.machine(), "cores": os.cpu_count()}
