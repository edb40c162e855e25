"""What is a budget of images best spent on? Held-out gold after equal numbers of images, several training seeds each.

Every arm draws the same number of images an iteration and takes the same number of steps; arms differ in how many
prompts, rewrites of each and images of each rewrite that makes, and in whether a group shares its latent seeds.
`python -m benchmarks.studies.budget` writes `reports/budget/`: the scores of each run and table.json. A stopped
measurement goes on with the first run that is missing.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer

import grpo_kit as gk
from benchmarks.speed.measure import Seconds, timed
from grpo_kit.config import PROJECT_ROOT, Config
from grpo_kit.evaluation.intervals import pooled_interval
from grpo_kit.experiment import Experiment
from grpo_kit.training.iteration import run_iteration
from grpo_kit.training.loop import make_optimizer

DEFAULT = "4x8x1"
ARMS = ("4x8x1", "2x2x8", "4x8x1-own", "8x4x1", "16x2x1", "2x16x1", "2x4x4", "2x4x4-own")  # prompts, rewrites, images
EVALUATED = 96  # held-out prompts
COLUMNS = ["prompt_id", "user_prompt", "variant", "seed", "reward", "gold"]
SETTINGS = {"generation_settings.num_inference_steps": 4}  # half the profile's: pictures are most of the time


def main(
    seeds: Annotated[int, typer.Option(min=1, help="training seeds of each arm")] = 3,
    iterations: Annotated[int, typer.Option(min=1, help="of a run")] = 40,
    arms: Annotated[str, typer.Option(help="prompts x rewrites x images, '-own' without common seeds")] = ",".join(
        ARMS
    ),
    profile: Annotated[str, typer.Option(help="a profile of the embedded world")] = "tiny",
    out: Annotated[Path, typer.Option(help="where scores and the table go")] = PROJECT_ROOT / "reports" / "budget",
    threads: Annotated[int, typer.Option(help="of torch; 0 leaves its default")] = 0,
) -> None:
    """Train and evaluate what is missing, seed by seed so that a stopped measurement is balanced; print the table."""
    if threads:
        torch.set_num_threads(threads)
    names = arms.split(",")
    settings = partial(configured, profile, iterations=iterations)
    for _ in measure_missing(out, names, seeds, settings, lambda kit: scored(kit, "trained")[COLUMNS]):
        table = results(out, names)
        table.to_json(out / "table.json", orient="records", indent=2)
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep=""))


def configured(profile: str, arm: str, seed: int, iterations: int) -> Config:
    """The settings of one run; "4x8x1-own" is 4 prompts, 8 rewrites each, 1 image each from a seed of its own."""
    shape, _, own = arm.partition("-")
    prompts, rewrites, images = map(int, shape.split("x"))
    run = {
        "training_settings.seed": seed,
        "training_settings.num_iterations": iterations,
        "training_settings.prompts_per_iteration": prompts,
        "training_settings.group_size": rewrites,
        "generation_settings.images_per_prompt": images,
        "generation_settings.share_seeds": own != "own",
    }
    return gk.load_config(profile, SETTINGS | run)


def measure_missing(
    out: Path,
    arms: Sequence[str],
    seeds: int,
    configured: Callable[[str, int], Config],
    scored: Callable[[Experiment], pd.DataFrame],
) -> Iterator[int]:
    """Train the runs that are missing and keep their scores as `ARM_SEED.parquet`; gives each seed that is done.

    It goes seed by seed, so that a stopped measurement is balanced.

    Args:
        configured: an arm and a seed → the settings of that run.
        scored: the trained experiment → a row a picture, with scores; with a column `arm` where it compares.
    """
    for seed in range(seeds):
        for arm in arms:
            place = out / f"{arm}_{seed}.parquet"
            if place.is_file():
                continue
            kit, seconds = trained(configured(arm, seed))
            rows = scored(kit)
            keep(rows.assign(cpu_seconds=seconds.cpu), place)
            means = (
                rows.groupby("arm", sort=False)["gold"].mean() if "arm" in rows else rows.filter(like="reward").mean()
            )
            told = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            typer.echo(f"{place.stem}: {seconds.cpu:.0f} CPU-seconds, {told}")
            gk.release(kit)
        yield seed


def trained(config: Config) -> tuple[Experiment, Seconds]:
    """An experiment whose policy was trained without any files, and what the training took."""
    kit = gk.load_experiment(config)
    optimizer = make_optimizer(kit, config)

    def train() -> None:
        for iteration in range(1, config.training_settings.num_iterations + 1):
            run_iteration(kit, optimizer, iteration)

    return kit, timed(train)


def scored(kit: Experiment, variant: str) -> pd.DataFrame:
    """Scores of one policy's likeliest rewrites of the held-out prompts, two latents each."""
    prompts = kit.val_prompts[:EVALUATED]
    return gk.evaluate(kit, prompts, (variant,), seeds_per_prompt=2, paraphrases=False).rows


def keep(rows: pd.DataFrame, place: Path) -> None:
    """Write the numbers, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_suffix(".part")
    rows.to_parquet(temporary, index=False)
    temporary.replace(place)


def per_run(out: Path, columns: list[str]) -> pd.DataFrame:
    """A row a run, by (arm, seed): the means of these columns over what `keep` wrote as `ARM_SEED.parquet`."""
    places = sorted(out.glob("*_[0-9]*.parquet"))
    names = [tuple(place.stem.rsplit("_", 1)) for place in places]
    means = [pd.read_parquet(place)[columns].mean() for place in places]
    return pd.DataFrame(means, index=pd.MultiIndex.from_tuples(names, names=["arm", "seed"]))


def results(out: Path, arms: list[str]) -> pd.DataFrame:
    """A row an arm: gold and reward over training seeds and prompts, and gold less the default's, with intervals."""
    runs = {arm: sorted(out.glob(f"{arm}_[0-9]*.parquet")) for arm in arms}
    table = []
    for arm, places in runs.items():
        pairs = [(place, out / place.name.replace(f"{arm}_", f"{DEFAULT}_")) for place in places]
        pairs = [(one, other) for one, other in pairs if other.is_file()]
        row = {"arm": arm, "training seeds": len(places)}
        for metric in ("gold", "reward"):
            row |= _columns(metric, [_by_prompt(place, metric) for place in places])
        if arm != DEFAULT:
            row |= _columns(
                "gold less the default's", [_by_prompt(a, "gold") - _by_prompt(b, "gold") for a, b in pairs]
            )
        table.append(row)
    return pd.DataFrame(table)


def _by_prompt(place: Path, metric: str) -> pd.Series:
    return pd.read_parquet(place).groupby("prompt_id")[metric].mean()


def _columns(name: str, runs: list[pd.Series]) -> dict[str, float]:
    """Mean of some runs, with the interval that holds the luck of seeds and prompts where there are two runs."""
    if not runs:
        return {}
    values = pd.DataFrame(runs).dropna(axis="columns").to_numpy()
    found = pooled_interval(values).to_dict() if len(values) > 1 else {"mean": float(np.mean(values))}
    return {name: found["mean"]} | {f"{name}, {end}": found[end] for end in ("low", "high") if end in found}


if __name__ == "__main__":
    typer.run(main)
