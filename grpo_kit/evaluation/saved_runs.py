"""The evaluation of runs that are on disk: one run's policy, or those of several beside each other."""

from collections.abc import Sequence
from pathlib import Path

from grpo_kit.config import Config, KitError
from grpo_kit.evaluation.evaluate import EvalResult, evaluate
from grpo_kit.evaluation.pools import pool_evaluations, pool_runs, read_runs
from grpo_kit.experiment import load_experiment
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.places import dated_report


def evaluate_runs(config: Config, folders: Sequence[Path], out: Path | None = None) -> Path:
    """Evaluate the policies of runs on the same prompts and latents, and return the folder with the results.

    Args:
        config: whose settings, generator and rewards judge all of them.
        folders: of the runs.
        out: the folder for the results; None is the run's own, for several runs a new one in reports/.

    Raises:
        KitError: the first run has no trained policy, or `out` is one of several runs.
    """
    if not (folders[0] / "best").is_dir():
        advice = f"Train it: grpo-kit train --run-dir {folders[0]}"
        raise KitError(f"run {folders[0]}: no trained policy in it (best/). {advice}")
    several = len(folders) > 1
    place = dated_report("evaluate") if several else folders[0]
    place = place if out is None else out.expanduser().resolve()
    if several and place in folders:
        raise KitError(f"--out {place}: one of the runs, whose own evaluation would be lost. Name another folder")
    policies = map(str, folders) if several else ["trained"]
    oracle = ["oracle"] if config.evaluation_settings.gold else []
    kit = load_experiment(config, trained=None if several else folders[0] / "best")
    result = evaluate(kit, compare=("raw", "initial", *policies, *oracle), run_dir=place)
    pooled = _pooled(result, folders) if several else {}
    if pooled:
        RunFolder(place).write_json("final_results.json", result.results | {"pooled": pooled})
    return place


def _pooled(result: EvalResult, folders: Sequence[Path]) -> dict[str, dict]:
    """What runs of one setting with several training seeds show together, by the pool's label."""
    rows, names = result.rows, {path: name for name, path in result.results["policies"].items()}
    pooled = {}
    for pool in pool_runs(read_runs(folder for folder in folders if (folder / "best").is_dir())):
        if len(pool.runs) > 1:
            own = [names[str(run.path)] for run in pool.runs]
            kept = [rows[rows["variant"].isin(["raw", "initial", name])] for name in own]
            tables = [t.replace({"variant": {name: "trained"}}) for t, name in zip(kept, own, strict=True)]
            found = pool_evaluations(tables, confidence=result.results["confidence"])
            pooled[pool.label] = {"policies": own, **found}
    return pooled
