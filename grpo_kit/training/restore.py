"""The state of a run after any of its iterations, computed again from a checkpoint or from its start."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from grpo_kit.config import KitError, load_config
from grpo_kit.config.prompts import Prompt
from grpo_kit.config.seeds import derive_seed
from grpo_kit.experiment import Experiment, load_experiment
from grpo_kit.rollout import Rollout, picture_prompts
from grpo_kit.runs.checkpoint import CheckpointError, load_checkpoint
from grpo_kit.runs.folder import first_difference
from grpo_kit.runs.iterations import checkpoints_of
from grpo_kit.runs.origin import read_origin
from grpo_kit.training.loop import restore

# columns of a kept rollout that a step on it needs
NEEDED = "group_id user_prompt category difficulty enhanced_prompt image_seed completion_ids old_logprobs".split()


class ReplayError(KitError):
    """An iteration that cannot be computed again."""


def own_experiment(run_dir: Path, kit: Experiment | None) -> Experiment:
    """The run's experiment, loaded as its config says, or the one given, if it is the run's.

    Raises:
        ReplayError: the one given has other settings.
    """
    config = load_config(run_dir)
    if kit is None:
        return load_experiment(config)
    difference = first_difference(config.to_dict(), kit.config.to_dict())
    if difference:
        raise ReplayError(f"run {run_dir}: {difference}. Give the run's own experiment, or none")
    return kit


def require_iteration(run_dir: Path, iteration: int, last: int) -> None:
    """Say which iterations, up to the last one logged, can be computed again.

    Raises:
        ReplayError: the run did not come so far, or the iteration is that of a branch's parent.
    """
    origin = read_origin(run_dir)
    first = 1 if origin is None else origin.iteration + 1
    if first <= iteration <= last:
        return
    allowed = f"{first} to {last}" if last >= first else "none yet"
    advice = (
        "Choose one of these, or train on" if origin is None else f"Earlier ones are in its parent, {origin.parent}"
    )
    raise ReplayError(f"iteration: found {iteration}, allowed in run {run_dir.resolve().name}: {allowed}. {advice}")


# --- the state before an iteration ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """A copy of all that a step changes."""

    weights: dict[str, torch.Tensor]
    optimizer: dict
    rewards: dict[str, torch.Tensor]

    @classmethod
    def of(cls, kit: Experiment, optimizer: torch.optim.Optimizer) -> "State":
        """Copy the trained weights, the optimizer's state and the rewards'."""
        weights = {name: value.detach().clone() for name, value in _trained(kit).items()}
        return cls(weights, copy.deepcopy(optimizer.state_dict()), copy.deepcopy(kit.rewards.state_dict()))

    @torch.no_grad()
    def put_back(self, kit: Experiment, optimizer: torch.optim.Optimizer) -> None:
        """Bring policy, optimizer and rewards to this state."""
        for name, parameter in _trained(kit).items():
            parameter.copy_(self.weights[name])
        optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        kit.rewards.load_state_dict(self.rewards)

    @property
    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's state as named tensors."""
        states = self.optimizer["state"].items()
        return {f"{key}.{name}": torch.as_tensor(value) for key, state in states for name, value in state.items()}


def _trained(kit: Experiment) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in kit.policy.model.named_parameters() if value.requires_grad}


def restore_newest(
    kit: Experiment, optimizer: torch.optim.Optimizer, run_dir: Path, iteration: int
) -> tuple[int | None, list[str]]:
    """Put the kit where the newest whole checkpoint up to an iteration left it.

    Returns:
        The checkpoint's iteration, None where there is none and the kit stays at its start; and what was passed over.

    Raises:
        ReplayError: there is none, and the run is a branch, whose start is not in its config.
    """
    skipped = []
    for number, place in reversed(checkpoints_of(run_dir / "checkpoints").items()):
        if number > iteration:
            continue
        try:
            checkpoint = load_checkpoint(place)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        restore(kit, optimizer, checkpoint)
        return checkpoint.iteration, skipped
    origin = read_origin(run_dir)
    if origin is not None:
        raise ReplayError(
            f"run {run_dir}: a branch without a whole checkpoint up to iteration {iteration}, and its start is not in "
            f"its config. Branch again from {origin.parent}, or choose a later iteration"
        )
    restore(kit, optimizer, None)
    return None, skipped


