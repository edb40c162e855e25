"""The training loop: rollout, step, validate, save; and again from where a run folder stopped."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from grpo_kit.config import Config
from grpo_kit.evaluate import validate
from grpo_kit.experiment import Experiment
from grpo_kit.grpo.step import StepStats, grpo_step
from grpo_kit.hardware import derive_seed
from grpo_kit.prompts import balanced_batch
from grpo_kit.rollout import Rollout, collect_rollout
from grpo_kit.runs.checkpoint import load_latest, save_checkpoint
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.tracking import Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Where a run lies, how far it is, and what its last iteration logged."""

    run_dir: Path
    iterations: int
    started_from: int  # 0, or the committed iteration that was continued
    metrics: dict[str, float]


def train(
    kit: Experiment,
    run_dir: Path | str,
    *,
    progress: bool = True,
    on_iteration: Callable[[dict[str, float]], None] | None = None,
) -> TrainResult:
    """Train the kit's policy as its config says and leave everything in `run_dir`.

    A folder that holds a run is continued from its last committed iteration: the result is the same, byte for byte, as
    if it had not stopped.

    Args:
        progress: show a progress bar.
        on_iteration: called with each iteration's metrics, after all that the iteration writes is on disk.

    Raises:
        KitError: the folder belongs to another run, is in use, or cannot be written.
    """
    config, settings = kit.config, kit.config.training_settings
    logging.getLogger("grpo_kit").setLevel(config.tracking_settings.log_level)
    folder = RunFolder.open(run_dir, config)
    optimizer = make_optimizer(kit, config)
    with folder.writing(), Tracker(config, folder.path) as tracker:
        start = resume(kit, optimizer, folder)
        if start == 0:
            _validate(kit, folder, tracker, 0)
            _commit(kit, optimizer, folder, 0)  # so that a run stopped before its first checkpoint starts afresh
        bar = tqdm(
            range(start + 1, settings.num_iterations + 1),
            initial=start,
            total=settings.num_iterations,
            desc="GRPO",
            unit="it",
            disable=not progress,
            mininterval=1.0,
        )
        for iteration in bar:
            metrics = _iterate(kit, optimizer, folder, iteration)
            folder.append_metrics(metrics)
            tracker.log(metrics)
            bar.set_postfix(reward=f"{metrics['reward']:.3f}", kl=f"{metrics.get('kl', 0.0):.3f}", refresh=False)
            last = iteration == settings.num_iterations
            if last or iteration % settings.validate_every == 0:
                _validate(kit, folder, tracker, iteration)
            if last or iteration % settings.save_every == 0:
                _commit(kit, optimizer, folder, iteration)
            if on_iteration is not None:
                on_iteration(metrics)
    logged = folder.metrics()
    return TrainResult(folder.path, max(start, settings.num_iterations), start, logged[-1] if logged else {})


def make_optimizer(kit: Experiment, config: Config) -> torch.optim.Optimizer:
    """AdamW over what the policy trains."""
    settings = config.training_settings
    parameters = kit.policy.trainable_parameters()
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def resume(kit: Experiment, optimizer: torch.optim.Optimizer, folder: RunFolder) -> int:
    """Put policy and optimizer where the folder's newest good checkpoint left them; returns its iteration, or 0."""
    checkpoint = load_latest(folder.checkpoints)
    iteration = 0 if checkpoint is None else checkpoint.iteration
    folder.forget_after(iteration)
    if checkpoint is not None:
        kit.policy.load_trainable_state(checkpoint.policy)
        optimizer.load_state_dict(checkpoint.optimizer)
        logger.info("continuing after iteration %d", iteration)
    return iteration


def run_iteration(kit: Experiment, optimizer: torch.optim.Optimizer, iteration: int) -> tuple[Rollout, StepStats]:
    """One iteration without any files: its prompts, its rollout and the step on it, all fixed by (seed, iteration)."""
    settings, generation = kit.config.training_settings, kit.config.generation_settings
    prompts = balanced_batch(kit.train_prompts, settings.prompts_per_iteration, settings.seed, iteration)
    rollout = collect_rollout(
        kit.policy,
        kit.generator,
        kit.rewards,
        prompts,
        settings.group_size,
        seed=derive_seed(settings.seed, "rollout", iteration),
        images_per_prompt=generation.images_per_prompt,
        share_seeds=generation.share_seeds,
        use_image=kit.config.model_settings.use_image,
    )
    return rollout, grpo_step(kit.policy, optimizer, rollout, kit.config)


def _iterate(kit: Experiment, optimizer: torch.optim.Optimizer, folder: RunFolder, iteration: int) -> dict[str, float]:
    """One iteration and its line for metrics.jsonl; some rollouts are kept whole, pictures included."""
    settings = kit.config.training_settings
    started = time.perf_counter()
    rollout, stats = run_iteration(kit, optimizer, iteration)
    if iteration == 1 or iteration % settings.validate_every == 0 or iteration == settings.num_iterations:
        _keep_rollout(kit, folder, iteration, rollout, stats)
    seconds = {f"time/{name}": value for name, value in rollout.seconds.items()}
    metrics = {"iteration": iteration, **stats.metrics, **seconds, "learning_rate": settings.learning_rate}
    metrics["step_time"] = time.perf_counter() - started
    metrics["time/rest"] = metrics["step_time"] - sum(v for k, v in metrics.items() if k.startswith("time/"))
    return metrics


def _keep_rollout(kit: Experiment, folder: RunFolder, iteration: int, rollout: Rollout, stats: StepStats) -> None:
    """Save a rollout with what the step did to each of its tokens."""
    size = kit.config.training_settings.micro_batch_size or len(rollout.rewards)
    parts = torch.arange(len(rollout.rewards)).split(size)
    logprobs = {"old_logprobs": rollout.old_logprobs}
    with torch.no_grad():
        for name, reference in (("ref_logprobs", True), ("new_logprobs", False)):
            scores = [rollout.score(kit.policy, rows, reference=reference).logprobs.cpu() for rows in parts]
            logprobs[name] = torch.cat(scores)
    tokens = kit.policy.token_texts(rollout.completion_ids, rollout.completion_mask)
    folder.save_rollout(iteration, rollout, stats.advantages.tolist(), tokens, logprobs)


def _commit(kit: Experiment, optimizer: torch.optim.Optimizer, folder: RunFolder, iteration: int) -> None:
    keep = kit.config.training_settings.keep_checkpoints
    save_checkpoint(folder.checkpoints, iteration, kit.policy.trainable_state(), optimizer, keep)


def _validate(kit: Experiment, folder: RunFolder, tracker: Tracker, iteration: int) -> None:
    """Validate, and keep the policy in `best/` when no validation before scored as high."""
    earlier = [v["reward"] for v in folder.validations() if v["iteration"] < iteration]
    result = validate(kit, iteration, folder)
    tracker.log({"iteration": iteration, "reward": result["reward"], **result["rewards"]}, prefix="eval")
    logger.info("iteration %d: validation reward %.4f", iteration, result["reward"])
    if result["reward"] > max(earlier, default=float("-inf")):
        folder.save_best(kit.policy.save_pretrained)
