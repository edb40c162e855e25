"""Compute a recorded iteration again, and compare it bit for bit with what the run wrote down.

The iteration comes twice: its step alone, on the recorded rollout, where that was kept; and the whole of it, sampling
and drawing included. Nothing is written into the run's folder.
"""

import json
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from grpo_kit.config import load_config
from grpo_kit.config.contents import decisive_contents
from grpo_kit.config.display import Shown
from grpo_kit.config.hardware import computing_machine, library_versions
from grpo_kit.experiment import Experiment
from grpo_kit.rollout import Rollout
from grpo_kit.runs.checkpoint import CheckpointError, load_checkpoint, sha256
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.iterations import iteration_name, rollouts_of
from grpo_kit.runs.record import file_beside, metrics_lines
from grpo_kit.training.difference import Comparison, compare, compare_each, compare_line, unreadable
from grpo_kit.training.iteration import run_iteration
from grpo_kit.training.loop import log_line, make_optimizer, restore
from grpo_kit.training.restore import (
    ReplayError,
    copied_state,
    own_experiment,
    put_back,
    read_rollout,
    recorded_rollout,
    require_iteration,
    restore_after,
)
from grpo_kit.training.rollout_table import keep_rollout
from grpo_kit.training.step import StepStats, grpo_step

WHOLE, STEP = "whole", "step alone"
COMPUTED_BY_THE_STEP = ["reward", "advantage", "ref_logprobs", "new_logprobs"]  # columns of a kept rollout
# libraries that decide a number, a picture or a file of a run
DECISIVE = "grpo_kit torch torchvision transformers diffusers peft open_clip_torch numpy pandas pyarrow pillow".split()


@dataclass(frozen=True, repr=False)
class Replay(Shown):
    """An iteration that was computed again, beside its record; in a notebook it shows itself as a table."""

    run_dir: Path
    iteration: int
    started_from: str  # the checkpoint's name, or "the config's own models"
    sources: dict[str, str]  # part → what it took from the record, and what it computed
    comparisons: list[Comparison] = field(repr=False)
    skipped: list[str] = field(default_factory=list)  # damaged checkpoints, and how
    changed: dict[str, tuple[str, str]] = field(default_factory=dict)  # version or machine → (recorded, here)

    @property
    def equal(self) -> bool:
        """Whether every bit agrees."""
        return all(comparison.equal for comparison in self.comparisons)

    @property
    def first_difference(self) -> str | None:
        """The first place where record and replay differ; None where they are equal."""
        return next((one.difference for one in self.comparisons if not one.equal), None)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each thing that was compared: part, what, recorded, replayed, equal."""
        names = ["part", "what", "recorded", "replayed", "equal"]
        return pd.DataFrame([[getattr(one, name) for name in names] for one in self.comparisons], columns=names)

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
        lines = [f"{self.run_dir.resolve().name}, iteration {self.iteration}, from {self.started_from}"]
        lines += [f"skipped: {reason}" for reason in self.skipped]
        lines += [f"{part}: {source}" for part, source in self.sources.items()]
        shown = self.table.assign(equal=["yes" if one.equal else "NO" for one in self.comparisons])
        rows = [list(shown), *shown.to_numpy().tolist()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        cells = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, "", *cells, "", self.verdict])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self), quote=False)}</pre>"


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

    Raises:
        KitError: no such run or iteration, another experiment than the run's, or no rollout to make the step on.
    """
    run = Path(run_dir)
    require_iteration(run, iteration)
    kept = rollouts_of(run)
    if step_only and iteration not in kept:
        allowed = ", ".join(map(str, kept)) or "none"
        raise ReplayError(f"rollout of iteration {iteration}: not kept, allowed: {allowed}. Leave out --step-only")
    kit = own_experiment(run, kit)
    optimizer = make_optimizer(kit, kit.config)
    start, skipped, found = restore_after(kit, optimizer, run, iteration - 1, progress=progress)
    record, sources = _Record(run, iteration, changed_since(run)), {}
    if iteration in kept:
        before = copied_state(kit, optimizer)
        sources[STEP], compared = _step_alone(record, kit, optimizer)
        found += compared
        put_back(kit, optimizer, before)
    if not step_only:
        sources[WHOLE] = f"all of it computed, from the state after iteration {iteration - 1}"
        found += record.compared(WHOLE, kit, optimizer, *run_iteration(kit, optimizer, iteration))
    started_from = "the config's own models" if start is None else f"checkpoint {iteration_name(start)}"
    return Replay(run, iteration, started_from, sources, found, skipped, record.changed)