# --- its rollout ------------------------------------------------------------------------------------------------------


def read_rollout(place: Path) -> pd.DataFrame:
    """The table of a kept rollout.

    Raises:
        ReplayError: the file is damaged.
    """
    try:
        table = pd.read_parquet(place)
        table.to_dict("list")  # decodes every text, which pandas puts off
        return table
    except Exception as error:  # flipped bits were seen to raise a dozen kinds, from KeyError to ArrowException
        raise ReplayError(f"not a rollout's table ({type(error).__name__}: {error})") from error


def recorded_rollout(kit: Experiment, table: pd.DataFrame, iteration: int) -> Rollout:
    """A rollout as its step needs it, from the table that `RunFolder.save_rollout` wrote: all but the pictures.

    What the step learns from is made of the recorded scores again, so that running statistics take them in.

    Args:
        table: a row a sample, group-major.

    Raises:
        ValueError: a column is missing, or holds what no rollout has.
    """
    parts = {name[7:]: torch.tensor(table[name].to_numpy()) for name in table if name.startswith("reward/")}
    _require_rollout(table, kit.policy.model.get_input_embeddings().num_embeddings, kit.rewards.parts.keys() - parts)
    prompts = [Prompt(*row) for row in table.drop_duplicates("group_id")[NEEDED[1:4]].itertuples(index=False)]
    ids = _padded(table["completion_ids"], torch.int64, kit.policy.tokenizer.pad_token_id)
    lengths = torch.tensor(table["completion_ids"].map(len).to_numpy())
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    group_ids = torch.tensor(table["group_id"].to_numpy())
    return Rollout(
        prompts=prompts,
        group_ids=group_ids,
        completion_ids=ids,
        completion_mask=mask,
        enhanced_prompts=list(table["enhanced_prompt"]),
        images=[[None] for _ in ids],
        image_seeds=torch.tensor(table["image_seed"].to_numpy())[:, None],
        reward_parts=parts,
        rewards=kit.rewards.combined(parts, group_ids),
        totals=kit.rewards.total(parts) if kit.rewards.is_shaped else None,
        old_logprobs=_padded(table["old_logprobs"], torch.float32, 0.0),
        truncated=~(torch.isin(ids, torch.tensor(kit.policy.eos_token_ids)) & mask).any(dim=1),
        prompt_images=_seen(kit, prompts, iteration),
    )


def _require_rollout(table: pd.DataFrame, vocabulary: int, unscored: set[str]) -> None:
    missing = [name for name in NEEDED if name not in table] + [f"reward/{name}" for name in sorted(unscored)]
    if missing or not len(table):
        raise ValueError(f"no column {', '.join(missing)}" if missing else "no rows")
    if (pd.factorize(table["group_id"])[0] != table["group_id"]).any():
        raise ValueError(f"group_id: found {table['group_id'].tolist()!r:.80}, allowed: 0, 1, … in this order")
    ids = table["completion_ids"].explode()
    if not ids.between(0, vocabulary - 1).all():
        raise ValueError(f"completion_ids: found {ids.min()} to {ids.max()}, allowed: 0 to {vocabulary - 1}")
    if (table["completion_ids"].map(len) != table["old_logprobs"].map(len)).any():
        raise ValueError("old_logprobs: found other lengths than completion_ids has, allowed: one a token")


def _padded(rows: pd.Series, dtype: torch.dtype, padding: float) -> torch.Tensor:
    columns = [torch.tensor(list(row), dtype=dtype) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=padding)


def _seen(kit: Experiment, prompts: list[Prompt], iteration: int) -> list | None:
    """The pictures that the policy looked at, drawn again: a run does not keep them."""
    if not kit.config.model_settings.use_image:
        return None
    seed = derive_seed(kit.config.training_settings.seed, "rollout", iteration)
    return picture_prompts(kit.generator, [prompt.user_prompt for prompt in prompts], seed)
