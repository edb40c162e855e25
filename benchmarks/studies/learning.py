"""Does it learn? Several training seeds on the embedded world, and a control that is trained on random rewards.

Each seed trains once, then its policy is compared with the initial policy, the raw prompts and the oracle's rewrites on
held-out prompts. `python -m benchmarks.studies.learning` writes `reports/learning/` and prints the table.
"""

import json
import zlib
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from PIL import Image

import grpo_kit as gk
from grpo_kit.config import PROJECT_ROOT
from grpo_kit.config.media import KINDS, digest
from grpo_kit.evaluation.intervals import t_interval
from grpo_kit.experiment import Experiment
from grpo_kit.rewards.composition import Rewards
from grpo_kit.runs.folder import RunFolder

COMPARE = ("raw", "initial", "trained", "oracle")


def main(
    seeds: Annotated[int, typer.Option(help="how many training seeds")] = 5,
    first: Annotated[int, typer.Option(help="the first training seed")] = 0,
    controls: Annotated[int, typer.Option(help="how many seeds to train on random rewards")] = 5,
    profile: Annotated[str, typer.Option(help="a profile of the embedded world")] = "tiny",
    out: Annotated[Path, typer.Option(help="where the runs and the table go")] = PROJECT_ROOT / "reports" / "learning",
    threads: Annotated[int, typer.Option(help="of torch; 0 leaves its default")] = 0,
) -> None:
    """Train and compare; a stopped measurement goes on where it was."""
    if threads:
        torch.set_num_threads(threads)
    for seed in range(first, first + max(seeds, controls)):
        if seed < first + seeds:
            measure(out / f"seed_{seed}", profile, seed, random_rewards=False)
        if seed < first + controls:
            measure(out / f"random_rewards_{seed}", profile, seed, random_rewards=True)
    finished = sorted(place.parent for place in out.glob("*/final_results.json"))
    table = pd.DataFrame([row for run_dir in finished for row in rows(run_dir)])
    table = pd.concat([table, pooled(table)], ignore_index=True)
    table.to_json(out / "table.json", orient="records", indent=2)
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep=""))


def measure(run_dir: Path, profile: str, seed: int, random_rewards: bool) -> None:
    """Train one seed and evaluate its `best/`, unless that was done.

    A control is judged by its last weights: to choose among them by a score would be to learn from that score. And by
    the profile's rewards, not its own: so its results are written here, and not by an evaluation of its run.
    """
    if (run_dir / "final_results.json").is_file():
        return
    config = gk.load_config(profile, {"training_settings.seed": seed})
    kit = gk.load_experiment(config)
    gk.train(with_random_rewards(kit) if random_rewards else kit, run_dir)
    judged = kit if random_rewards else gk.load_experiment(config, trained=run_dir / "best")
    result = gk.evaluate(judged, compare=COMPARE, run_dir=None if random_rewards else run_dir)
    if random_rewards:  # the others' was written by the evaluation
        RunFolder(run_dir).write_json("final_results.json", result.results)


def with_random_rewards(kit: Experiment) -> Experiment:
    """The experiment with a reward that knows nothing of the image; everything else is scored but not rewarded."""

    def lottery(images: list, prompts: list[str], enhanced_prompts: list[str]) -> list[float]:
        raw = [image.tobytes() if isinstance(image, Image.Image) else digest(image).encode() for image in images]
        return [zlib.crc32(one + text.encode()) / 2**32 for one, text in zip(raw, enhanced_prompts, strict=True)]

    lottery.media = tuple(KINDS)
    watched = {**kit.rewards.parts, **kit.rewards.monitors}
    return kit.with_rewards(Rewards(parts={"random": lottery}, weights={"random": 1.0}, monitors=watched))


def rows(run_dir: Path) -> list[dict[str, object]]:
    """The run's differences in reward and gold, one row each, with intervals and whether they exclude 0."""
    results = json.loads((run_dir / "final_results.json").read_text())
    table = []
    for name, metrics in results["differences"].items():
        for metric in ("reward", "gold"):
            found = metrics[metric]
            table.append(
                {"run": run_dir.name, "difference": name, "metric": metric, **found, "above 0": found["low"] > 0}
            )
    logged = pd.read_json(run_dir / "metrics.jsonl", lines=True)
    for metric, name in (("reward", "clip_similarity"), ("gold", "gold")):
        scores = logged[f"rewards/{name}/mean"]  # of sampled rewrites: the evaluation's are the likeliest ones
        change = scores.tail(30).mean() - scores.head(30).mean()
        table.append({"run": run_dir.name, "difference": "sampled, last-first 30", "metric": metric, "mean": change})
    for metric, share in results["gap_closed"].items():
        table.append({"run": run_dir.name, "difference": "gap closed", "metric": metric, "mean": share})
    return table


def pooled(table: pd.DataFrame) -> pd.DataFrame:
    """Means over training seeds with 95 % t-intervals, of the real runs and of the controls."""
    table = table.assign(run=table["run"].str.replace(r"_\d+$", "", regex=True) + ", all")
    lines = []
    for (run, difference, metric), group in table.groupby(["run", "difference", "metric"], sort=False):
        found = t_interval(group["mean"]).to_dict()
        lines.append({"run": run, "difference": difference, "metric": metric, **found})
    return pd.DataFrame(lines)


if __name__ == "__main__":
    typer.run(main)
