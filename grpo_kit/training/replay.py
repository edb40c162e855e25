"""Compute a recorded iteration again, and compare it bit for bit with what the run wrote down.

It begins at the newest checkpoint before the iteration, or at the config's own models where there is none, and runs
what lies between in memory. Then the iteration comes twice: its step alone, on the recorded rollout, where that was
kept; and the whole of it, sampling and drawing included. Nothing is written into the run's folder.
"""

import json
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from tqdm import tqdm

from grpo_kit.config import load_config
from grpo_kit.config.hardware import computing_machine, library_versions
from grpo_kit.experiment import Experiment
from grpo_kit.rollout import Rollout
from grpo_kit.runs.checkpoint import CheckpointError, load_checkpoint
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.iterations import iteration_name, rollouts_of
from grpo_kit.runs.record import metrics_lines
from grpo_kit.training.difference import (
    Comparison,
    Digits,
    compare_files,
    compare_metrics,
    compare_settings,
    compare_tables,
    compare_tensors,
    together,
    unreadable,
)
from grpo_kit.training.loop import keep_rollout, log_line, make_optimizer, restore, run_iteration
from grpo_kit.training.restore import (
    ReplayError,
    State,
    own_experiment,
    read_rollout,
    recorded_rollout,
    require_iteration,
    restore_newest,
)
from grpo_kit.training.step import StepStats, grpo_step

WHOLE, STEP = "whole", "step alone"
COMPUTED_BY_THE_STEP = ["reward", "advantage", "ref_logprobs", "new_logprobs"]  # columns of a kept rollout
# libraries that decide a number, a picture or a file of a run
DECISIVE = "grpo_kit torch torchvision transformers diffusers peft open_clip_torch numpy pandas pyarrow pillow".split()


@dataclass(frozen=True)
class Replay:
    """An iteration that was computed again, beside its record; in a notebook it shows itself as a table."""

    run_dir: Path
    iteration: int
    started_from: str  # the checkpoint's name, or "the config's own models"
    sources: dict[str, str]  # part → what it took from the record, and what it computed
    comparisons: list[Comparison] = field(repr=False)
    skipped: list[str] = field(default_factory=list)  # checkpoints that were passed over, and why
    changed: dict[str, tuple[str, str]] = field(default_factory=dict)  # version or machine → (recorded, here)

    @property
    def equal(self) -> bool:
        """Whether every bit agrees."""
        return all(comparison.equal for comparison in self.comparisons)

    @property
    def first_difference(self) -> str | None:
        """Where the record and the replay first part; None where they do not."""
        return next((one.difference for one in self.comparisons if not one.equal), None)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each thing that was compared: part, what, recorded, replayed, equal."""
        names = ("part", "what", "recorded", "replayed", "equal")
        return pd.DataFrame([{name: getattr(one, name) for name in names} for one in self.comparisons])

    @property
    def verdict(self) -> str:
        """One line: equal or not, where it first differs, and what changed since it was recorded."""
        count, unequal = len(self.comparisons), sum(not one.equal for one in self.comparisons)
        if not unequal:
            return f"iteration {self.iteration}: equal bit for bit, all {count} of {count} compared"
        changes = ", ".join(f"{name} {then} then and {now} now" for name, (then, now) in self.changed.items())
        text = f"iteration {self.iteration}: {unequal} of {count} differ, first {self.first_difference}"
        return f"{text}. The likely reason: {changes}" if changes else text

    def __str__(self) -> str:
        shown = self.table.assign(equal=["yes" if one.equal else "NO" for one in self.comparisons])
        return "\n".join([*self._head(), "", _left_aligned(shown), "", self.verdict])

    def _repr_html_(self) -> str:
        head = "".join(f"<p>{escape(line)}</p>" for line in self._head())
        return f"{head}{self.table.to_html(index=False)}<p><b>{escape(self.verdict)}</b></p>"

    def _head(self) -> list[str]:
        lines = [f"{self.run_dir.resolve().name}, iteration {self.iteration}, from {self.started_from}"]
        lines += [f"passed over: {reason}" for reason in self.skipped]
        return lines + [f"{part}: {source}" for part, source in self.sources.items()]


def replay(
    run_dir: Path | str,
    iteration: int,
    *,
    kit: Experiment | None = None,
    step_only: bool = False,
    progress: bool = True,
) -> Replay:
    """Compute an iteration of a run again and compare it, bit for bit, with what was recorded.

    Compared are its line of metrics.jsonl (but for the seconds), its rollout and pictures where they were kept, weights
    and states where its checkpoint is there, and the lines of the iterations that had to be computed before it.

    Args:
        kit: the run's own experiment, fresh from loading, for a run with rewards of your own; its policy is trained
            here. None loads what the run's config says.
        step_only: the step alone, on the recorded rollout: nothing of this iteration is sampled, drawn or scored.
        progress: show a progress bar.

    Raises:
        KitError: no such run or iteration, another experiment than the run's, or no rollout to make the step on.
    """
    run, lines = RunFolder(Path(run_dir)), metrics_lines(Path(run_dir))
    require_iteration(run.path, iteration, len(lines))
    place = rollout_file(run.path, iteration)
    if step_only and not place.is_file():
        kept = ", ".join(map(str, rollouts_of(run.path))) or "none"
        raise ReplayError(f"rollout of iteration {iteration}: not kept, allowed: {kept}. Leave out --step-only")
    kit = own_experiment(run.path, kit)
    optimizer = make_optimizer(kit, kit.config)
    start, skipped = restore_newest(kit, optimizer, run.path, iteration - 1)
    found = advance(kit, optimizer, lines, start, iteration - 1, progress)
    recorded = _Recorded(run, iteration, lines[iteration - 1], changed_since(run.path))
    before, sources = State.of(kit, optimizer), {}
    if place.is_file():
        sources[STEP], compared = _step_alone(kit, optimizer, recorded)
        found += compared
        before.put_back(kit, optimizer)
    if not step_only:
        sources[WHOLE] = f"all of it computed, from the state after iteration {iteration - 1}"
        found += recorded.beside(WHOLE, kit, optimizer, *run_iteration(kit, optimizer, iteration))
    origin = "the config's own models" if start is None else f"checkpoint {iteration_name(start)}"
    return Replay(run.path, iteration, origin, sources, found, skipped, recorded.changed)


# --- the record -------------------------------------------------------------------------------------------------------


def rollout_file(run_dir: Path, iteration: int) -> Path:
    """Where an iteration's rollout lies, if it was kept."""
    return run_dir / "rollouts" / f"{iteration_name(iteration)}.parquet"


