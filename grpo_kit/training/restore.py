"""The state of a run after any of its iterations, computed again from a checkpoint or from the run's start."""

import copy
import logging
import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import torch
from PIL import Image
from tqdm import tqdm

from grpo_kit.config import KitError, load_config
from grpo_kit.config.contents import pictures_digest
from grpo_kit.config.prompts import TEXTS, Prompt
from grpo_kit.experiment import Experiment, load_experiment
from grpo_kit.grpo.logprobs import is_truncated
from grpo_kit.models.conversation import Conversation
from grpo_kit.models.drawing import DrawRequest
from grpo_kit.models.turns import contexts_drawn_again, turn_columns
from grpo_kit.rewards.loading import reward_record
from grpo_kit.rollout import Rollout, Samples, picture_prompts
from grpo_kit.runs.checkpoint import newest_checkpoint
from grpo_kit.runs.folder import first_difference
from grpo_kit.runs.own_rewards import changed_rewards
from grpo_kit.runs.record import metrics_lines, read_origin, refuse_branch_without_checkpoint
from grpo_kit.training.difference import Comparison, compare_line
from grpo_kit.training.iteration import prompts_of, rewarded, rollout_seed, run_iteration
from grpo_kit.training.loop import log_line, restore

logger = logging.getLogger(__name__)
# columns of a kept rollout that a step on it needs
NEEDED = "group_id user_prompt category difficulty enhanced_prompt image_seed completion_ids old_logprobs".split()


class ReplayError(KitError):
    """An iteration that cannot be computed again."""


def own_experiment(run_dir: Path, kit: Experiment | None) -> Experiment:
    """The run's experiment, loaded as its config says, or the one given, if it is the run's.

    Raises:
        KitError: the one given has other settings, or the rewards are not the run's.
    """
    config = load_config(run_dir)
    if difference := changed_rewards(run_dir, reward_record(config) if kit is None else kit.rewards.record()):
        logger.warning("run %s: %s", run_dir, difference)
    if kit is None:
        return load_experiment(config)
    if difference := first_difference(config.to_dict(), kit.config.to_dict()):
        raise ReplayError(f"run {run_dir}: {difference}. Give the run's own experiment, or none")
    return kit


def require_iteration(run_dir: Path, iteration: int) -> None:
    """Raise `ReplayError` where the run did not come so far, or the iteration is that of a branch's parent."""
    origin, last = read_origin(run_dir), len(metrics_lines(run_dir))
    first = 1 if origin is None else origin.iteration + 1
    if first <= iteration <= last:
        return
    allowed = f"{first} to {last}" if last >= first else "none yet"
    advice = "Choose one, or train on" if origin is None else f"Earlier ones are in its parent, {origin.parent}"
    raise ReplayError(f"iteration: found {iteration}, allowed in run {run_dir.resolve().name}: {allowed}. {advice}")


def copied_state(kit: Experiment, optimizer: torch.optim.Optimizer) -> dict[str, dict | list]:
    """A copy of all that a step changes, by the names that a replay shows."""
    state = {
        "weights": kit.policy.trainable_state(),
        "optimizer": optimizer.state_dict()["state"],
        "optimizer's settings": optimizer.state_dict()["param_groups"],
        "rewards' statistics": kit.rewards.state_dict(),
    }
    return copy.deepcopy(state)


def put_back(kit: Experiment, optimizer: torch.optim.Optimizer, state: dict[str, dict | list]) -> None:
    """Bring policy, optimizer and rewards to a state that `copied_state` gave."""
    weights, moments, settings, statistics = copy.deepcopy(state).values()
    kit.policy.load_trainable_state(weights)
    optimizer.load_state_dict({"state": moments, "param_groups": settings})
    kit.rewards.load_state_dict(statistics)


def restore_after(
    kit: Experiment, optimizer: torch.optim.Optimizer, run_dir: Path, iteration: int, *, progress: bool = False
) -> tuple[int | None, list[str], list[Comparison]]:
    """Put the kit where an iteration left it: at the newest whole checkpoint up to it, and then step by step in memory.

    Args:
        kit: at the run's start, if there is no such checkpoint.

    Returns:
        The checkpoint's iteration, None where there is none; why newer ones were skipped; each line of metrics.jsonl
        that was computed beside its record.

    Raises:
        KitError: there is no such checkpoint, and the run is a branch, whose start is not in its config.
    """
    checkpoint, skipped = newest_checkpoint(run_dir / "checkpoints", iteration)
    if checkpoint is None:
        refuse_branch_without_checkpoint(run_dir)
    restore(kit, optimizer, checkpoint)
    start = None if checkpoint is None else checkpoint.iteration
    lines, missing, compared = metrics_lines(run_dir), range((start or 0) + 1, iteration + 1), []
    for number in tqdm(missing, desc="replay", unit="it", disable=not progress or not missing):
        metrics = log_line(kit, number, *run_iteration(kit, optimizer, number))
        compared += compare_line(f"iteration {number}", lines[number - 1], metrics, as_one=True)
    return start, skipped, compared


def read_rollout(place: Path) -> dict[str, list]:
    """The columns of a kept rollout, a row a sample, in plain values; a `ReplayError` where the file is damaged."""
    try:
        return pyarrow.parquet.read_table(place).to_pydict()
    except Exception as error:  # flipped bits were seen to raise a dozen kinds, from KeyError to ArrowException
        raise ReplayError(f"not a rollout's table ({type(error).__name__}: {error})") from error


