"""Does it learn? Several training seeds on the embedded world, and a control that is trained on random rewards.

Each seed trains once, then its policy is compared with the initial policy, the raw prompts and the oracle's rewrites on
held-out prompts. `python -m benchmarks.learning --seeds 5` writes `reports/learning/` and prints the table.
"""

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

import grpo_kit as gk
from grpo_kit.config import PROJECT_ROOT
from grpo_kit.experiment import Experiment
from grpo_kit.rewards.composition import Rewards

COMPARE = ("raw", "initial", "trained", "oracle")


def main(
    seeds: Annotated[int, typer.Option(help="how many training seeds")] = 5,
    first: Annotated[int, typer.Option(help="the first training seed")] = 0,
    control: Annotated[bool, typer.Option(help="also train once on random rewards")] = True,
    profile: Annotated[str, typer.Option(help="a profile of the embedded world")] = "tiny",
    out: Annotated[Path, typer.Option(help="where the runs and the table go")] = PROJECT_ROOT / "reports" / "learning",
    threads: Annotated[int, typer.Option(help="of torch; 0 leaves its default")] = 0,
) -> None:
    """Train and compare; a stopped measurement goes on where it was."""
    if threads:
        torch.set_num_threads(threads)
    names = [f"seed_{seed}" for seed in range(first, first + seeds)] + (["random_rewards"] if control else [])
    for name in names:
        seed = 0 if name == "random_rewards" else int(name.removeprefix("seed_"))
        measure(out / name, profile, seed, random_rewards=name == "random_rewards")
    table = pd.DataFrame(
        [row for name in sorted(p.parent.name for p in out.glob("*/final_results.json")) for row in rows(out / name)]
    )
    table.to_json(out / "table.json", orient="records", indent=2)
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


def measure(run_dir: Path, profile: str, seed: int, random_rewards: bool) -> None:
    """Train one seed and evaluate it, unless that was done."""
    if (run_dir / "final_results.json").is_file():
        return
    config = gk.load_config(profile, {"training_settings.seed": seed})
    kit = gk.load_experiment(config)
    gk.train(with_random_rewards(kit) if random_rewards else kit, run_dir)
    trained = gk.load_experiment(config, trained=None if random_rewards else run_dir / "best")
    trained = replace(trained, policy=kit.policy) if random_rewards else trained  # its last weights, not its luckiest
    gk.evaluate(trained, compare=COMPARE, run_dir=run_dir)


def with_random_rewards(kit: Experiment) -> Experiment:
    """The experiment with a reward that knows nothing of the image; everything else is scored but not rewarded."""

    def lottery(images: list, prompts: list[str], enhanced_prompts: list[str]) -> list[float]:
        return [
            zlib.crc32(image.tobytes() + text.encode()) / 2**32
            for image, text in zip(images, enhanced_prompts, strict=True)
        ]

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
    for metric, share in results["gap_closed"].items():
        table.append({"run": run_dir.name, "difference": "gap closed", "metric": metric, "mean": share})
    return table


if __name__ == "__main__":
    typer.run(main)
