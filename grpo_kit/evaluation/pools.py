"""Several runs side by side: which settings differ, what each brought, and how sure that is.

Runs of the same settings with other training seeds are one *pool*. A pool of one run has the intervals of its
evaluation, over prompts; a pool of several has t-intervals over its runs' means.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from grpo_kit.config import RECORDS, Config, KitError, Section
from grpo_kit.config.display import cut
from grpo_kit.evaluation.intervals import Interval, paired_interval, pooled_interval, t_interval
from grpo_kit.evaluation.table import compared_pairs, complete_cells
from grpo_kit.runs.grid import trial_folders
from grpo_kit.runs.own_rewards import in_words, is_own
from grpo_kit.runs.record import RunRecord, read_run

SEED = "training_settings.seed"
# Settings that change no number of a run that was trained to its end are not compared.
IDLE_SECTIONS = ("profile", *RECORDS, "tracking_settings")
IDLE = tuple(f"training_settings.{name}" for name in ("save_every", "save_minutes", "keep_checkpoints"))
METRICS = ("reward", "gold")
CURVES = {"reward": "reward", "gold": "rewards/gold/mean", "kl": "kl"}  # column of a table of curves → of metrics.jsonl
LABEL = 60  # characters
BASELINE = "baseline"  # the first pool, where the others are named by what they change


@dataclass(frozen=True)
class Pool:
    """Runs of the same settings, one a seed: what they are called and the runs in the order of their seeds."""

    label: str
    runs: tuple[RunRecord, ...]
    seeds: list[object]
    settings: Mapping[str, object] = field(repr=False)

    @property
    def over_seeds(self) -> bool:
        """Whether its intervals are over seeds: more than one of its runs was evaluated."""
        return sum(bool(run.results) for run in self.runs) > 1

    def final(self, kind: str, name: str, metric: str) -> Interval | None:
        """A figure of the evaluation with its interval; None where no run has it.

        Args:
            kind: `variants` or `differences`.
            name: a variant, such as `trained`, or a pair, such as `trained-raw`.
            metric: such as `reward`.
        """
        found = list(self._figures(kind, name, metric).values())
        if len(found) != 1:
            return t_interval([value["mean"] for value in found]) if found else None
        ends = (found[0][end] for end in ("mean", "low", "high"))
        return Interval(*(math.nan if end is None else end for end in ends))

    def trained_means(self, metric: str) -> dict[object, float]:
        """Seed → the mean of its trained policy in the evaluation, where it was evaluated."""
        return {seed: value["mean"] for seed, value in self._figures("variants", "trained", metric).items()}

    def _figures(self, kind: str, name: str, metric: str) -> dict[object, dict]:
        pairs = zip(self.seeds, self.runs, strict=True)
        found = {seed: run.results.get(kind, {}).get(name, {}).get(metric) for seed, run in pairs}
        return {seed: value for seed, value in found.items() if value and value["mean"] is not None}

    @property
    def step_times(self) -> pd.Series:
        """Seconds of each iteration, by (number of the run, row of its metrics)."""
        times = {n: run.metrics.get("step_time", pd.Series(dtype=float)) for n, run in enumerate(self.runs)}
        return pd.concat(times)


def read_runs(folders: Iterable[Path | str]) -> list[RunRecord]:
    """Read the runs, the trials of a grid's folder among them, each once.

    Raises:
        KitError: a run stands twice.
        RecordError: there is no such run, or one of its files is damaged.
    """
    paths = [path for folder in folders for path in trial_folders(Path(folder)) or [Path(folder)]]
    counts = Counter(path.resolve() for path in paths)
    for path in paths:
        if counts[path.resolve()] > 1:
            raise KitError(f"run {path}: stands twice. Give each run once")
    return [read_run(path) for path in paths]


def pool_runs(records: Sequence[RunRecord]) -> list[Pool]:
    """Group runs of equal settings whose seeds differ, in the order given; a repeated seed begins another pool."""
    groups: dict[tuple[str, int], list[tuple[object, RunRecord, dict]]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for record in records:
        settings = _settings(record)
        seed = settings.pop(SEED, None)
        key = repr(sorted((name, repr(value)) for name, value in settings.items()))
        seen[key, str(seed)] += 1
        groups.setdefault((key, seen[key, str(seed)]), []).append((seed, record, settings))
    pools = []
    for members in groups.values():
        members.sort(key=lambda member: math.inf if member[0] is None else float(member[0]))
        seeds, runs, (settings, *_) = zip(*members, strict=True)
        pools.append(Pool("", runs, list(seeds), settings))
    return [replace(pool, label=label) for pool, label in zip(pools, _labels(pools), strict=True)]


def _settings(record: RunRecord) -> dict[str, object]:
    """What can change a run's numbers, by dotted key: its settings, and of a branch what it began with.

    A setting that an older version of the kit did not write has its default.
    """
    flat: dict[str, object] = {}
    for section, values in record.config.items():
        if not isinstance(values, Mapping):
            flat[section] = values
            continue
        kind = getattr(Config.model_fields.get(section), "annotation", None)
        if isinstance(kind, type) and issubclass(kind, Section):
            values = dict.fromkeys(kind.model_fields) | vars(kind.model_construct()) | dict(values)
        flat |= {f"{section}.{name}": value for name, value in values.items()}
    flat = {name: v for name, v in flat.items() if name not in IDLE and name.split(".")[0] not in IDLE_SECTIONS}
    if is_own(rewards := record.config.get("rewards") or {}):  # one of which no setting tells, or not which code
        codes = [entry["sha256"][:8] for entry in rewards.values() if "sha256" in entry]
        flat |= {"rewards": in_words(rewards), "code of rewards": ", ".join(codes)}
    return flat | ({"branch": record.branch_text()} if record.branch else {})


def differing_settings(pools: Sequence[Pool]) -> dict[str, list[object]]:
    """Each setting that is not the same in all pools, with its value in each; None where it is not set."""
    names = dict.fromkeys(name for pool in pools for name in pool.settings)
    values = {name: [pool.settings.get(name) for pool in pools] for name in names}
    return {name: found for name, found in values.items() if len(set(map(repr, found))) > 1}


def _labels(pools: Sequence[Pool]) -> list[str]:
    """Name each pool by the settings in which it differs, or by what it changes; by its runs where neither does."""
    differing = differing_settings(pools)
    for texts in (setting_texts(differing) if len(differing) <= 2 else [], setting_texts(differing, changes_only=True)):
        if texts and len(set(texts)) == len(texts) and max(map(len, texts)) <= LABEL:
            return texts
    names = [cut(", ".join(run.path.resolve().name for run in pool.runs), LABEL) for pool in pools]
    if len(set(names)) == len(names):
        return names
    return [f"{number}: {name}" for number, name in enumerate(names, start=1)]


def setting_texts(differing: Mapping[str, Sequence[object]], *, changes_only: bool = False) -> list[str]:
    """A text for each pool: its values of the settings that differ, or only where it differs from the first pool.

    Args:
        differing: from `differing_settings`.
    """
    columns = []
    for name, values in differing.items():
        texts = [f"{name.split('.')[-1]} {value_text(value)}" for value in values]
        same = [changes_only and repr(value) == repr(values[0]) for value in values]
        columns.append(["" if left_out else text for text, left_out in zip(texts, same, strict=True)])
    return [", ".join(filter(None, row)) or BASELINE for row in zip(*columns, strict=True)]


def value_text(value: object) -> str:
    """A setting's value as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return cut(f"{value:g}" if isinstance(value, float) else str(value), 80)


