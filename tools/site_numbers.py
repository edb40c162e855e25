"""What the playgrounds of the site show of the recorded run: groups, and one step under five methods.

Every number comes from the kit's own functions. The pages get them as JSON, the pictures as PNG files beside them.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from grpo_kit.grpo import group_advantages, grpo_loss, token_weights
from grpo_kit.runs.record import RunRecord, read_run
from tools.site_words import rendered

RUN = Path(__file__).parents[1] / "data" / "demo_run"
DIGITS = 6  # of what a page only shows
METHODS = {  # name → settings of `group_advantages`, settings of `grpo_loss`; methods.md says them in words
    "REINFORCE": (None, {"loss_type": "luspo"}),
    "PPO": ({"scale_rewards": "group"}, {"loss_type": "bnpo"}),
    "GRPO": ({"scale_rewards": "group"}, {"loss_type": "grpo"}),
    "DAPO": ({"scale_rewards": "group"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "Dr. GRPO": ({"scale_rewards": "none"}, {"loss_type": "dr_grpo"}),
}


def write_playgrounds(pages: Path, source: Path, extra: Path) -> None:
    """Write the playgrounds with their data into `source`, in Korean into its `ko`, and their pictures into `extra`."""
    record = read_run(RUN)
    pictures = extra / "playgrounds" / "pictures"
    data = {"groups": recorded_groups(record, pictures), "methods": five_methods(record)}
    for language, folder, root in (("en", source, ".."), ("ko", source / "ko", "../..")):
        (folder / "playgrounds").mkdir(parents=True, exist_ok=True)
        for path in pages.glob("*.html"):
            text = rendered(path, language, root=root, data=data.get(path.stem))
            (folder / "playgrounds" / path.name).write_text(text, encoding="utf-8")


def recorded_groups(record: RunRecord, pictures: Path) -> list[dict]:
    """Return the groups of some iterations, each with its samples in the order of sampling; write their pictures."""
    pictures.mkdir(parents=True, exist_ok=True)
    groups = []
    kept = record.rollout_iterations
    for iteration in sorted({*kept[:2], kept[len(kept) // 2], kept[-1]}):
        for _, rows in record.rollout(iteration).groupby("group_id"):
            groups.append({"iteration": iteration, "prompt": rows["user_prompt"].iloc[0], "samples": _samples(rows)})
            for name in rows["thumbnail"]:
                with Image.open(RUN / name) as image:
                    image.save(pictures / f"{Path(name).stem}.png")
    return groups


def _samples(rows: pd.DataFrame) -> list[dict]:
    return [
        {
            "text": row["enhanced_prompt"],
            "picture": f"{Path(row['thumbnail']).stem}.png",
            "reward": row["reward"],
            "advantage": row["advantage"],
            "gold": row["reward/gold"],
            "tokens": len(row["completion_ids"]),
        }
        for row in rows.to_dict("records")
    ]


def five_methods(record: RunRecord) -> dict:
    """Return one recorded step as five methods would take it, at the start of its first and of its second update."""
    iteration = record.rollout_iterations[1]
    rows = record.rollout(iteration)
    longest = record.config["generation_settings"]["max_new_tokens"]
    methods = [{"name": name, **_method(rows, name, longest)} for name in METHODS]
    groups = [
        {"prompt": group["user_prompt"].iloc[0], "rows": group.index.tolist(), "samples": _samples(group)}
        for _, group in rows.groupby("group_id")
    ]
    return {"iteration": iteration, "groups": groups, "methods": methods}


def _method(rows: pd.DataFrame, name: str, longest: int) -> dict:
    """Advantages, a token's weights; at both moments pushes, shares of the whole, and tokens that the clip holds."""
    scaling, settings = METHODS[name]
    rewards, groups = torch.tensor(rows["reward"].to_numpy(float)), torch.tensor(rows["group_id"].to_numpy())
    groups = torch.zeros_like(groups) if name == "PPO" else groups
    advantages = rewards if scaling is None else group_advantages(rewards, groups, **scaling)
    old, new = (
        pad_sequence([torch.tensor(np.asarray(row, dtype=float)) for row in rows[column]], batch_first=True)
        for column in ("old_logprobs", "new_logprobs")
    )
    mask = torch.arange(old.shape[1]) < torch.tensor(rows["completion_ids"].map(len).to_numpy()).unsqueeze(1)
    weights = token_weights(mask, settings["loss_type"], longest).double()
    moments = []
    for logprobs in (old, new):
        logprobs = logprobs.clone().requires_grad_()
        sampled_by = logprobs.detach() if scaling is None else old  # REINFORCE has no ratio
        output = grpo_loss(logprobs, advantages, mask, old_logprobs=sampled_by, weights=weights, **settings)
        (gradient,) = torch.autograd.grad(output.loss, logprobs)
        held = mask & (gradient == 0) & (advantages != 0).unsqueeze(1)
        pushes = -gradient.sum(dim=1)
        moments.append(
            {
                "loss": round(output.loss.item(), DIGITS),
                "pushes": _rounded(pushes),
                "shares": _rounded(100 * pushes / pushes.abs().sum()),
                "held": held.sum(dim=1).tolist(),
            }
        )
    per_token = _rounded(1000 * weights.amax(dim=1))
    return {"advantages": _rounded(advantages), "weights": per_token, "moments": moments}


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]
