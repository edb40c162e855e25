"""The training loop: rollout, step, validate, save, check for reward hacking; and going on where a run stopped."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from grpo_kit.config import Config, KitError
from grpo_kit.config.contents import decisive_contents
from grpo_kit.config.display import Shown
from grpo_kit.config.hardware import library_versions
from grpo_kit.config.schedule import scheduled_rates
from grpo_kit.evaluation.reward_hacking import check_for_reward_hacking, held_out_score
from grpo_kit.evaluation.validation import validate
from grpo_kit.experiment import Experiment, load_experiment
from grpo_kit.models.card import save_with_card
from grpo_kit.rewards.loading import reward_record, short_names
from grpo_kit.rollout import Rollout
from grpo_kit.runs.checkpoint import Checkpoint, keep_newest, load_latest, save_checkpoint
from grpo_kit.runs.folder import RunFolder, decisive_settings
from grpo_kit.runs.log_file import log_from
from grpo_kit.runs.record import first_own_validation, refuse_branch_without_checkpoint
from grpo_kit.runs.tracking import Tracker
from grpo_kit.training.accumulation import set_rate
from grpo_kit.training.iteration import run_iteration
from grpo_kit.training.launch import joined
from grpo_kit.training.nonfinite import warn_or_end
from grpo_kit.training.processes import ALONE, ProcessError, Processes, require_sharable
from grpo_kit.training.rollout_table import keep_rollout
from grpo_kit.training.step import StepStats

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class TrainResult(Shown):
    """Where a run lies, how far it is, and what its last iteration logged."""

    run_dir: Path
    iterations: int
    started_from: int  # 0, or the committed iteration that was continued
    metrics: dict[str, float] = field(repr=False)
    stopped: str | None = None  # why it ended before its last iteration: the reward hacking that was found

    def _shown(self) -> dict[str, object]:
        return super()._shown() | {"stopped": self.stopped or "no"} | self.metrics


def train(
    kit: Experiment,
    run_dir: Path | str,
    *,
    progress: bool = True,
    until: int | None = None,
    on_iteration: Callable[[dict[str, float]], None] | None = None,
    processes: Processes = ALONE,
) -> TrainResult:
    """Train the kit's policy as its config says and leave everything in `run_dir`.

    A folder that holds a run is continued from its last committed iteration: the result is the same, byte for byte, as
    if it had not stopped. Committed is every `save_every` iterations, after `save_minutes`, and what is complete when
    training is interrupted. Reward hacking that a validation shows is logged; with `stop_on_divergence` the run ends.

    Args:
        until: commit after this iteration and stop there, as if interrupted; None goes on to `num_iterations`.
        on_iteration: called with each iteration's metrics, after all that the iteration writes is on disk.
        processes: those that share the work and call this; their number may change when a run is continued.

    Raises:
        KitError: the folder belongs to another run, is in use, or cannot be written; the settings name no held-out
            score; steps were skipped again and again (`NonFiniteError`); or another process failed (`ProcessError`).
    """
    _held_out(kit)
    require_sharable(kit.config, processes.count)
    record = kit.rewards.record()
    settings, optimizer = kit.config.training_settings, make_optimizer(kit, kit.config)
    folder = processes.on_main(lambda: RunFolder.open(run_dir, kit.config, kit.contents(), record))
    with ExitStack() as stack:
        log_from(kit.config.tracking_settings.log_level, stack)
        processes.only_main(lambda: folder.hold(stack))  # as its writer, until the stack is closed
        tracker = processes.only_main(lambda: stack.enter_context(Tracker(kit.config, folder.path)))
        committed = resume(kit, optimizer, folder, processes)
        start = iteration = committed or 0
        processes.only_main(lambda: tracker.go_on(start))
        processes.prepare(kit.policy, optimizer)
        run = _Run(kit, optimizer, folder, tracker, processes, start)
        if committed is None:
            run.validate(0)
            commit(kit, optimizer, folder, 0, processes)  # a run stopped before its first checkpoint starts afresh
        stack.enter_context(run)
        stopped = processes.on_main(lambda: _check_for_reward_hacking(kit, folder, announce=False))
        last = start if stopped else min(settings.num_iterations, until or settings.num_iterations)
        hidden = not (progress and processes.is_main)
        bar = tqdm(range(start + 1, last + 1), "GRPO", last, initial=start, unit="it", mininterval=1.0, disable=hidden)
        for iteration in bar:
            metrics = run.iterate(iteration)
            bar.set_postfix(reward=f"{metrics['reward']:.3f}", kl=f"{metrics.get('kl', 0.0):.3f}", refresh=False)
            if iteration == settings.num_iterations or iteration % settings.validate_every == 0:
                run.validate(iteration)
                stopped = processes.on_main(lambda: _check_for_reward_hacking(kit, folder))
            run.complete(iteration, now=iteration == last or stopped or iteration % settings.save_every == 0)
            if on_iteration is not None:
                processes.only_main(partial(on_iteration, metrics))
            if stopped:
                break
    return TrainResult(folder.path, iteration, start, next(reversed(folder.metrics()), {}), stopped)


def make_optimizer(kit: Experiment, config: Config) -> torch.optim.Optimizer:
    """AdamW over what the policy trains; what an interrupt left of an adapter is put right before."""
    kit.policy.recover()
    settings = config.training_settings
    parameters = kit.policy.trainable_parameters()
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def resume(
    kit: Experiment, optimizer: torch.optim.Optimizer, folder: RunFolder, processes: Processes = ALONE
) -> int | None:
    """Put policy, optimizer and rewards where the newest good checkpoint left them; its iteration, None without one."""
    settings = decisive_settings(folder.decisive(kit.config))
    compared = {name: value for name, value in settings.items() if name not in folder.contents}  # else by content
    checkpoint = load_latest(folder.checkpoints, compared)
    if checkpoint is None:
        refuse_branch_without_checkpoint(folder.path)
    iteration = 0 if checkpoint is None else checkpoint.iteration
    if len(seen := set(processes.gather(lambda: iteration))) > 1:
        raise ProcessError(
            f"run folder {folder.path}: its newest checkpoint is iteration {min(seen)} for one process and {max(seen)} "
            "for another. Give a folder that all of them see"
        )

    def tidy() -> None:  # drop what is later, and checkpoints that a crash came before the removal of
        folder.forget_after(iteration)
        with folder.file_errors("checkpoints"):
            keep_newest(folder.checkpoints, kit.config.training_settings.keep_checkpoints, iteration)

    processes.on_main(tidy)
    restore(kit, optimizer, checkpoint)
    if checkpoint is not None:
        logger.info("continuing after iteration %d", iteration)
    return None if checkpoint is None else iteration


def restore(kit: Experiment, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint | None) -> None:
    """Put policy, optimizer and rewards where a checkpoint left them; None is the start, where the policy must be."""
    kit.rewards.load_state_dict({} if checkpoint is None else checkpoint.rewards)
    if checkpoint is not None:
        kit.policy.load_pretrained(checkpoint.policy)
        optimizer.load_state_dict(checkpoint.optimizer)


def log_line(kit: Experiment, iteration: int, rollout: Rollout, stats: StepStats) -> dict[str, float]:
    """What metrics.jsonl says of an iteration, but for the seconds that it took as a whole."""
    seconds = {f"time/{name}": value for name, value in rollout.seconds.items()}
    learning_rate = scheduled_rates(kit.config.training_settings, iteration)[-1]  # of its last update
    return {"iteration": iteration, **stats.metrics, **seconds, "learning_rate": learning_rate}


def commit(
    kit: Experiment,
    optimizer: torch.optim.Optimizer,
    folder: RunFolder,
    iteration: int,
    processes: Processes = ALONE,
    rewards: dict[str, torch.Tensor] | None = None,
) -> None:
    """Put everything that the next iteration depends on into a checkpoint, once what it vouches for is on the disk.

    The rewards' state is that after the iteration; None is their state now.
    """
    policy, state = _saving(kit, iteration, processes), processes.full(optimizer.state_dict())

    def save() -> None:
        save_checkpoint(
            folder.checkpoints,
            iteration,
            policy,
            state,
            kit.config.training_settings.keep_checkpoints,
            rewards=kit.rewards.state_dict() if rewards is None else rewards,
            settings=decisive_settings(kit.config.to_dict()),
            versions=library_versions(),
        )

    processes.on_main(lambda: folder.commit(save))


@dataclass(eq=False)
class _Run:
    """A run in progress; as a context it sees to it that an interrupt costs no complete iteration.

    An iteration is complete once all that it writes is written. Its state is that of policy and optimizer until the
    next one's first optimizer step, so that an interrupt until then (in sampling, drawing, scoring) is followed by a
    commit, and one in the step, or in what is written after it, is not.
    """

    kit: Experiment
    optimizer: torch.optim.Optimizer
    folder: RunFolder
    tracker: Tracker | None  # of the main process alone
    processes: Processes
    start: int

    def __post_init__(self) -> None:
        self._committed, self._clock = self.start, time.monotonic()
        self._complete = (self.start, self.kit.rewards.state_dict())  # rewards take in scores before the step on them
        self._is_stepping = False
        self.optimizer.register_step_pre_hook(lambda *_: setattr(self, "_is_stepping", True))

    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration and its line of metrics.jsonl; some rollouts are kept, with pictures."""
        kit, processes, settings = self.kit, self.processes, self.kit.config.training_settings
        started = time.perf_counter()
        rollout, stats = run_iteration(kit, self.optimizer, iteration, processes)
        metrics = log_line(kit, iteration, rollout, stats)
        if iteration == 1 or iteration % settings.validate_every == 0 or iteration == settings.num_iterations:
            with processes.whole_policy():
                kl = processes.on_main(lambda: keep_rollout(kit, self.folder, iteration, rollout, stats))
            metrics.setdefault("kl", kl)  # beta 0 needs no KL, but who watches the run does
        metrics["step_time"] = time.perf_counter() - started
        metrics["time/rest"] = metrics["step_time"] - sum(v for k, v in metrics.items() if k.startswith("time/"))

        def log() -> None:
            self.folder.append_metrics(metrics)
            self.tracker.log(metrics)
            if stats.non_finite is not None:
                warn_or_end(self.folder, iteration, stats.non_finite, settings.updates_per_rollout)

        processes.on_main(log)
        return metrics

    def validate(self, iteration: int) -> None:
        """Validate, and keep the policy in `best/` when none before scored as high; the main process does it."""

        def is_best_so_far() -> bool:
            result = validate(self.kit, iteration, self.folder)
            self.tracker.log_samples(iteration)
            logger.info("iteration %d: validation reward %.4f", iteration, result["reward"])
            return best_iteration(self.kit, self.folder) == iteration

        with self.processes.whole_policy():
            is_best = self.processes.on_main(is_best_so_far)
        if is_best:
            saving = _saving(self.kit, iteration, self.processes)
            self.processes.on_main(lambda: self.folder.save_best(saving))

    def complete(self, iteration: int, *, now: bool) -> None:
        """All that an iteration writes is written; it is committed `now`, or where `save_minutes` have passed."""
        self._complete = (iteration, self.kit.rewards.state_dict())
        self._is_stepping = False
        minutes = self.kit.config.training_settings.save_minutes
        passed = time.monotonic() - self._clock
        if now or self.processes.on_main(lambda: minutes is not None and passed >= 60 * minutes):
            self._commit(self.processes)

    def _commit(self, processes: Processes) -> None:
        iteration, rewards = self._complete
        commit(self.kit, self.optimizer, self.folder, iteration, processes, rewards)
        self._committed, self._clock = iteration, time.monotonic()

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_interrupt = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        can_commit = self.processes.is_main and not self.processes.sharded  # spread weights need all processes
        iteration, _ = self._complete
        if not is_interrupt or not can_commit or self._is_stepping or iteration == self._committed:
            return
        self.kit.policy.recover()
        rates = scheduled_rates(self.kit.config.training_settings, iteration)
        set_rate(self.optimizer, rates[-1])  # the next iteration's may stand there already
        try:
            self._commit(ALONE)
            logger.info("interrupted; iteration %d is committed", iteration)
        except KitError as error:
            logger.warning("interrupted; iteration %d could not be committed: %s", iteration, error)


