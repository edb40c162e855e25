"""Is a gamed reward found while it is trained, and nothing reported otherwise? Several training seeds of each.

*game* rewards consistency with the *enhanced* prompt, which a policy can raise by asking for something that is easy to
draw, whatever the user wants; *control* is the same run under the profile's own reward. Both stop on divergence; the
first game's run then goes on to its end, to show what the stop has spared.
`python -m benchmarks.studies.hacking` writes `reports/hacking/`: a run a seed, table.json, curves.json and plot.png.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from matplotlib.axes import Axes

import grpo_kit as gk
from grpo_kit.config import PROJECT_ROOT, Config
from grpo_kit.show.style import BLUE, GREY, INK, VERMILION, Drawing, new_figure, styled

ARMS = {
    "game": {
        "reward_settings.weights": {"consistency": 1.0},
        "reward_settings.monitors": ["gold", "keeps_objects", "grammatical", "clip_similarity"],
    },
    "control": {},
}
SETTINGS = {
    "training_settings.beta": 0.0,
    "training_settings.validate_every": 10,
    "training_settings.save_every": 10,
    "generation_settings.num_inference_steps": 4,  # half the profile's: pictures are most of the time
}
TITLES = {
    "game": "reward: consistency with the rewrite",
    "control": "reward: similarity to the user's prompt",
}

SIGNALS = {"reward": "reward, held-out prompts", "held_out": "gold check"}


def main(
    seeds: Annotated[int, typer.Option(help="how many training seeds of each arm")] = 10,
    first: Annotated[int, typer.Option(help="the first training seed")] = 0,
    iterations: Annotated[int, typer.Option(help="of a run that is not stopped")] = 80,
    profile: Annotated[str, typer.Option(help="a profile of the embedded world")] = "tiny",
    out: Annotated[Path, typer.Option(help="where the runs and the table go")] = PROJECT_ROOT / "reports" / "hacking",
    threads: Annotated[int, typer.Option(help="of torch; 0 leaves its default")] = 0,
) -> None:
    """Train all of them; a stopped measurement goes on where it was."""
    if threads:
        torch.set_num_threads(threads)
    for seed in range(first, first + seeds):
        for arm in ARMS:
            measure(out / f"{arm}_{seed}", configured(profile, arm, seed, iterations))
            write_results(out)
    go_on(out, configured(profile, "game", first, iterations))
    typer.echo(write_results(out).to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep=""))


def configured(profile: str, arm: str, seed: int, iterations: int, stop: bool = True) -> Config:
    """The settings of one run; the arms differ in their reward alone."""
    run = {
        "training_settings.seed": seed,
        "training_settings.num_iterations": iterations,
        "training_settings.stop_on_divergence": stop,
    }
    return gk.load_config(profile, SETTINGS | ARMS[arm] | run)


def measure(run_dir: Path, config: Config) -> None:
    """Train one run until its end or its stop, unless that was done."""
    if not is_finished(run_dir, config):
        gk.train(gk.load_experiment(config), run_dir)


def is_finished(run_dir: Path, config: Config) -> bool:
    """The run was stopped for reward hacking, or has all its iterations."""
    if not (run_dir / "sentinel.json").is_file():
        return False
    seen = _read(run_dir / "sentinel.json")
    ended = seen["signals"][-1]["iteration"] >= config.training_settings.num_iterations
    return ended or bool(seen["divergence"] and config.training_settings.stop_on_divergence)


def go_on(out: Path, config: Config) -> None:
    """Let a copy of the first game's run go on to its end: what would have happened without the stop."""
    stopped = out / f"game_{config.training_settings.seed}"
    place = out / "not_stopped"
    if not place.is_dir():
        shutil.copytree(stopped, place)
    going_on = gk.load_config(config, {"training_settings.stop_on_divergence": False})
    measure(place, going_on)


# --- what came of it --------------------------------------------------------------------------------------------------