def runs_table(pools: Sequence[Pool]) -> pd.DataFrame:
    """A tidy table, a row a run: pool, seed, the settings that differ, final figures, iterations and seconds."""
    differing, rows = differing_settings(pools), []
    for pool in pools:
        values = {"setting": pool.label} | {name.split(".")[-1]: pool.settings.get(name) for name in differing}
        rows += [values | {"seed": seed, **_figures(run)} for seed, run in zip(pool.seeds, pool.runs, strict=True)]
    return pd.DataFrame(rows)


def _figures(run: RunRecord) -> dict[str, object]:
    figures: dict[str, object] = {"run": run.path.resolve().name}
    variants = run.results.get("variants", {})
    for variant, values in variants.items():
        figures |= {f"{metric}/{variant}": values[metric]["mean"] for metric in METRICS if metric in values}
    for metric, value in variants.get("trained", {}).items():
        if metric in METRICS:
            figures |= {f"{metric}/trained/{end}": value[end] for end in ("low", "high")}  # over prompts
    last = run.metrics.iloc[-1] if len(run.metrics) else {}
    seconds = float(run.metrics["step_time"].sum()) if "step_time" in run.metrics else None
    return figures | {"kl": last.get("kl"), "iterations": run.iterations, "seconds": seconds}


def curves_table(pools: Sequence[Pool]) -> pd.DataFrame:
    """What training logged, tidy: a row (pool, seed, iteration) with reward, gold and KL."""
    parts = [pd.DataFrame(columns=["setting", "seed", "iteration"])]
    for pool in pools:
        for seed, run in zip(pool.seeds, pool.runs, strict=True):
            columns = {short: run.metrics[name] for short, name in CURVES.items() if name in run.metrics}
            if columns:
                part = pd.DataFrame({"iteration": run.metrics["iteration"], **columns})
                parts.append(part.assign(setting=pool.label, seed=seed))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def write_tables(pools: Sequence[Pool], folder: Path) -> Path:
    """Write the tables of runs and of curves as `runs.jsonl` and `curves.parquet`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    runs_table(pools).to_json(folder / "runs.jsonl", orient="records", lines=True, double_precision=6)
    curves = curves_table(pools)
    curves.astype(dict.fromkeys(CURVES.keys() & curves, "float32")).to_parquet(folder / "curves.parquet", index=False)
    return folder


def against_first(pools: Sequence[Pool], metric: str) -> dict[str, Interval]:
    """Each later pool's trained policy minus the first pool's, paired by seed, with its interval over seeds."""
    first = pools[0].trained_means(metric)
    found = {pool.label: paired_interval(pool.trained_means(metric), first) for pool in pools[1:]}
    return {label: interval for label, interval in found.items() if interval is not None}


def pool_evaluations(tables: Sequence[pd.DataFrame], confidence: float = 0.95) -> dict[str, object]:
    """Pool the evaluations of several training seeds of one setting: means and paired differences, with intervals.

    Args:
        tables: each run's `evaluation/rows.parquet`: prompt_id, user_prompt, variant, seed and metrics as columns.

    Returns:
        `{"training_seeds", "num_prompts", "variants": {variant: {metric: interval}}, "differences": {pair: …}}`, as
        JSON holds it. Left out of all: a prompt that could not be scored in some run, a metric that a table lacks.

    Raises:
        KitError: fewer than two tables, or tables of different prompts.
    """
    if len(tables) < 2:
        raise KitError(f"pooling: found {len(tables)} evaluation, allowed: at least 2, one a training seed")
    texts = [table.drop_duplicates("prompt_id").set_index("prompt_id")["user_prompt"].to_dict() for table in tables]
    for number, text in enumerate(texts, start=1):
        if text != texts[0]:
            found = f"evaluation {number} has other prompts than the first ({len(text)}, {len(texts[0])})"
            raise KitError(f"pooling: {found}. Evaluate all with the same prompts")
    metrics = [metric for metric in METRICS if all(metric in table for table in tables)]
    variants = [v for v in dict.fromkeys(tables[0]["variant"]) if all(v in set(t["variant"]) for t in tables)]
    means = [complete_cells(table)[0].groupby(["variant", "prompt_id"])[metrics].mean() for table in tables]

    def values(variant: str, metric: str) -> pd.DataFrame:
        return pd.DataFrame([one.loc[variant, metric] for one in means])  # (S, P)

    def interval(table: pd.DataFrame) -> dict[str, float]:
        return pooled_interval(table.dropna(axis="columns").to_numpy(), confidence).to_dict()

    pairs = compared_pairs(variants)
    return {
        "training_seeds": len(tables),
        "num_prompts": len(texts[0]),
        "variants": {v: {m: interval(values(v, m)) for m in metrics} for v in variants},
        "differences": {f"{a}-{b}": {m: interval(values(a, m) - values(b, m)) for m in metrics} for a, b in pairs},
    }
