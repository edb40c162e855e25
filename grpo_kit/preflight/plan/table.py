"""A plan as text for a terminal, and as JSON; sizes of memory as people write them."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from grpo_kit.config import Config, KitError
from grpo_kit.preflight.plan import plan
from grpo_kit.preflight.plan.advice import Step, advice
from grpo_kit.preflight.plan.parts import Part, Plan


def plan_text(config: Config, device: str = "", memory: str = "", *, json_too: bool = False) -> str:
    """The plan of a config, and what to turn down; `device` and `memory` as people write them, "" is the config's."""
    found = plan(config, device or None, bytes_of(memory) if memory else None)
    steps = advice(found, config)
    return json.dumps(as_json(found, steps), indent=2) if json_too else in_words(found, steps)


def in_words(plan: Plan, steps: Sequence[Step]) -> str:
    """The plan as lines of text."""
    speed, room = plan.speed, _size(plan.room)
    kind = str(speed.dtype).removeprefix("torch.")
    part, phase = plan.largest
    training = f"{plan.minutes:.1f} min" if plan.minutes < 120 else f"{plan.minutes / 60:.1f} h"
    rows = [("part", "", "parameters", "in memory", "adds most", "s/iteration")]
    rows += [row for each in plan.parts for row in _rows(plan, each)]
    lines = [
        f"device: {speed.name}, {_size(speed.memory)}, {kind}; {speed.source}",
        "",
        *("{:<12} {:<16} {:>12} {:>11} {:>11} {:>11}".format(*row).rstrip() for row in rows),
        "",
        f"peak: {_size(plan.peak)} = {_size(plan.resident)} all the time + {_size(phase.cost.peak)} in {part.name}, "
        f"{phase.name}",
        f"      (turned down by {phase.turned_down_by})",
        f"{'fits' if plan.fits else 'does not fit'}: of {_size(speed.memory)} tensors may take {room}",
        f"time: {plan.seconds:.3g} s an iteration, {training} for {plan.iterations} iterations, "
        "validations not counted",
        "",
        "where each part may live:",
        *(f"  {_size(way.peak):>9}  {'fits' if way.fits else '-':<5} {way.name}" for way in plan.placements),
        *([] if plan.fits else ["", *_step_lines(steps)]),
        "",
        *(f"{each.name}: shape from {each.source}" for each in plan.parts),
        *(f"{each.name}: {note}" for each in plan.parts for note in each.notes),
    ]
    return "\n".join(lines)


def _rows(plan: Plan, part: Part) -> Iterator[tuple[str, ...]]:
    """A part's rows of the table, and below it its models, what it holds and its phases."""
    seconds = f"{plan.part_seconds(part):.3g}"
    yield part.name, "", _count(part.parameters), _size(part.resident), _size(part.working), seconds
    for piece in part.pieces if len(part.pieces) > 1 else ():
        yield "", piece.name, _count(piece.parameters), _size(piece.weights), "", ""
    for name, held in part.held.items():
        yield "", name, "", _size(held), "", ""
    for phase in part.phases:
        yield "", phase.name, "", "", _size(phase.cost.peak), f"{plan.speed.seconds(phase.cost):.3g}"


def _step_lines(steps: Sequence[Step]) -> list[str]:
    if not steps:
        return ["no setting would help: take smaller models, or several devices"]
    lines = ["turn down, in this order:"]
    for step in steps:
        after = f"peak {_size(step.peak)}, {step.seconds:.3g} s"
        value = f"'{json.dumps(step.value)}'" if isinstance(step.value, dict) else json.dumps(step.value)
        lines.append(f"  -o {step.setting}={value}  saves {_size(step.saved)} ({after}); {step.price}")
    fits = "then it fits" if steps[-1].fits else "even then it does not fit: take smaller models, or several devices"
    return [*lines, fits]


def as_json(plan: Plan, steps: Sequence[Step]) -> dict[str, object]:
    """The plan's numbers: bytes, floating-point operations and seconds."""
    return {
        "device": plan.speed.name,
        "speed": plan.speed.source,
        "dtype": str(plan.speed.dtype).removeprefix("torch."),
        "memory": plan.speed.memory,
        "room": plan.room,
        "parts": {part.name: _part_as_json(plan, part) for part in plan.parts},
        "resident": plan.resident,
        "peak": plan.peak,
        "fits": plan.fits,
        "seconds_per_iteration": plan.seconds,
        "minutes": plan.minutes,
        "homes": [asdict(way) for way in plan.placements],
        "turn_down": [asdict(step) for step in steps],
    }


def _part_as_json(plan: Plan, part: Part) -> dict[str, object]:
    phases = {
        phase.name: {
            "peak": phase.cost.peak,
            "flops": phase.cost.flops,
            "seconds": plan.speed.seconds(phase.cost),
            "turned_down_by": phase.turned_down_by,
        }
        for phase in part.phases
    }
    models = {piece.name: {"parameters": piece.parameters, "weights": piece.weights} for piece in part.pieces}
    held = {"held": dict(part.held), "resident": part.resident, "pictures": part.pictures}
    return {"source": part.source, "models": models, **held, "phases": phases, "notes": list(part.notes)}


def bytes_of(text: str) -> float:
    """A size such as 24GB or 24GiB in bytes; a `KitError` where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM])(i?)B?", text.strip(), flags=re.IGNORECASE)
    if not found or not float(found[1]):
        raise KitError(f"--memory: found {text!r:.60}, allowed: a size such as 24GB, 15.6GiB or 500MB")
    kilo = 1024 if found[3] else 1000
    return float(found[1]) * kilo ** (3 if found[2].upper() == "G" else 2)


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