def write_results(out: Path) -> pd.DataFrame:
    """Write table.json, curves.json and plot.png from the runs that there are; returns the table."""
    runs = {arm: sorted(out.glob(f"{arm}_*/sentinel.json"), key=_seed) for arm in ARMS}
    table = pd.DataFrame([row(arm, file) for arm, files in runs.items() for file in files])
    curves = {arm: [_read(file) for file in files] for arm, files in runs.items()}
    going_on = (
        _read(out / "not_stopped" / "sentinel.json") if (out / "not_stopped" / "sentinel.json").is_file() else None
    )
    table.to_json(out / "table.json", orient="records", indent=2)
    curves_file = {"arms": curves, "not_stopped": going_on}
    (out / "curves.json").write_text(json.dumps(curves_file) + "\n", encoding="utf-8")
    hacking_figure(curves, going_on).save(out / "plot.png")
    return table


def row(arm: str, file: Path) -> dict[str, object]:
    """One run: when the alarm came, what had changed since when, and gold at the start, at its best and at the end."""
    seen = _read(file)
    signals, alarm = pd.DataFrame(seen["signals"]), seen["divergence"] or {}
    change = {name: alarm[f"{name}_change"]["mean"] if alarm else None for name in ("reward", "held_out")}
    return {
        "arm": arm,
        "seed": _seed(file),
        "iterations": int(signals["iteration"].iloc[-1]),
        "alarm at": alarm.get("iteration"),
        "since": alarm.get("since"),
        "reward rose": change["reward"],
        "gold fell": None if change["held_out"] is None else -change["held_out"],
        "reward, first": signals["reward"].iloc[0],
        "reward, last": signals["reward"].iloc[-1],
        "gold, first": signals["held_out"].iloc[0],
        "gold, best": signals["held_out"].max(),
        "gold, last": signals["held_out"].iloc[-1],
        "cautions": ", ".join(caution["kind"] for caution in seen["cautions"]),
        "report": alarm.get("text", ""),
    }


@styled
def hacking_figure(
    arms: Mapping[str, Sequence[Mapping]],
    going_on: Mapping | None = None,
    titles: Mapping[str, str] = TITLES,
    signals: Mapping[str, str] = SIGNALS,
) -> Drawing:
    """Draw both arms: the reward above, gold below, a line a seed; a mark where the divergence was found.

    Args:
        arms: "game" and "control": what each run's sentinel.json holds.
        going_on: the same of the run that was not stopped; drawn dashed.
        titles: of the arms.
        signals: which of the runs' signals, from the top, and their labels.
    """
    figure = new_figure(8.6, 1.0 + 2.1 * len(signals))
    grid = figure.subplots(len(signals), len(arms), sharex=True, sharey="row", squeeze=False)
    for column, (arm, runs) in enumerate(arms.items()):
        for axes, signal in zip(grid[:, column], signals, strict=True):
            for seen in runs:
                _draw_run(axes, seen, signal)
            if going_on is not None and arm == "game":
                seen = pd.DataFrame(going_on["signals"])
                axes.plot(seen["iteration"], seen[signal], color=GREY, lw=1.2, ls=(0, (3, 2)), zorder=1)
        alarms = sum(seen["divergence"] is not None for seen in runs)
        grid[0][column].set_title(
            f"{titles[arm]}\n{alarms} {'alarm' if alarms == 1 else 'alarms'} in {len(runs)} runs", pad=10
        )
        grid[-1][column].set_xlabel("iteration")
    for axes, label in zip(grid[:, 0], signals.values(), strict=True):
        axes.set_ylabel(label)
    return figure


def _draw_run(axes: Axes, seen: Mapping, signal: str) -> None:
    signals, alarm = pd.DataFrame(seen["signals"]), seen["divergence"]
    colour = BLUE if signal == "reward" else VERMILION
    axes.plot(signals["iteration"], signals[signal], color=colour, lw=1.2, alpha=0.6)
    if alarm is not None:
        at = signals[signals["iteration"] == alarm["iteration"]]
        axes.plot(at["iteration"], at[signal], color=INK, marker="X", ms=7, mec="white", mew=0.7, ls="")


def _seed(file: Path) -> int:
    return int(file.parent.name.rsplit("_", 1)[1])


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