def _saving(kit: Experiment, iteration: int, processes: Processes) -> Callable[[Path], None]:
    """What writes the policy into the folder that it is given; weights that are spread are gathered here, by all."""
    weights = processes.full(kit.policy.trainable_state()) if processes.sharded else None
    known = {"num_prompts": len(kit.train_prompts), "rewards": kit.rewards.record()}
    return lambda place: save_with_card(kit.policy, kit.config, place, iteration, weights, **known)


def best_iteration(kit: Experiment, folder: RunFolder) -> int | None:
    """The iteration whose policy `best/` holds: the first of those that were validated best; None before any was."""
    since = first_own_validation(folder.path)  # a branch may have none of the policies that its parent validated
    own = [found for found in comparable(folder.validations()) if found["iteration"] >= since]
    held_out = _held_out(kit)

    def rank(validation: dict) -> tuple[float, float]:  # by the reward where the held-out score is equal, or is none
        scores = (0.0 if held_out is None else validation["rewards"].get(held_out), validation["reward"])
        return tuple(-math.inf if score is None or math.isnan(score) else score for score in scores)

    best = max(own, key=rank, default=None)
    return None if best is None else best["iteration"]


def comparable(validations: list[dict]) -> list[dict]:
    """Those that judged the same prompts as the newest: the scores of others say nothing beside it."""
    judged = [[sample["user_prompt"] for sample in found.get("samples", [])] for found in validations]
    return [found for found, prompts in zip(validations, judged, strict=True) if prompts == judged[-1]]