def changed_since(run_dir: Path) -> dict[str, tuple[str, str]]:
    """Versions, what the machine computes with, and files that are others than recorded: name → (recorded, here)."""
    recorded = json.loads((run_dir / "config.json").read_bytes())
    here = {name: version for name, version in library_versions().items() if name in DECISIVE}
    config, contents = load_config(run_dir), recorded.get("contents", {})
    then = {**recorded.get("versions", {}), **recorded.get("machine", {}), **contents}
    now = {**here, **computing_machine(config.model_settings), **(decisive_contents(config) if contents else {})}
    pairs = {name: (then.get(name, "not recorded"), value) for name, value in now.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _step_alone(record: "_Record", kit: Experiment, optimizer: torch.optim.Optimizer) -> tuple[str, list[Comparison]]:
    """The step on the recorded rollout: where its parts come from, and the comparisons."""
    try:
        rollout = recorded_rollout(kit, read_rollout(record.run / record.rollout), record.iteration)
    except (ValueError, TypeError) as error:
        return "nothing, since the rollout cannot be read", [unreadable(STEP, record.rollout, error)]
    stats = grpo_step(kit.policy, optimizer, rollout, kit.config)
    drawn = "; what the policy looked at was drawn again" if rollout.contexts else ""
    taken = f"prompts, tokens, scores and the sampler's log-probabilities from {record.rollout}"
    source = f"{taken}; rewards, advantages, the other log-probabilities and the step computed{drawn}"
    return source, record.compared(STEP, kit, optimizer, rollout, stats)


@dataclass(frozen=True)
class _Record:
    """What a run wrote down of an iteration."""

    run: Path
    iteration: int
    changed: dict[str, tuple[str, str]]  # versions and machine, since then

    @property
    def rollout(self) -> str:
        """The file of its rollout, inside the run."""
        return f"rollouts/{iteration_name(self.iteration)}.parquet"

    def compared(
        self, part: str, kit: Experiment, optimizer: torch.optim.Optimizer, rollout: Rollout, stats: StepStats
    ) -> list[Comparison]:
        """The record beside what a step leaves now; where there is a checkpoint, the kit stands at that one then."""
        metrics, kept = log_line(kit, self.iteration, rollout, stats), []
        if (self.run / self.rollout).is_file():
            with TemporaryDirectory() as scratch:
                kl = keep_rollout(kit, RunFolder(Path(scratch)), self.iteration, rollout, stats)
                metrics.setdefault("kl", kl)
                kept = self.compared_rollout(part, Path(scratch))
        line = metrics_lines(self.run)[self.iteration - 1]
        return compare_line(part, line, metrics) + kept + self._compared_checkpoint(part, kit, optimizer)

    def compared_rollout(self, part: str, again: Path) -> list[Comparison]:
        """The kept rollout beside that of another folder: columns, pictures, and the file itself if it can be equal."""
        try:
            columns = [read_rollout(folder / self.rollout) for folder in (self.run, again)]
        except ReplayError as error:
            return [unreadable(part, self.rollout, error)]
        if part == STEP:
            columns = [{name: side[name] for name in side if name in COMPUTED_BY_THE_STEP} for side in columns]
            return compare_each(part, "rollout", self.rollout, *columns)
        pictures = [name for name in columns[1]["thumbnail"] if name is not None]
        media = [file_beside(again / name) for name in pictures]
        pictures += [file.relative_to(again).as_posix() for file in media if file is not None]
        files = {f"pictures ({len(pictures)} files)": pictures}
        if not {"pandas", "pyarrow"} & self.changed.keys():
            files["rollout: its file"] = [self.rollout]
        found = compare_each(part, "rollout", self.rollout, *columns)
        for what, names in files.items():
            there, here = (
                {name: sha256(folder / name) for name in names if (folder / name).is_file()}
                for folder in (self.run, again)
            )
            found.append(compare(part, what, "files", there, here))
        return found

    def _compared_checkpoint(self, part: str, kit: Experiment, optimizer: torch.optim.Optimizer) -> list[Comparison]:
        name = f"checkpoints/{iteration_name(self.iteration)}"
        if not (self.run / name).is_dir():
            return []
        replayed = copied_state(kit, optimizer)
        try:
            restore(kit, optimizer, load_checkpoint(self.run / name))
        except CheckpointError as error:
            return [unreadable(part, name, error)]
        return compare_each(part, name, name, copied_state(kit, optimizer), replayed)
