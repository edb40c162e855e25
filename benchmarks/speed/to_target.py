"""How long `tiny` trains until its held-out check reaches 90 %: as the profile draws, and with all denoising steps.

Every fourth iteration the policy's likeliest rewrites of 48 held-out prompts are drawn with all steps, the same for all
runs; that is not counted. A run has reached the target at the first of two such looks in a row that both find it, and
ends there. Each run's looks are kept in a folder of this code's in reports/to_target: what was stopped goes on.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import grpo_kit as gk
from benchmarks.speed.measure import timed
from benchmarks.speed.results import BenchmarkError, Figure, Result, Settings, fingerprint
from benchmarks.studies.budget import keep
from grpo_kit.config import PROJECT_ROOT
from grpo_kit.config.prompts import balanced_batch
from grpo_kit.evaluation.intervals import Interval, t_interval
from grpo_kit.training.iteration import run_iteration
from grpo_kit.training.loop import make_optimizer

TARGET, EVERY, PROMPTS, SEEDS = 0.9, 4, 48, 10
SIDES = {"all steps": {"generation_settings.rollout_steps": None}, "as the profile": {}}
OUT = PROJECT_ROOT / "reports" / "to_target"
COLUMNS = ["iterations", "cpu_seconds"]


def to_target(settings: Settings, out: Path = OUT) -> Result:
    """CPU-seconds to the target by those with all steps, paired by training seed."""
    out = out / str(fingerprint(settings)["code"])
    runs = [(seed, side) for seed in range(2 if settings.quick else SEEDS) for side in SIDES]
    for seed, side in tqdm(runs, desc="runs"):
        place = out / f"{side}_{seed}.parquet"
        if not place.is_file():
            keep(looks_of(SIDES[side], seed), place)
    found = {run: reached(pd.read_parquet(out / f"{run[1]}_{run[0]}.parquet")) for run in runs}
    each = pd.DataFrame(found, index=COLUMNS).T.unstack()
    if each.isna().any().any():
        missed = [f"{side}, seed {seed}" for seed, side in runs if np.isnan(found[seed, side][0])]
        raise BenchmarkError(f"W15: {TARGET:.0%} not reached by: {'; '.join(missed)}")
    figures = []
    for column, unit in zip(COLUMNS, ("", " s"), strict=True):
        logs = np.log(each[column, "as the profile"] / each[column, "all steps"])
        ends = {name: float(np.exp(value)) for name, value in t_interval(logs).to_dict().items()}
        goals = (0.5, 0.33) if column == "cpu_seconds" else (None, None)
        name = f"{column.replace('cpu_', 'CPU-')} to {TARGET:.0%} of the check, by all steps'"
        figures.append(Figure(name, *ends.values(), *goals, more_is_better=False))
        figures += [_figure(f"{column.replace('cpu_', 'CPU-')}, {side}", each[column, side], unit) for side in SIDES]
    cases = [{"seed": seed, "side": side, **dict(zip(COLUMNS, found[seed, side], strict=True))} for seed, side in runs]
    return Result("W15", "training to a target", figures, cases)


def _figure(name: str, values: pd.Series, unit: str) -> Figure:
    found: Interval = t_interval(values)
    return Figure(name, found.mean, found.low, found.high, more_is_better=False, unit=unit)


def looks_of(changes: Mapping[str, object], seed: int) -> pd.DataFrame:
    """A row a look: iterations and CPU-seconds of training until then, and the check. The last two reach the target."""
    config = gk.load_config("tiny", {"training_settings.seed": seed, **changes})
    kit = gk.load_experiment(config)
    optimizer, spent, rows = make_optimizer(kit, config), 0.0, []
    judged = balanced_batch(kit.val_prompts, PROMPTS, 0, 0)
    for iteration in range(1, config.training_settings.num_iterations + 1):
        spent += timed(lambda iteration=iteration: run_iteration(kit, optimizer, iteration)).cpu
        if iteration % EVERY == 0:
            found = gk.evaluate(kit, judged, ("trained",), seeds_per_prompt=1, paraphrases=False)
            rows.append({"iterations": iteration, "cpu_seconds": spent, "check": found.rows["gold"].mean()})
        if len(rows) > 1 and min(row["check"] for row in rows[-2:]) >= TARGET:
            break
    gk.release(kit)
    return pd.DataFrame(rows)


def reached(looks: pd.DataFrame) -> tuple[float, ...]:
    """Iterations and CPU-seconds at the first of two looks in a row that find the target; NaN where none do."""
    found = looks["check"].to_numpy() >= TARGET
    at = np.flatnonzero(found[:-1] & found[1:])
    return tuple(looks.iloc[at[0]][COLUMNS]) if len(at) else (float("nan"),) * 2