def changed_since(run_dir: Path) -> dict[str, tuple[str, str]]:
    """The versions, and what the machine computes with, that are others here than recorded: name → (recorded, here)."""
    recorded = json.loads((run_dir / "config.json").read_bytes())
    here = {name: version for name, version in library_versions().items() if name in DECISIVE}
    then = {**recorded.get("versions", {}), **recorded.get("machine", {})}
    now = {**here, **computing_machine(load_config(run_dir).model_settings)}
    pairs = {name: (then.get(name, "not recorded"), value) for name, value in now.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


# --- the iterations before it -----------------------------------------------------------------------------------------


def advance(
    kit: Experiment, optimizer: torch.optim.Optimizer, lines: list[bytes], start: int | None, end: int, progress: bool
) -> list[Comparison]:
    """Run the iterations after `start` up to `end` in memory; each one's line is compared with the recorded one."""
    between = range((start or 0) + 1, end + 1)
    found = []
    for iteration in tqdm(between, desc="replay", unit="it", disable=not progress or not between):
        rollout, stats = run_iteration(kit, optimizer, iteration)
        found += _one_line(kit, iteration, rollout, stats, lines[iteration - 1])
    return found


def _one_line(kit: Experiment, iteration: int, rollout: Rollout, stats: StepStats, line: bytes) -> list[Comparison]:
    """A line as one comparison: the first of its numbers that differs, or all of them."""
    found = _compare_line(f"iteration {iteration}", line, log_line(kit, iteration, rollout, stats))
    return [next((one for one in found if not one.equal), together(found, "metrics"))]


def _compare_line(part: str, line: bytes, metrics: dict[str, float]) -> list[Comparison]:
    """Each number of an iteration's line.

    The KL that a kept rollout adds where the loss needs none counts only where the replay has computed it too.
    """
    place = f"metrics.jsonl line {metrics['iteration']}"
    try:
        recorded = dict(json.loads(line, parse_float=Digits))
    except (ValueError, TypeError) as error:
        return [unreadable(part, place, error)]
    if "kl" not in metrics:
        recorded.pop("kl", None)
    return compare_metrics(part, place, recorded, metrics)


# --- the iteration ----------------------------------------------------------------------------------------------------


def _step_alone(
    kit: Experiment, optimizer: torch.optim.Optimizer, recorded: "_Recorded"
) -> tuple[str, list[Comparison]]:
    """The step on the recorded rollout: what it took from the record and what it computed, and the comparisons."""
    place = rollout_file(recorded.run.path, recorded.iteration)
    try:
        rollout = recorded_rollout(kit, read_rollout(place), recorded.iteration)
    except (ReplayError, ValueError, TypeError) as error:
        return "nothing, since the rollout cannot be read", [unreadable(STEP, f"rollouts/{place.name}", error)]
    stats = grpo_step(kit.policy, optimizer, rollout, kit.config)
    drawn = "; what the policy looked at was drawn again" if rollout.prompt_images else ""
    source = (
        f"prompts, tokens, scores and the sampler's log-probabilities from rollouts/{place.name}; "
        f"rewards, advantages, the other log-probabilities and the step computed{drawn}"
    )
    return source, recorded.beside(STEP, kit, optimizer, rollout, stats)


@dataclass(frozen=True)
class _Recorded:
    """What a run wrote down of an iteration."""

    run: RunFolder
    iteration: int
    line: bytes  # of metrics.jsonl
    changed: dict[str, tuple[str, str]]  # versions and machine, since then

    def beside(
        self, part: str, kit: Experiment, optimizer: torch.optim.Optimizer, rollout: Rollout, stats: StepStats
    ) -> list[Comparison]:
        """The record beside what a step leaves now: its line, rollout and pictures, and the state that the kit is in.

        Where the iteration has a checkpoint, the kit stands at that one afterwards.
        """
        metrics, tables = log_line(kit, self.iteration, rollout, stats), []
        if rollout_file(self.run.path, self.iteration).is_file():
            with TemporaryDirectory() as scratch:
                kl = keep_rollout(kit, RunFolder(Path(scratch)), self.iteration, rollout, stats)
                metrics.setdefault("kl", kl)
                tables = self._rollouts(part, Path(scratch))
        return _compare_line(part, self.line, metrics) + tables + self._checkpoints(part, kit, optimizer)

    def _rollouts(self, part: str, scratch: Path) -> list[Comparison]:
        """A kept rollout: its columns, its pictures, and the file itself where the same libraries write it."""
        place, again = (rollout_file(folder, self.iteration) for folder in (self.run.path, scratch))
        name = f"rollouts/{place.name}"
        try:
            tables = [read_rollout(file) for file in (place, again)]
        except ReplayError as error:
            return [unreadable(part, name, error)]
        if part == STEP:
            return compare_tables(part, name, *(table.filter(COMPUTED_BY_THE_STEP) for table in tables))
        found = compare_tables(part, name, *tables)
        pictures = [str(picture) for picture in tables[1]["thumbnail"] if picture is not None]
        found.append(compare_files(part, f"pictures ({len(pictures)} files)", pictures, self.run.path, scratch))
        if not {"pandas", "pyarrow"} & self.changed.keys():
            found.append(compare_files(part, "rollout: its file", [name], self.run.path, scratch))
        return found

    def _checkpoints(self, part: str, kit: Experiment, optimizer: torch.optim.Optimizer) -> list[Comparison]:
        place = self.run.checkpoints / iteration_name(self.iteration)
        if not place.is_dir():
            return []
        state = State.of(kit, optimizer)
        try:
            restore(kit, optimizer, load_checkpoint(place))
        except CheckpointError as error:
            return [unreadable(part, f"checkpoints/{place.name}", error)]
        return _compare_states(part, f"checkpoints/{place.name}", State.of(kit, optimizer), state)


def _compare_states(part: str, place: str, recorded: State, replayed: State) -> list[Comparison]:
    """Weights, the optimizer's state and settings, and the rewards' statistics where there are any."""
    settings = [state.optimizer["param_groups"] for state in (recorded, replayed)]
    found = [
        compare_tensors(part, f"{place}: weights", recorded.weights, replayed.weights),
        compare_tensors(part, f"{place}: optimizer", recorded.moments, replayed.moments),
        compare_settings(part, f"{place}: optimizer's settings", *settings),
    ]
    if recorded.rewards or replayed.rewards:
        found.append(compare_tensors(part, f"{place}: rewards' statistics", recorded.rewards, replayed.rewards))
    return found


def _left_aligned(table: pd.DataFrame) -> str:
    rows = [list(table.columns), *table.astype(str).to_numpy().tolist()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
