"""A plan as text for a terminal, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict

from grpo_kit.preflight.plan.advice import Step
from grpo_kit.preflight.plan.fit import Plan
from grpo_kit.preflight.plan.parts import Part

_COLUMNS = "{:<12} {:<16} {:>12} {:>11} {:>11} {:>11}"


def in_words(plan: Plan, steps: Sequence[Step]) -> str:
    """The plan as lines of text."""
    speed = plan.speed
    kind = str(speed.dtype).removeprefix("torch.")
    lines = [f"device: {speed.name}, {_size(speed.memory)}, {kind}; {speed.source}", ""]
    lines.append(_COLUMNS.format("part", "", "parameters", "in memory", "adds most", "s/iteration"))
    for part in plan.parts:
        lines += _of_part(plan, part)
    part, phase = plan.largest
    lines += [
        "",
        f"peak: {_size(plan.peak)} = {_size(plan.resident)} all the time + {_size(phase.cost.peak)} in {part.name}, "
        f"{phase.name}",
        f"      (turned down by {phase.turned_down_by})",
        f"{'fits' if plan.fits else 'does not fit'}: of {_size(speed.memory)} tensors may take {_size(plan.room)}",
        f"time: {plan.seconds:.3g} s an iteration, {_minutes(plan.minutes)} for {plan.iterations} iterations, "
        "validations not counted",
        "",
        "where each part may live:",
    ]
    lines += [f"  {_size(home.peak):>9}  {'fits' if home.fits else '-':<5} {home.name}" for home in plan.homes]
    lines += [] if plan.fits else ["", *_of_steps(steps)]
    lines += ["", *(f"{part.name}: shape from {part.source}" for part in plan.parts)]
    lines += [f"{part.name}: {note}" for part in plan.parts for note in part.notes]
    return "\n".join(lines)


def _of_part(plan: Plan, part: Part) -> list[str]:
    """One line for the part, one for each model in it, each thing that it holds, and each phase."""
    seconds = f"{plan.part_seconds(part):.3g}"
    lines = [
        _COLUMNS.format(
            part.name, "", _count(part.parameters), _size(part.resident), _size(part.working), seconds
        ).rstrip()
    ]
    for piece in part.pieces if len(part.pieces) > 1 else ():
        lines.append(_COLUMNS.format("", piece.name, _count(piece.parameters), _size(piece.weights), "", "").rstrip())
    for name, held in part.held.items():
        lines.append(_COLUMNS.format("", name, "", _size(held), "", "").rstrip())
    for phase in part.phases:
        took = f"{plan.speed.seconds(phase.cost):.3g}"
        lines.append(_COLUMNS.format("", phase.name, "", "", _size(phase.cost.peak), took))
    return lines


def _of_steps(steps: Sequence[Step]) -> list[str]:
    if not steps:
        return ["no setting would help: take smaller models, or several devices"]
    lines = ["turn down, in this order:"]
    for step in steps:
        after = f"peak {_size(step.peak)}, {step.seconds:.3g} s"
        lines.append(f"  -o {step.setting}={_written(step.value)}  saves {_size(step.saved)} ({after}); {step.price}")
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
        "homes": [asdict(home) for home in plan.homes],
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


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _minutes(minutes: float) -> str:
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _written(value: object) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f'"{key}": {item}' for key, item in value.items())
        return f"'{{{inner}}}'"
    return str(value).lower() if isinstance(value, bool) else str(value)
