"""Is looking learned, and what is it worth? The three tasks with pictures, over training seeds, beside their controls.

*redraw* and *edit*: a policy that sees the user's picture, and one that is trained and judged on grey ones. *refine*:
two turns with painters, trained on its own pictures, and on grey ones; after training, the second turn after each of
the six ways of looking, between the limits of the world; also with other ways to share the reward of two turns.
`python -m benchmarks.studies.eyes` writes `reports/eyes/`: the scores of each run, results.json and figures. A stopped
measurement goes on with the first run that is missing. docs/eyes.json is results.json of the measurement that
docs/eyes.md shows.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

import grpo_kit as gk
from benchmarks.studies.budget import measure_missing
from grpo_kit.config import PROJECT_ROOT, Config
from grpo_kit.evaluation.intervals import t_interval
from grpo_kit.evaluation.looking import compare_looks
from grpo_kit.evaluation.table import ARM_NAMES
from grpo_kit.evaluation.writers import writer
from grpo_kit.experiment import Experiment
from grpo_kit.models.conversation import Conversation
from grpo_kit.show.intervals import interval_figure
from grpo_kit.show.style import Drawing

GREY = "grey"
METRICS = ("gold", "right", "reward")
VARIANTS = ("raw", "initial", "trained", "oracle")
COSTS = ("refine-cost0.05", "refine-cost0.1")  # branches, and what a further picture costs
CREDITS = ("refine", "refine-difference", "refine-branches", *COSTS)  # ways to reward two turns
ARMS = ("redraw", "redraw-grey", "edit", "edit-grey", CREDITS[0], "refine-grey", *CREDITS[1:])
Results = dict[str, dict[str, dict[str, dict[str, float]]]]
ITERATIONS = {"redraw": 60, "edit": 60, "refine": 80}


def main(
    seeds: Annotated[int, typer.Option(min=1, help="training seeds of each arm")] = 5,
    arms: Annotated[str, typer.Option(help="which, with commas between them")] = ",".join(ARMS),
    iterations: Annotated[int | None, typer.Option(help="of each run; by default 60, of refine 80")] = None,
    out: Annotated[Path, typer.Option(help="where all of it goes")] = PROJECT_ROOT / "reports" / "eyes",
) -> None:
    """Train and evaluate what is missing, seed by seed so that a stopped measurement is balanced; print the table."""
    list(measure_missing(out, arms.split(","), seeds, partial(configured, iterations=iterations), scored))
    found = results(out)
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (out / "tables.md").write_text("\n\n".join(markdown(found).values()) + "\n", encoding="utf-8")
    for name, figure in figures(found).items():
        figure.save(out / f"{name}.png", dpi=110)
    for arm, rows in found.items():
        for row, values in rows.items():
            typer.echo(f"{arm:<18} {row:<24} {', '.join(f'{name} {_text(value)}' for name, value in values.items())}")


def _text(value: dict[str, float]) -> str:
    mean, low, high = (100 * value[name] for name in ("mean", "low", "high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def configured(arm: str, seed: int, iterations: int | None = None) -> Config:
    """The settings of one run: a profile, and what the arm changes."""
    task, _, change = arm.partition("-")
    changes = {"training_settings.seed": seed, "training_settings.num_iterations": iterations or ITERATIONS[task]}
    changes |= {"evaluation_settings.paraphrases": False}
    if change == GREY:
        changes["model_settings.look_at"] = GREY
    elif change.startswith(("branches", "cost")):
        changes["generation_settings.branches"] = True
        changes["training_settings.redraw_cost"] = float(change.removeprefix("branches").removeprefix("cost") or 0)
    elif change:
        changes["generation_settings.credit"] = change
    return gk.load_config(f"tiny_{task}", changes)


def scored(kit: Experiment) -> pd.DataFrame:
    """Scores of the last policy: each way of looking, or each variant."""
    if kit.config.generation_settings.turns > 1:
        prompts = kit.val_prompts[kit.config.evaluation_settings.validation_prompts :]
        return compare_looks(kit, prompts[:96], seeds_per_prompt=1)
    rows = gk.evaluate(kit, kit.val_prompts, VARIANTS, seeds_per_prompt=1, paraphrases=False).rows
    rows = rows.rename(columns={"variant": "arm"}).assign(right=lambda table: (table["gold"] == 1).astype(float))
    return rows.assign(changed=changed_by_other_pictures(kit))


def changed_by_other_pictures(kit: Experiment) -> float:
    """The share of the trained policy's rewrites that another prompt's picture changes."""
    write = writer(kit, "trained")
    asked = [Conversation(prompt.user_prompt, tuple(prompt.pictures())) for prompt in kit.val_prompts]
    return _share_of_different(write.answers(asked, "own"), write.answers(asked, "other"))


def results(folder: Path) -> Results:
    """Arm → row (variant or way of looking) → metric → mean and interval over training seeds."""
    found: Results = {}
    for arm in ARMS:
        runs = [pd.read_parquet(place) for place in sorted(folder.glob(f"{arm}_[0-9]*.parquet"))]
        if not runs:
            continue
        rows = list(dict.fromkeys(name for run in runs for name in run["arm"]))
        found[arm] = {row: {m: _over_seeds([_mean(run, row, m) for run in runs]) for m in METRICS} for row in rows}
        shares = {name: [share(run) for run in runs] for name, share in _SHARES.items()}
        known = {name: [v for v in values if v is not None] for name, values in shares.items()}
        own = found[arm]["trained" if "trained" in rows else "own"]
        own |= {name: _over_seeds(values) for name, values in known.items() if values}
    return found


def _mean(run: pd.DataFrame, row: str, metric: str) -> float:
    return float(run.loc[run["arm"] == row, metric].mean())


def _kept(run: pd.DataFrame, right: bool) -> float | None:
    """How often the policy kept a first picture that was right, or wrong; None where there was none."""
    if "first_right" not in run:
        return None
    own = run[(run["arm"] == "own") & (run["first_right"] == right)]
    return float(own["kept"].mean()) if len(own) else None


def _changed(run: pd.DataFrame) -> float:
    if "changed" in run:
        return float(run["changed"].iloc[0])
    tables = [run[run["arm"] == arm].sort_values(["prompt_id", "seed"]) for arm in ("own", "other")]
    return _share_of_different(*(table["text"].tolist() for table in tables))


def _share_of_different(some: Sequence[str], others: Sequence[str]) -> float:
    return float(np.mean([a != b for a, b in zip(some, others, strict=True)]))


_SHARES = {
    "changed by another picture": _changed,
    "kept when right": lambda run: _kept(run, True),
    "kept when wrong": lambda run: _kept(run, False),
}


def _over_seeds(values: Sequence[float]) -> dict[str, float]:
    found = t_interval(values).to_dict()
    ends = {name: found["mean"] if found[name] is None else found[name] for name in ("low", "high")}
    return {**found, **ends, "seeds": len(values)}


_TRAINED_ON = {"refine": "trained on its own pictures", f"refine-{GREY}": "trained on grey ones"}


def markdown(found: Results) -> dict[str, str]:
    """The tables of docs/eyes.md: what a picture that the user gives is worth, a second turn, and ways of credit."""
    tasks = [arm for arm in ("redraw", f"redraw-{GREY}", "edit", f"edit-{GREY}") if arm in found]
    given = [[arm, *(_text(found[arm][v]["gold"]) for v in VARIANTS)] for arm in tasks]
    changed = "changed by another picture"
    given = [[*row, _text(found[row[0]]["trained"][changed])] for row in given]
    tables = {"given": [["task", *VARIANTS, changed], *given]}
    looks = [arm for arm in ("refine", f"refine-{GREY}") if arm in found]
    head = ["second turn after", *(f"{_TRAINED_ON[arm]}: {name}" for arm in looks for name in ("check", "all right"))]
    rows = [
        [name, *(_text(found[arm][look][metric]) for arm in looks for metric in METRICS[:2])]
        for look, name in ARM_NAMES.items()
        if looks
    ]
    tables["looks"] = [head, *rows]
    credit = [arm for arm in CREDITS if arm in found]
    names = ("kept when right", "kept when wrong")
    kept = {
        arm: [_text(found[arm]["own"][name]) if name in found[arm]["own"] else "–" for name in names] for arm in credit
    }
    scores = {arm: [_text(found[arm][row]["gold"]) for row in ("first picture", "own", GREY)] for arm in credit}
    tables["credit"] = [
        ["arm", "first picture", "own", GREY, *names],
        *([arm, *scores[arm], *kept[arm]] for arm in credit),
    ]
    return {
        name: "\n".join(_row(row) for row in (table[0], ["---"] * len(table[0]), *table[1:]))
        for name, table in tables.items()
    }


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def figures(found: Results) -> dict[str, Drawing]:
    """The six ways of looking, and the two tasks with the user's picture beside their controls."""
    drawn = {}
    sides = {name: found[arm] for arm, name in _TRAINED_ON.items() if arm in found}
    if sides:
        panels = {
            metric: {
                side: {name: rows[arm][metric] for arm, name in ARM_NAMES.items() if arm in rows}
                for side, rows in sides.items()
            }
            for metric in ("gold", "right")
        }
        drawn["looks"] = interval_figure(panels)
    for task in ("redraw", "edit"):
        pair = {"sees the picture": task, "sees a grey one": f"{task}-{GREY}"}
        series = {name: {v: found[arm][v]["gold"] for v in VARIANTS} for name, arm in pair.items() if arm in found}
        if series:
            drawn[task] = interval_figure({"gold": series})
    return drawn


if __name__ == "__main__":
    typer.run(main)
