"""Does the evaluation's interval keep its word? A policy compared with itself, and methods for few prompts compared.

Pictures are drawn and scored once and kept; everything else resamples those scores.

* *itself*: a random part of the prompts, each prompt's latents dealt at random into two halves, as if the same policy
  had been evaluated twice. The true difference is 0, and a 95 % interval should hold it 95 times out of 100.
* *effect*: the trained policy minus the raw prompt, and the trained policy alone, on prompts drawn from the 128 with
  replacement: the true mean is that of all 128, and the values are as skewed as real ones are.

`python -m benchmarks.studies.evaluation_check` writes `reports/evaluation_check/` and prints the tables.
"""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from scipy import stats
from tqdm import tqdm

import grpo_kit as gk
from grpo_kit.config import PROJECT_ROOT
from grpo_kit.evaluation.intervals import bootstrap_interval, share_interval, t_interval
from grpo_kit.evaluation.table import score_tables

COMPARE = ("raw", "initial", "trained")
METRICS = ("reward", "gold")
PROMPTS, SEEDS, SIZES = 128, 8, (16, 32, 64, 128)
KIT = "expanded percentile"  # what `evaluate` reports
Method = Callable[[np.ndarray], tuple[float, float]]


def main(
    splits: Annotated[int, typer.Option(min=10, help="random splits of the policy against itself")] = 200,
    repeats: Annotated[int, typer.Option(min=10, help="samples on which the methods are compared")] = 1000,
    run_dir: Annotated[Path, typer.Option(help="the run whose policy is trained")] = PROJECT_ROOT / "data" / "demo_run",
    out: Annotated[Path, typer.Option(help="where scores and tables go")] = PROJECT_ROOT
    / "reports"
    / "evaluation_check",
) -> None:
    """Draw (once), resample, write and print."""
    scores = score_tables(drawn_once(run_dir, out / "scores.parquet"), METRICS, COMPARE)
    itself = pd.DataFrame(against_itself(scores, splits, {KIT: METHODS[KIT]}, first_seed=0))
    methods = pd.DataFrame([*against_itself(scores, repeats, METHODS, first_seed=1), *with_effect(scores, repeats)])
    for name, table in {"itself": itself, "methods": methods}.items():
        table.to_json(out / f"{name}.json", orient="records", indent=2)
    typer.echo(f"The policy against itself, {splits} random splits, the interval that evaluate reports:\n")
    typer.echo(itself.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    typer.echo(f"\nHow often each method's 95 % interval holds the true mean, {repeats} samples:\n")
    columns = ["question", "metric", "prompts"]
    wide = methods.pivot_table(index=columns, columns="method", values="covers", sort=False)
    typer.echo(wide.to_string(float_format=lambda value: f"{value:.3f}"))


def drawn_once(run_dir: Path, place: Path) -> pd.DataFrame:
    """The rows of one evaluation with many latents a prompt; drawn where `place` does not hold them yet."""
    if not place.is_file():
        kit = gk.load_experiment(gk.load_config(run_dir), trained=run_dir / "best")
        prompts = kit.val_prompts[:PROMPTS]
        rows = gk.evaluate(kit, prompts, COMPARE, seeds_per_prompt=SEEDS, paraphrases=False).rows
        place.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(place, index=False)
    return pd.read_parquet(place)


def against_itself(
    scores: dict, repeats: int, methods: dict[str, Method], first_seed: int
) -> Iterator[dict[str, object]]:
    """How often each method's interval of a policy's difference from itself holds 0."""
    cases = [(m, v, n) for m in METRICS for v in ("initial", "trained") for n in SIZES]
    for metric, variant, size in tqdm(cases, desc="against itself"):
        cells = scores[metric][variant].to_numpy()
        rng = np.random.default_rng(first_seed)
        samples = [split_difference(cells, size, rng) for _ in range(repeats)]
        yield from coverage(f"{variant} − itself", metric, samples, 0.0, methods)


def split_difference(cells: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size,) differences: some prompts at random, their latents dealt at random into two halves."""
    chosen = cells[rng.permutation(len(cells))[:size]]
    dealt = rng.permuted(chosen, axis=1)
    half = dealt.shape[1] // 2
    return dealt[:, :half].mean(axis=1) - dealt[:, half : 2 * half].mean(axis=1)


def with_effect(scores: dict, repeats: int) -> Iterator[dict[str, object]]:
    """How often each method's interval holds the true mean where there is an effect."""
    questions = {}
    for metric in METRICS:
        means = {v: scores[metric][v].mean(axis=1).to_numpy() for v in COMPARE}
        questions["trained − raw", metric] = means["trained"] - means["raw"]
        questions["trained", metric] = means["trained"]
    cases = [(question, metric, n) for question, metric in questions for n in SIZES]
    for question, metric, size in tqdm(cases, desc="with an effect"):
        values, rng = questions[question, metric], np.random.default_rng(2)
        samples = [rng.choice(values, size) for _ in range(repeats)]
        yield from coverage(question, metric, samples, float(values.mean()), METHODS)


def coverage(
    question: str, metric: str, samples: list[np.ndarray], truth: float, methods: dict[str, Method]
) -> Iterator[dict[str, object]]:
    """A row a method: the share of samples whose interval holds the truth, with Wilson's interval of that share."""
    for name, method in methods.items():
        ends = [method(sample) for sample in samples]
        hits = sum(low - 1e-12 <= truth <= high + 1e-12 for low, high in ends)
        share = share_interval(hits, len(samples))
        yield {
            "question": question,
            "metric": metric,
            "prompts": len(samples[0]),
            "method": name,
            "covers": share["mean"],
            "low": share["low"],
            "high": share["high"],
            "width": float(np.mean([high - low for low, high in ends])),
        }


# --- methods ----------------------------------------------------------------------------------------------------------


def _kit(values: np.ndarray) -> tuple[float, float]:
    found = bootstrap_interval(values)
    return found["low"], found["high"]


def _scipy(values: np.ndarray, method: str) -> tuple[float, float]:
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BCa of values that are nearly all equal; its NaN counts as a miss
        found = stats.bootstrap((values,), np.mean, n_resamples=2000, method=method, rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _t(values: np.ndarray) -> tuple[float, float]:
    found = t_interval(values)
    return found["low"], found["high"]


METHODS: dict[str, Method] = {
    "percentile": lambda values: _scipy(values, "percentile"),
    KIT: _kit,
    "BCa": lambda values: _scipy(values, "BCa"),
    "t": _t,
}


if __name__ == "__main__":
    typer.run(main)
