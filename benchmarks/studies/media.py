"""Does it learn in other media, and is a gamed reward found there? Several training seeds on a small world.

As `benchmarks.studies.learning`, with a control on random rewards; then two arms more: *game* rewards what a dull
medium satisfies as well (the mean of CLIP over frames, which a still satisfies; loudness), *mended* has a check of it.
`python -m benchmarks.studies.media --world moving` writes `reports/media/moving/`: the runs, two tables, two figures.
docs/media.json has the tables of the measurement that docs/media.md shows.
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
from grpo_kit.show.intervals import interval_figure
from grpo_kit.show.style import Drawing

PROFILES = {"moving": "tiny_video", "tones": "tiny_audio"}
MANY_PROMPTS = {  # and few validations, among which the level is shared: what the check loses is small beside its noise
    "evaluation_settings.validation_prompts": 80,
    "training_settings.validate_every": 20,
}
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
            **MANY_PROMPTS,
        },
        "mended": {
            "reward_settings.weights": {"clap_similarity": 1.0},
            "reward_settings.monitors": ["gold", "loudness"],
            **MANY_PROMPTS,
        },
    },
}
TITLES = {
    "moving": {"game": "reward: CLIP, mean over frames", "mended": "reward: that, and motion"},
    "tones": {"game": "reward: loudness", "mended": "reward: CLAP"},
}
WATCHED = {"moving": "motion", "tones": "loudness"}
TRAINED_ON = {"seed": "trained on the reward", "random_rewards": "trained on random rewards"}
STOPPING = {
    "training_settings.stop_on_divergence": True,
    "training_settings.validate_every": 10,
    "training_settings.save_every": 10,
}


def main(
    world: Annotated[str, typer.Option(help=f"one of {', '.join(PROFILES)}")] = "moving",
    seeds: Annotated[int, typer.Option(help="how many training seeds of each arm")] = 3,
    first: Annotated[int, typer.Option(help="the first training seed")] = 0,
    controls: Annotated[int, typer.Option(help="how many seeds to train on random rewards")] = 3,
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
    found = {"watched": [WATCHED[world]], "learning": pooled(compared(out)), "arms": gamed(out, list(ARMS[world]))}
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    tables = "\n\n".join(markdown(found).values())
    (out / "tables.md").write_text(tables + "\n", encoding="utf-8")
    typer.echo(tables)
    learning_figure(found["learning"]).save(out / "learning.png", dpi=110)
    curves = {arm: [run for run in found["arms"] if run["arm"] == arm] for arm in ARMS[world]}
    signals = {"reward": "reward, held-out prompts", WATCHED[world]: WATCHED[world], "gold": "gold check"}
    hacking.hacking_figure(curves, titles=TITLES[world], signals=signals).save(out / "arms.png", dpi=110)


def compared(out: Path) -> pd.DataFrame:
    """Each run's variants on held-out prompts: a row for each variant and metric."""
    found = []
    places = [
        (name, place) for start, name in TRAINED_ON.items() for place in out.glob(f"{start}_*/final_results.json")
    ]
    for training, place in places:
        for variant, metrics in json.loads(place.read_text(encoding="utf-8"))["variants"].items():
            found += [(training, variant, metric, metrics[metric]["mean"]) for metric in ("gold", "reward")]
    return pd.DataFrame(found, columns=["training", "variant", "metric", "mean"])


def pooled(table: pd.DataFrame) -> dict:
    """Training → metric → variant → mean and 95 % interval over training seeds."""
    found: dict = {}
    for (training, metric, variant), runs in table.groupby(["training", "metric", "variant"], sort=False)["mean"]:
        found.setdefault(training, {}).setdefault(metric, {})[variant] = t_interval(runs).to_dict()
    return found


def gamed(out: Path, arms: list[str]) -> list[dict]:
    """The arms' runs: the alarm, if any, and of each validation the iteration, the reward, its parts and monitors."""
    found = []
    for place in (file.parent for arm in arms for file in sorted(out.glob(f"{arm}_*/sentinel.json"))):
        arm, seed = place.name.rsplit("_", 1)
        seen = [json.loads(file.read_text("utf-8")) for file in sorted(place.glob("validation_iter_*.json"))]
        signals = [{name: one[name] for name in ("iteration", "reward")} | one["rewards"] for one in seen]
        divergence = json.loads((place / "sentinel.json").read_text("utf-8"))["divergence"]
        found.append({"arm": arm, "seed": int(seed), "divergence": divergence, "signals": signals})
    return found


def learning_figure(learning: dict) -> Drawing:
    """The check and the reward of each variant on held-out prompts, means over seeds, beside the control's."""
    return interval_figure({m: {series: found[m] for series, found in learning.items()} for m in ("gold", "reward")})


def markdown(found: dict) -> dict[str, str]:
    """The tables of docs/media.md for a world: the check and the reward; then a row a run of the arms."""
    trained, control = (found["learning"][name] for name in TRAINED_ON.values())
    learning = [["held-out prompts", *trained["gold"], "trained on random rewards"]]
    for metric, name in (("gold", "the check"), ("reward", "the reward")):
        values = [*trained[metric].values(), control[metric]["trained"]]
        learning.append([name, *(_text(value) for value in values)])
    arms = [
        ["arm", "seed", "alarm at", "iterations", "reward", *found["watched"], "the check", "the check at its best"]
    ]
    for run in found["arms"]:
        first, last = run["signals"][0], run["signals"][-1]
        alarm = f"{run['divergence']['iteration']}" if run["divergence"] else "none"
        moved = [f"{first[name]:.3f} → {last[name]:.3f}" for name in ("reward", *found["watched"], "gold")]
        best = max(one["gold"] for one in run["signals"])
        arms.append([run["arm"], f"{run['seed']}", alarm, f"{last['iteration']}", *moved, f"{best:.3f}"])
    return {name: _markdown(rows) for name, rows in {"learning": learning, "arms": arms}.items()}


def _text(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


if __name__ == "__main__":
    typer.run(main)
