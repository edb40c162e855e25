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
TITLES = {
    "moving": {"game": "reward: CLIP, mean over frames", "mended": "reward: that, and motion"},
    "tones": {"game": "reward: loudness", "mended": "reward: CLAP"},
}
TRAINED_ON = {"seed, all": "trained on the reward", "random_rewards, all": "trained on random rewards"}
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
    tables = {"learning": compared(out), "arms": gamed(out, list(ARMS[world]))}
    for name, table in tables.items():
        table.to_json(out / f"{name}.json", orient="records", indent=2)
        typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep=""))
    found = results(*tables.values())
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (out / "tables.md").write_text("\n\n".join(markdown(found).values()) + "\n", encoding="utf-8")
    learning_figure(found["learning"]).save(out / "learning.png", dpi=110)
    curves = {arm: [json.loads(place.read_text("utf-8")) for place in _runs(out, arm)] for arm in ARMS[world]}
    hacking.hacking_figure(curves, titles=TITLES[world]).save(out / "arms.png", dpi=110)


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
    return pd.DataFrame([hacking.row(arm, file) for arm in arms for file in _runs(out, arm)])


def _runs(out: Path, arm: str) -> list[Path]:
    return sorted(out.glob(f"{arm}_*/sentinel.json"))


def results(table: pd.DataFrame, arms: pd.DataFrame) -> dict:
    """What docs/media.json has of a world: training → metric → variant → interval over seeds; and the arms' runs."""
    found: dict = {name: {} for name in TRAINED_ON.values()}
    for run in table[table["run"].isin(TRAINED_ON)].to_dict("records"):
        ends = {name: run[name] for name in ("mean", "low", "high")}
        found[TRAINED_ON[run["run"]]].setdefault(run["metric"], {})[run["variant"]] = ends
    return {"learning": found, "arms": json.loads(arms.to_json(orient="records"))}


def learning_figure(learning: dict) -> Drawing:
    """The check and the reward of each variant on held-out prompts, means over seeds, beside the control's."""
    shown = {series: metrics for series, metrics in learning.items() if metrics}
    return interval_figure({m: {series: found[m] for series, found in shown.items()} for m in ("gold", "reward")})


def markdown(found: dict) -> dict[str, str]:
    """The tables of docs/media.md for a world: the check and the reward; then a row a run of the arms."""
    trained, control = found["learning"].values()
    learning = [["held-out prompts", *trained["gold"], "trained on random rewards"]]
    for metric, name in (("gold", "the check"), ("reward", "the reward")):
        values = [*trained[metric].values(), control[metric]["trained"]]
        learning.append([name, *(_text(value) for value in values)])
    names = ("reward, first", "reward, last", "gold, first", "gold, last")
    arms = [["arm", "seed", "iterations", "alarm at", *(name.replace("gold", "held out") for name in names)]]
    for run in found["arms"]:
        alarm = "none" if run["alarm at"] is None else f"{run['alarm at']:.0f}"
        arms.append([run["arm"], f"{run['seed']}", f"{run['iterations']}", alarm, *(f"{run[n]:.3f}" for n in names)])
    return {name: _markdown(rows) for name, rows in {"learning": learning, "arms": arms}.items()}


def _text(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


if __name__ == "__main__":
    typer.run(main)
