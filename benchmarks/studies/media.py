"""Does it learn in other media, and is a gamed reward found there? Several training seeds on a small world.

As `benchmarks.studies.learning`, with a control on random rewards; then two arms more: *game* rewards what a dull
medium satisfies as well (the mean of CLIP over frames, which a still satisfies; loudness), *mended* has a check of it.
`python -m benchmarks.studies.media --world moving` writes `reports/media/moving/` and prints two tables.
"""

import json
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

import grpo_kit as gk
from benchmarks.studies import hacking, learning
from grpo_kit.config import PROJECT_ROOT
from grpo_kit.evaluation.intervals import t_interval

PROFILES = {"moving": "tiny_video", "tones": "tiny_audio"}
ARMS = {
    "moving": {
        "game": {
            "reward_settings.weights": {"clip_frames": 1.0},
            "reward_settings.monitors": ["gold", "motion"],
            "evaluation_settings.held_out": "motion",
        },
        "mended": {
            "reward_settings.weights": {"clip_frames": 1.0, "motion": 4.0},
            "reward_settings.monitors": ["gold"],
        },
    },
    "tones": {
        "game": {
            "reward_settings.weights": {"loudness": 1.0},
            "reward_settings.monitors": ["gold", "clap_similarity"],
        },
        "mended": {
            "reward_settings.weights": {"clap_similarity": 1.0},
            "reward_settings.monitors": ["gold", "loudness"],
        },
    },
}
STOPPING = {
    "training_settings.stop_on_divergence": True,
    "training_settings.validate_every": 10,
    "training_settings.save_every": 10,
}


def main(
    world: Annotated[str, typer.Option(help=f"one of {', '.join(PROFILES)}")] = "moving",
    seeds: Annotated[int, typer.Option(help="how many training seeds of each arm")] = 3,
    first: Annotated[int, typer.Option(help="the first training seed")] = 0,
    controls: Annotated[int, typer.Option(help="how many seeds to train on random rewards")] = 1,
    iterations: Annotated[int, typer.Option(help="of a run of the arms that is not stopped")] = 60,
    out: Annotated[Path, typer.Option(help="where the runs and tables go")] = PROJECT_ROOT / "reports" / "media",
    threads: Annotated[int, typer.Option(help="of torch; 0 leaves its default")] = 0,
) -> None:
    """Train, compare and game; a stopped measurement goes on where it was."""
    if threads:
        torch.set_num_threads(threads)
    out, profile = out / world, PROFILES[world]
    for seed in range(first, first + seeds):
        learning.measure(out / f"seed_{seed}", profile, seed, random_rewards=False)
        if seed < first + controls:
            learning.measure(out / f"random_rewards_{seed}", profile, seed, random_rewards=True)
    for seed in range(first, first + seeds):
        for arm, settings in ARMS[world].items():
            run = {"training_settings.seed": seed, "training_settings.num_iterations": iterations}
            hacking.measure(out / f"{arm}_{seed}", gk.load_config(profile, STOPPING | settings | run))
    for name, table in {"learning": compared(out), "arms": gamed(out, list(ARMS[world]))}.items():
        table.to_json(out / f"{name}.json", orient="records", indent=2)
        typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep=""))


def compared(out: Path) -> pd.DataFrame:
    """Each run's variants on held-out prompts, a row each with intervals over prompts; then means over seeds."""
    found = []
    for place in sorted(out.glob("*/final_results.json")):
        variants = json.loads(place.read_text(encoding="utf-8"))["variants"]
        for variant, metrics in variants.items():
            for metric in ("reward", "gold"):
                found.append({"run": place.parent.name, "variant": variant, "metric": metric, **metrics[metric]})
    table = pd.DataFrame(found)
    if table.empty:
        return table
    keys = [table["run"].str.replace(r"_\d+$", "", regex=True) + ", all", table["variant"], table["metric"]]
    pooled = [
        dict(zip(("run", "variant", "metric"), key, strict=True)) | t_interval(group).to_dict()
        for key, group in table.groupby(keys, sort=False)["mean"]
    ]
    return pd.concat([table, pd.DataFrame(pooled)], ignore_index=True)


def gamed(out: Path, arms: list[str]) -> pd.DataFrame:
    """The arms' runs: `hacking.row` of each."""
    return pd.DataFrame([hacking.row(arm, file) for arm in arms for file in sorted(out.glob(f"{arm}_*/sentinel.json"))])


if __name__ == "__main__":
    typer.run(main)
