"""What the playgrounds of the site show of the recorded run: groups, and one step under five methods.

Every number comes from the kit's own functions. The pages get them as JSON, the pictures as PNG files beside them.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from grpo_kit.grpo import group_advantages, grpo_loss, token_weights
from grpo_kit.runs.record import RunRecord, read_run

RUN = Path(__file__).parents[1] / "data" / "demo_run"
DIGITS = 6  # of what a page only shows
METHODS = {  # name → what stands in the table, settings of `group_advantages`, settings of `grpo_loss`
    "REINFORCE": (
        ("none: the reward itself", "nothing", "none: each update pushes in full", "sum over a rewrite's tokens"),
        None,
        {"loss_type": "luspo"},
    ),
    "PPO": (
        ("the mean of all 32 rewrites", "their standard deviation", "0.8 to 1.2", "mean over all tokens"),
        {"scale_rewards": "group"},
        {"loss_type": "bnpo"},
    ),
    "GRPO": (
        (
            "the group's mean",
            "its standard deviation",
            "0.8 to 1.2",
            "mean over each rewrite's tokens, then over all",
        ),
        {"scale_rewards": "group"},
        {"loss_type": "grpo"},
    ),
    "DAPO": (
        ("the group's mean", "its standard deviation", "0.8 to 1.28", "mean over all tokens"),
        {"scale_rewards": "group"},
        {"loss_type": "dapo", "epsilon_high": 0.28},
    ),
    "Dr. GRPO": (
        ("the group's mean", "nothing", "0.8 to 1.2", "sum over a rewrite's tokens, by the longest that is allowed"),
        {"scale_rewards": "none"},
        {"loss_type": "dr_grpo"},
    ),
}


def write_playgrounds(pages: Path, source: Path, extra: Path) -> None:
    """Write the playgrounds' HTML with their data into `source`, and the pictures that they show into `extra`."""
    record = read_run(RUN)
    data = {"groups": recorded_groups(record, extra / "pictures"), "methods": five_methods(record)}
    source.mkdir(parents=True, exist_ok=True)
    for path in pages.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        if path.stem in data:
            content = json.dumps(data[path.stem], ensure_ascii=False).replace("<", "\\u003c")
            text = f'<script type="application/json" id="data">{content}</script>\n{text}'
        (source / path.name).write_text(text, encoding="utf-8")


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
            "picture": f"pictures/{Path(row['thumbnail']).stem}.png",
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
    told, scaling, settings = METHODS[name]
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
    columns = dict(zip(("baseline", "divided", "clip", "averaged"), told, strict=True))
    per_token = _rounded(1000 * weights.amax(dim=1))
    return {"told": columns, "advantages": _rounded(advantages), "weights": per_token, "moments": moments}


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]
