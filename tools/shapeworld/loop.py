"""One resumable training loop for all embedded models: seeded by step, saved as it goes, continued after a stop."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from grpo_kit.config.seeds import derive_seed


@dataclass
class Recipe:
    """What to train and for how long; `parts` are saved, averaged (EMA) and handed back by name."""

    name: str
    parts: dict[str, nn.Module]
    steps: int
    learning_rate: float
    loss: Callable[[int], torch.Tensor]  # step → loss of one batch; draws only from torch's and its own seeded streams
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    weight_decay: float = 0.01
    ema_decay: float | None = None
    seed: int = 0
    save_every: int = 250
    stop: int | None = None  # the step before which it ends, with the learning rate still high: another recipe goes on


@dataclass(frozen=True)
class Outcome:
    """How a recipe ended: the last losses' mean and the minutes spent, stops not counted."""

    loss: float
    minutes: float


def train_recipe(recipe: Recipe, work: Path) -> Outcome:
    """Run a recipe to its end, continuing from `work/<name>.pt`; the parts end with averaged weights, if any."""
    parameters = [p for part in recipe.parts.values() for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=recipe.warmup
    )
    average = [p.detach().clone() for p in parameters] if recipe.ema_decay else None
    place = work / f"{recipe.name}.pt"
    state = _load(place, recipe, optimizer, schedule, average)
    started, minutes, losses = time.monotonic(), state["minutes"], state["losses"]
    end = recipe.stop or recipe.steps
    bar = tqdm(range(state["step"], end), initial=state["step"], total=end, desc=recipe.name, mininterval=5)
    for step in bar:
        torch.manual_seed(derive_seed(recipe.seed, recipe.name, step))
        loss = recipe.loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if average:
            decay = min(recipe.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        losses = [*losses[-99:], float(loss.detach())]
        if (step + 1) % recipe.save_every == 0 or step + 1 == end:
            minutes = state["minutes"] + (time.monotonic() - started) / 60
            _save(place, recipe, optimizer, schedule, average, {"step": step + 1, "minutes": minutes, "losses": losses})
            bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
    if average:
        with torch.no_grad():
            torch._foreach_copy_(parameters, average)
    return Outcome(sum(losses) / max(1, len(losses)), minutes)


def _load(place: Path, recipe: Recipe, optimizer, schedule, average) -> dict:
    if not place.is_file():
        return {"step": 0, "minutes": 0.0, "losses": []}
    saved = torch.load(place, weights_only=True)
    for name, part in recipe.parts.items():
        part.load_state_dict(saved["parts"][name])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    if average:
        torch._foreach_copy_(average, saved["average"])
    return saved["progress"]


def _save(place: Path, recipe: Recipe, optimizer, schedule, average, progress: dict) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    half_written = place.with_suffix(".tmp")
    state = {
        "parts": {name: part.state_dict() for name, part in recipe.parts.items()},
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "average": average,
        "progress": progress,
    }
    torch.save(state, half_written)
    os.replace(half_written, place)
    place.with_suffix(".json").write_text(json.dumps({**progress, "losses": progress["losses"][-1:]}), encoding="utf-8")