def _held_out(kit: Experiment) -> str | None:
    """The monitor that this experiment is judged by; raises where the settings need one that is not there."""
    named = kit.config.evaluation_settings.held_out
    held_out = held_out_score(kit.rewards.monitors, short_names(kit.config.reward_settings).get(named, named))
    if held_out is None and kit.config.training_settings.stop_on_divergence:
        raise KitError(
            "training_settings.stop_on_divergence: found true, but no score is held out. Add a second scorer to "
            "reward_settings.monitors and name it in evaluation_settings.held_out"
        )
    return held_out


def _check_for_reward_hacking(kit: Experiment, folder: RunFolder, *, announce: bool = True) -> str | None:
    """Look for reward hacking in the validations and record what is found; returns why the run ends, if it does."""
    validations, metrics, held_out = comparable(folder.validations()), folder.metrics(), _held_out(kit)
    seen = check_for_reward_hacking(validations, metrics, held_out)
    folder.write_json("sentinel.json", seen.to_dict())
    if announce:  # what the newest validation is the first to show; a continued run has logged it before
        known = check_for_reward_hacking(validations[:-1], metrics, held_out).findings()
        for finding in (finding for finding in seen.findings() if finding not in known):
            logger.warning("%s", finding)
    if seen.divergence is None or not kit.config.training_settings.stop_on_divergence:
        return None
    logger.warning(
        "stopped for reward hacking (%s). best/ holds the policy with the best %s. To train on all the same, set "
        "training_settings.stop_on_divergence to false and run again in this folder",
        seen.divergence,
        held_out,
    )
    return str(seen.divergence)


def start(config: Config, folder: Path) -> bool:
    """Load an experiment and train it, together with the processes that this one was launched with.

    Returns:
        Whether this process is the first of them, which reports.
    """
    with joined(config, folder) as processes:
        if processes.is_main:
            print(f"run folder: {folder}", flush=True)
            RunFolder(folder).require_free()  # before the models are loaded
            if (folder / "config.json").is_file():
                RunFolder.open(folder, config, decisive_contents(config), reward_record(config))
        train(load_experiment(config), folder, processes=processes)
    return processes.is_main