def recorded_rollout(kit: Experiment, columns: dict[str, list], iteration: int) -> Rollout:
    """A rollout without pictures from its columns; rewards are made anew, so that running statistics take them in.

    A `ReplayError` where a column is missing, or holds what no rollout has.
    """
    _require_rollout(columns, kit)
    generation = kit.config.generation_settings
    texts = zip(*(columns[name] for name in TEXTS), strict=True)
    recorded = [Prompt(*row) for row in dict(zip(columns["group_id"], texts, strict=True)).values()]
    rows = len(columns["group_id"])
    attempts = dict(zip(columns["group_id"], columns.get("attempt") or [0] * rows, strict=True))
    shown = list(dict(zip(columns["group_id"], columns.get("pictures") or [""] * rows, strict=True)).values())
    ids = _padded(columns["completion_ids"], torch.int64, kit.policy.tokenizer.pad_token_id)
    mask = _padded([[True] * len(row) for row in columns["completion_ids"]], torch.bool, False)
    prompts = prompts_of(kit, iteration, list(attempts.values())[:: generation.turns])
    prompts = [prompt for prompt in prompts for _ in range(generation.turns)]
    changed = any(shown) and shown != [pictures_digest(prompt) for prompt in prompts]
    if changed or [replace(prompt, metadata={}, images=()) for prompt in prompts] != recorded:  # another prompt file
        if any(shown) or any(prompt.images for prompt in prompts):
            raise ReplayError("found other prompts with pictures than the run's; give it its own prompt file again")
        prompts = recorded  # what they say is all that a step without pictures needs
    samples = Samples(
        prompts=prompts,
        group_ids=torch.tensor(columns["group_id"]),
        completion_ids=ids,
        completion_mask=mask,
        enhanced_prompts=columns["enhanced_prompt"],
        images=[[None] for _ in ids],
        image_seeds=torch.tensor(columns["image_seed"])[:, None],
        reward_parts={
            name.removeprefix("reward/"): _tensor(values, torch.float64)
            for name, values in columns.items()
            if name.startswith("reward/")
        },
        old_logprobs=_padded(columns["old_logprobs"], torch.float32, 0.0),
        truncated=is_truncated(ids, mask, kit.policy.eos_token_ids),
        unmatched=kit.policy.prompt_parts(ids, mask)[1],
        attempts=torch.tensor(list(attempts.values())) if "attempt" in columns else None,
    )
    return rewarded(kit, _with_contexts(kit, samples, list(attempts.values()), iteration))


def _with_contexts(kit: Experiment, samples: Samples, attempts: list[int], iteration: int) -> Samples:
    """The samples with what the policy read, where that was more than words: a run does not keep those pictures."""
    generation, models = kit.config.generation_settings, kit.config.model_settings
    T, prompts = generation.turns, samples.prompts[:: generation.turns]
    if T == 1 and not models.use_image and not any(prompt.images for prompt in prompts):
        return samples
    size = len(samples.group_ids) // len(samples.prompts)
    rows = [row for row, group in enumerate(samples.group_ids.tolist()) if group % T == 0]
    asked = [prompts[row // (size * T)] for row in rows]
    request = DrawRequest(
        [prompt.user_prompt for prompt in asked],
        [],
        torch.arange(len(prompts)).repeat_interleave(size),
        samples.image_seeds[rows],
        [prompt.metadata for prompt in asked],
    )
    with kit.generator.steps(generation.rollout_steps):
        seen = _drawn_again(kit, prompts, attempts[::T], iteration) if models.use_image else [[]] * len(prompts)
        begun = [Conversation(p.user_prompt, (*p.pictures(), *s)) for p, s in zip(prompts, seen, strict=True)]
        texts = samples.enhanced_prompts
        contexts = contexts_drawn_again(kit.generator, begun, texts, request, T, generation.branches, models.look_at)
    if T == 1:
        return replace(samples, contexts=contexts)
    return replace(samples, contexts=contexts, **turn_columns(texts, len(prompts), T, generation.branches))


def _drawn_again(
    kit: Experiment, prompts: list[Prompt], attempts: list[int], iteration: int
) -> list[list[Image.Image]]:
    """The pictures that the policy saw; of each attempt the groups that were drawn in it, or after it, were part."""
    pictures = []
    for group, (attempt, prompt) in enumerate(zip(attempts, prompts, strict=True)):
        seed = rollout_seed(kit.config.training_settings.seed, iteration, attempt)
        place = sum(number >= attempt for number in attempts[:group])
        pictures.append(picture_prompts(kit.generator, [prompt.user_prompt], seed, place))
    return pictures


def _require_rollout(columns: dict[str, list], kit: Experiment) -> None:
    missing = [name for name in (*NEEDED, *(f"reward/{part}" for part in kit.rewards.parts)) if name not in columns]
    if missing or not columns["group_id"]:
        raise ReplayError(f"no column {', '.join(missing)}" if missing else "no rows")
    groups, ids = list(dict.fromkeys(columns["group_id"])), columns["completion_ids"]
    last = kit.policy.model.get_input_embeddings().num_embeddings - 1
    wrong = {
        "group_id: allowed are 0, 1, … in this order": groups != list(range(len(groups))),
        f"completion_ids: allowed are 0 to {last}": not all(0 <= one <= last for row in ids for one in row),
        "old_logprobs: allowed is one for each id": [*map(len, ids)] != [*map(len, columns["old_logprobs"])],
    }
    if found := [text for text, is_wrong in wrong.items() if is_wrong]:
        raise ReplayError(f"found other values in {found[0]}")


def _padded(rows: list[list], dtype: torch.dtype, padding: float) -> torch.Tensor:
    columns = [_tensor(row, dtype) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=padding)


def _tensor(values: list, dtype: torch.dtype) -> torch.Tensor:
    """NaN for None, as which pandas writes it."""
    return torch.tensor([math.nan if value is None else value for value in values], dtype=dtype)
