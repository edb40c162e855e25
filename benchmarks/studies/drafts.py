"""How many denoising steps are enough while training? Held-out checks at full quality, several training seeds each.

An arm is `steps` or `steps-beta`: training draws with so many steps (`generation_settings.rollout_steps`), `beta` is
the weight of the KL term. The last policy's likeliest rewrites of held-out prompts are drawn with all steps.
`python -m benchmarks.studies.drafts` writes `reports/drafts/`: scores and CPU-seconds of each run, runs.jsonl with a
line for each, and table.json. A stopped measurement goes on with the first run that is missing. docs/drafts.jsonl is
runs.jsonl of the measurement that docs/training.md shows.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

import grpo_kit as gk
from benchmarks.studies.budget import measure_missing, per_run
from grpo_kit.config import PROJECT_ROOT, Config
from grpo_kit.evaluation.intervals import t_interval
from grpo_kit.experiment import Experiment

ARMS = "8,4,3,2"
METRICS = ["reward", "reward/gold", "reward/keeps_objects", "reward/grammatical"]


def main(
    seeds: Annotated[int, typer.Option(min=1, help="training seeds of each arm")] = 10,
    arms: Annotated[str, typer.Option(help="denoising steps in training, '2-0.1' with another beta")] = ARMS,
    profile: Annotated[str, typer.Option(help="a profile of the embedded world")] = "tiny",
    out: Annotated[Path, typer.Option(help="where scores and the table go")] = PROJECT_ROOT / "reports" / "drafts",
) -> None:
    """Train and evaluate what is missing, seed by seed so that a stopped measurement is balanced; print the table."""
    for _ in measure_missing(out, arms.split(","), seeds, partial(configured, profile), scored):
        each = runs(out)
        each.round(6).reset_index().to_json(out / "runs.jsonl", orient="records", lines=True)
        table = results(each)
        table.to_json(out / "table.json", orient="records", indent=2)
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep=""))


def configured(profile: str, arm: str, seed: int) -> Config:
    """The settings of one run."""
    steps, _, beta = arm.partition("-")
    changes = {"training_settings.seed": seed, "generation_settings.rollout_steps": int(steps)}
    return gk.load_config(profile, changes | ({"training_settings.beta": float(beta)} if beta else {}))


def scored(kit: Experiment) -> pd.DataFrame:
    """Scores of the last policy's likeliest rewrites of held-out prompts."""
    rows = gk.evaluate(kit, None, ("trained",), paraphrases=False).rows
    return rows[["prompt_id", "user_prompt", "text", "seed", *METRICS]]


def runs(out: Path) -> pd.DataFrame:
    """A row a run: mean scores, CPU-seconds, how many rewrites leave the grammar, and of these repeat a part."""
    each = per_run(out, [*METRICS, "cpu_seconds"])
    for arm, seed in each.index:
        rewrites = pd.read_parquet(out / f"{arm}_{seed}.parquet").drop_duplicates("prompt_id")
        outside = rewrites.loc[rewrites["reward/grammatical"] < 1, "text"]
        parts = [[part.strip() for part in text.split(",")] for text in outside]
        counts = {"rewrites": len(rewrites), "outside": len(outside)}
        counts["repeating"] = sum(len(some) > len(set(some)) for some in parts)
        each.loc[(arm, seed), list(counts)] = list(counts.values())
    return each.astype({"rewrites": int, "outside": int, "repeating": int})


def results(each: pd.DataFrame) -> pd.DataFrame:
    """A row an arm: means over training seeds with t-intervals, CPU-seconds, and gold less that of all steps."""
    each = each[[*METRICS, "cpu_seconds"]]
    full, table = each["reward/gold"].get("8", pd.Series(dtype=float)), []
    for arm, scores in each.groupby("arm"):
        scores = scores.droplevel("arm")
        paired = (scores["reward/gold"] - full).dropna().rename("gold less 8 steps'")
        row: dict[str, object] = {"arm": arm, "training seeds": len(scores)}
        for values in (*(scores[name] for name in scores), paired):
            found = t_interval(values) if len(values) > 1 else None
            row[str(values.name)] = np.nan if values.empty else values.mean()
            row[f"{values.name} ±"] = (found.high - found.low) / 2 if found else np.nan
        table.append(row)
    return pd.DataFrame(table)


if __name__ == "__main__":
    typer.run(main)
