"""Several runs side by side: which settings differ, what each brought, and how sure that is.

Runs of the same settings with other seeds are one *pool*. A pool of one run has the intervals of its evaluation, over
prompts; a pool of several has t-intervals over its runs' means, which also hold what another seed would have changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from grpo_kit.config import RECORDS, Config, KitError, Section
from grpo_kit.evaluation.statistics import t_interval
from grpo_kit.runs.record import RunRecord, read_run
from grpo_kit.show.style import VARIANT_NAMES, VARIANTS, aligned, metric_name, number_text, plain_text
from grpo_kit.show.summary import branch_text, interval_text

SEED = "training_settings.seed"
# What changes no number of a run that ran through is left out when settings are compared.
IDLE_SECTIONS = ("profile", *RECORDS, "tracking_settings")
IDLE = ("training_settings.save_every", "training_settings.keep_checkpoints")
METRICS = ("reward", "gold")
CURVES = {"reward": "reward", "gold": "rewards/gold/mean", "kl": "kl"}  # column of a table of curves → of metrics.jsonl
LABEL = 60  # characters
BASELINE = "baseline"  # the first pool, where the others are named by what they change


class ComparisonError(KitError):
    """Runs that cannot be compared."""


@dataclass(frozen=True)
class Pool:
    """Runs of the same settings, one a seed: what they are called and the runs in the order of their seeds."""

    label: str
    runs: tuple[RunRecord, ...]
    settings: Mapping[str, object] = field(repr=False)

    @property
    def seeds(self) -> list[object]:
        """The runs' seeds."""
        return [_flat(run.config).get(SEED) for run in self.runs]

    @property
    def over_seeds(self) -> bool:
        """Whether its intervals are over seeds: more than one of its runs was evaluated."""
        return sum(bool(run.results) for run in self.runs) > 1

    def final(self, kind: str, name: str, metric: str) -> dict[str, float] | None:
        """Return a figure of the evaluation with its interval.

        Args:
            kind: `variants` or `differences`.
            name: a variant, such as `trained`, or a pair, such as `trained-raw`.
            metric: such as `reward`.
        """
        found = [run.results.get(kind, {}).get(name, {}).get(metric) for run in self.runs]
        found = [value for value in found if value is not None and value["mean"] is not None]
        if len(found) <= 1:
            return found[0] if found else None
        return t_interval([value["mean"] for value in found])

    @property
    def seconds(self) -> float | None:
        """Seconds of training, a run's mean."""
        spent = [run.metrics["step_time"].sum() for run in self.runs if "step_time" in run.metrics]
        return float(np.mean(spent)) if spent else None

    @property
    def seconds_an_iteration(self) -> float | None:
        """The median over all its iterations."""
        spent = [run.metrics["step_time"] for run in self.runs if "step_time" in run.metrics]
        return float(pd.concat(spent).median()) if spent else None


# --- intervals over seeds ---------------------------------------------------------------------------------------------


def paired_interval(
    first: Mapping[object, float], second: Mapping[object, float], confidence: float = 0.95
) -> dict[str, float] | None:
    """Return the t-interval of first − second over the seeds that both have; None where they share fewer than two.

    The same seed means the same prompts in the same order and the same noise, which a difference takes out.
    """
    shared = [seed for seed in first if seed in second]
    if len(shared) < 2:
        return None
    return t_interval([first[seed] - second[seed] for seed in shared], confidence)


# --- pools ------------------------------------------------------------------------------------------------------------


def read_runs(folders: Iterable[Path | str]) -> list[RunRecord]:
    """Read the runs, the trials of a grid's folder among them, each once.

    Raises:
        ComparisonError: a run stands twice.
        RecordError: there is no such run, or one of its files is damaged.
    """
    from grpo_kit.runs.grid import trial_folders

    paths = [path for folder in folders for path in trial_folders(Path(folder)) or [Path(folder)]]
    counts = Counter(path.resolve() for path in paths)
    twice = next((path for path in paths if counts[path.resolve()] > 1), None)
    if twice is not None:
        raise ComparisonError(f"run {twice}: stands twice. Give each run once")
    return [read_run(path) for path in paths]


def pool_runs(records: Sequence[RunRecord]) -> list[Pool]:
    """Group runs of equal settings whose seeds differ, in the order given; a repeated seed begins another pool."""
    groups: dict[tuple, list[RunRecord]] = {}
    seen: Counter = Counter()
    for record in records:
        settings = _settings(record)
        seed = settings.pop(SEED, None)
        key = _key(settings)
        seen[key, str(seed)] += 1
        groups.setdefault((key, seen[key, str(seed)]), []).append(record)
    members = [tuple(sorted(runs, key=_seed_order)) for runs in groups.values()]
    settings = [{k: v for k, v in _settings(runs[0]).items() if k != SEED} for runs in members]
    labels = _labels(members, settings)
    return [Pool(*parts) for parts in zip(labels, members, settings, strict=True)]


def _seed_order(record: RunRecord) -> tuple[bool, float]:
    seed = _flat(record.config).get(SEED)
    return (True, 0.0) if seed is None else (False, float(seed))


def _settings(record: RunRecord) -> dict[str, object]:
    """What a run was trained with: its settings, and of a branch what it began with."""
    return _flat(record.config) | ({"branch": branch_text(record.branch)} if record.branch else {})


def _flat(config: Mapping) -> dict[str, object]:
    """The settings that can change a run's numbers, by dotted key; what an older kit did not write has its default."""
    flat: dict[str, object] = {}
    for section, values in config.items():
        if isinstance(values, Mapping):
            fields = _fields(section)
            values = {**{name: default for name, default in fields.items() if default is not ...}, **values}
            order = [*(name for name in fields if name in values), *(name for name in values if name not in fields)]
            flat |= {f"{section}.{name}": values[name] for name in order}
        else:
            flat[section] = values
    return {key: value for key, value in flat.items() if key not in IDLE and key.split(".")[0] not in IDLE_SECTIONS}


def _fields(section: str) -> dict[str, object]:
    """A section's settings in their order, with their defaults; `...` where there is none."""
    field = Config.model_fields.get(section)
    if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
        return {}
    fields = field.annotation.model_fields.items()
    return {name: ... if one.is_required() else one.get_default(call_default_factory=True) for name, one in fields}


def _key(settings: Mapping[str, object]) -> str:
    return repr(sorted((name, repr(value)) for name, value in settings.items()))


def differing_settings(pools: Sequence[Pool]) -> dict[str, list[object]]:
    """Return each setting that is not the same in all pools, with its value in each; None where it is not set."""
    return _differing([pool.settings for pool in pools])


def _differing(settings: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    names = dict.fromkeys(name for one in settings for name in one)
    values = {name: [one.get(name) for one in settings] for name in names}
    return {name: found for name, found in values.items() if len(set(map(repr, found))) > 1}


def _labels(members: Sequence[Sequence[RunRecord]], settings: Sequence[Mapping[str, object]]) -> list[str]:
    """Name each pool by the settings in which it differs, or by what it changes; by its runs where neither does."""
    differing = _differing(settings)
    for texts in (_all_values(differing) if len(differing) <= 2 else [], _changes_from_first(differing)):
        if texts and len(set(texts)) == len(texts) and max(map(len, texts)) <= LABEL:
            return texts
    names = [", ".join(run.path.resolve().name for run in runs) for runs in members]
    cut = [plain_text(name, LABEL) for name in names]
    return [f"{number}: {name}" for number, name in enumerate(cut, start=1)] if len(set(cut)) < len(cut) else cut


def _all_values(differing: Mapping[str, Sequence[object]]) -> list[str]:
    return [", ".join(row) for row in zip(*_named_values(differing), strict=True)]


def _named_values(differing: Mapping[str, Sequence[object]]) -> list[list[str]]:
    return [[_named(name, value) for value in values] for name, values in differing.items()]


def _changes_from_first(differing: Mapping[str, Sequence[object]]) -> list[str]:
    named = [
        [_named(name, value) if repr(value) != repr(values[0]) else "" for value in values]
        for name, values in differing.items()
    ]
    return [", ".join(filter(None, row)) or BASELINE for row in zip(*named, strict=True)]


def _named(name: str, value: object) -> str:
    return f"{name.split('.')[-1]} {value_text(value)}"


def value_text(value: object) -> str:
    """Return a setting's value as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain_text(f"{value:g}" if isinstance(value, float) else value, 80)


# --- tables -----------------------------------------------------------------------------------------------------------


def runs_table(pools: Sequence[Pool]) -> pd.DataFrame:
    """Return a tidy table, a row a run: pool, seed, the settings that differ, final figures, iterations and seconds."""
    differing = differing_settings(pools)
    rows = []
    for number, pool in enumerate(pools):
        values = {name.split(".")[-1]: found[number] for name, found in differing.items()}
        rows += [
            {"setting": pool.label, **values, "seed": seed, **_figures(run)}
            for seed, run in zip(pool.seeds, pool.runs, strict=True)
        ]
    return pd.DataFrame(rows)


def _figures(run: RunRecord) -> dict[str, object]:
    figures: dict[str, object] = {"run": run.path.resolve().name}
    for variant, values in run.results.get("variants", {}).items():
        figures |= {f"{metric}/{variant}": values[metric]["mean"] for metric in METRICS if metric in values}
    for metric, value in run.results.get("variants", {}).get("trained", {}).items():
        if metric in METRICS:
            figures |= {f"{metric}/trained/{end}": value[end] for end in ("low", "high")}  # over prompts
    last = run.metrics.iloc[-1] if len(run.metrics) else {}
    figures |= {"kl": last.get("kl"), "iterations": run.iterations}
    figures["seconds"] = float(run.metrics["step_time"].sum()) if "step_time" in run.metrics else None
    return figures


def curves_table(pools: Sequence[Pool]) -> pd.DataFrame:
    """Return what training logged, tidy: a row (pool, seed, iteration) with reward, gold and KL."""
    parts = []
    for pool in pools:
        for seed, run in zip(pool.seeds, pool.runs, strict=True):
            columns = {short: run.metrics[name] for short, name in CURVES.items() if name in run.metrics}
            if columns:
                part = pd.DataFrame({"iteration": run.metrics["iteration"], **columns})
                parts.append(part.assign(setting=pool.label, seed=seed))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["setting", "seed", "iteration"])


def write_tables(pools: Sequence[Pool], folder: Path) -> Path:
    """Write the tables of runs and of curves as `runs.jsonl` and `curves.parquet`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    runs_table(pools).to_json(folder / "runs.jsonl", orient="records", lines=True, double_precision=6)
    numbers = curves_table(pools)
    small = {name: "float32" for name in CURVES if name in numbers}
    numbers.astype(small).to_parquet(folder / "curves.parquet", index=False)
    return folder


def against_first(pools: Sequence[Pool], metric: str) -> dict[str, dict[str, float]]:
    """Return each later pool's trained policy minus the first pool's, paired by seed, with its interval over seeds."""
    first, *others = [(pool.label, _by_seed(pool, metric)) for pool in pools]
    found = {label: paired_interval(values, first[1]) for label, values in others}
    return {label: interval for label, interval in found.items() if interval is not None}


def _by_seed(pool: Pool, metric: str) -> dict[object, float]:
    found = {
        seed: run.results.get("variants", {}).get("trained", {}).get(metric)
        for seed, run in zip(pool.seeds, pool.runs, strict=True)
    }
    return {seed: value["mean"] for seed, value in found.items() if value is not None and value["mean"] is not None}


Row = tuple[str, list[str]]


def settings_rows(pools: Sequence[Pool]) -> tuple[list[str], list[Row]]:
    """Return the settings that differ as a table: header, then a row a pool."""
    differing = differing_settings(pools)
    header = [*(name.split(".")[-1] for name in differing), "seeds", "iterations", "s an iteration", "minutes"]
    rows = []
    for number, pool in enumerate(pools):
        cells = [value_text(values[number]) for values in differing.values()]
        cells += [", ".join(map(value_text, pool.seeds)), _iterations(pool)]
        cells += [number_text(pool.seconds_an_iteration, ".2f"), number_text(pool.seconds and pool.seconds / 60, ".1f")]
        rows.append((pool.label, cells))
    return header, rows


def _iterations(pool: Pool) -> str:
    """How far its runs came, and how far they were to go where that is further."""
    done = sorted({run.iterations for run in pool.runs})
    text = f"{done[0]}" if len(done) == 1 else f"{done[0]}–{done[-1]}"
    asked = pool.settings.get("training_settings.num_iterations")
    return f"{text} of {asked}" if asked is not None and done[0] < asked else text


def final_rows(pools: Sequence[Pool]) -> tuple[list[str], list[tuple[str, list[Row]]]]:
    """Return the final figures as a table: the metrics' names, then for each pool its title and rows.

    A pool that was not evaluated has no rows.
    """
    measured = [m for m in METRICS if any(pool.final("variants", v, m) for pool in pools for v in VARIANTS)]
    body = []
    for pool in pools:
        lines: list[Row] = []
        for kind, names in (("variants", VARIANTS), ("differences", ("trained-raw", "trained-initial"))):
            for name in names:
                found = [pool.final(kind, name, metric) for metric in measured]
                if any(found):
                    signed = kind == "differences"
                    cells = [interval_text(m, value, signed) for m, value in zip(measured, found, strict=True)]
                    lines.append((VARIANT_NAMES.get(name, name.replace("-", " − ")), cells))
        body.append((f"{pool.label} ({_intervals_over(pool)})", lines))
    return [metric_name(metric) for metric in measured], body


def _intervals_over(pool: Pool) -> str:
    if not any(run.results for run in pool.runs):
        return "not evaluated"
    count = len(pool.runs)
    return f"{count} seeds, intervals over seeds" if pool.over_seeds else "1 run, intervals over prompts"


def cautions(pools: Sequence[Pool]) -> list[str]:
    """Return what a reader must know before believing the comparison; empty where there is nothing."""
    found = []
    evaluated = [run for pool in pools for run in pool.runs if run.results]
    judged = {(run.results.get("num_prompts"), run.results.get("seeds_per_prompt")) for run in evaluated}
    if len(judged) > 1:
        texts = sorted(f"{prompts} prompts × {seeds} images" for prompts, seeds in judged)
        found.append(f"The runs were not judged alike ({'; '.join(texts)}): compare their final figures with care.")
    short = [run.path.resolve().name for pool in pools for run in pool.runs if _is_unfinished(run)]
    if short:
        found.append(f"Not trained to the end: {plain_text(', '.join(short), 200)}.")
    missing = [run.path.resolve().name for pool in pools for run in pool.runs if not run.results]
    if missing:
        found.append(f"Not evaluated: {plain_text(', '.join(missing), 200)}.")
    versions = {repr(sorted(run.config.get("versions", {}).items())) for pool in pools for run in pool.runs}
    if len(versions) > 1:
        found.append("The runs were made with different versions of Python or of a library.")
    return found


def _is_unfinished(run: RunRecord) -> bool:
    asked = run.config.get("training_settings", {}).get("num_iterations")
    return asked is not None and run.iterations < asked


def runs_text(pools: Sequence[Pool]) -> str:
    """Return the whole comparison as plain text for a terminal."""
    header, rows = settings_rows(pools)
    wide = len(differing_settings(pools))  # those columns stand in the labels, or in lines of their own
    blocks = ["\n".join(_settings_lines(pools))] if wide else []
    blocks.append("\n".join(aligned([["", *header[wide:]], *([label, *cells[wide:]] for label, cells in rows)])))
    metrics, body = final_rows(pools)
    lines = [[f"  {name}", *cells] for _, block in body for name, cells in block]
    if lines:
        table = aligned([["mean [95 % interval]", *metrics], *lines])
        blocks.append("\n".join(_with_titles(table, body)))
    differences = {metric: against_first(pools, metric) for metric in METRICS}
    labels = dict.fromkeys(label for values in differences.values() for label in values)
    if labels:
        title = f"trained policy, minus {pools[0].label}"
        cells = [[label, *(_signed(m, values.get(label)) for m, values in differences.items())] for label in labels]
        table = aligned([[title, *map(metric_name, differences)], *cells])
        blocks.append("\n".join([*table, "(paired by seed, interval over seeds)"]))
    return "\n\n".join([*blocks, *cautions(pools)])


def _settings_lines(pools: Sequence[Pool]) -> list[str]:
    """The settings that differ: of the first pool, and of all where their labels do not say them."""
    differing = differing_settings(pools)
    texts = _all_values(differing)
    told = [pool.label for pool in pools] in (texts, _changes_from_first(differing))
    return [f"{pool.label}: {text}" for pool, text in zip(pools, texts, strict=True)][: 1 if told else None]


def _signed(metric: str, value: Mapping[str, float] | None) -> str:
    return interval_text(metric, value, signed=True)


def _with_titles(table: list[str], body: Sequence[tuple[str, list[Row]]]) -> list[str]:
    """Put each pool's title above its lines."""
    lines, rest = [table[0]], iter(table[1:])
    for title, block in body:
        lines += [title, *(next(rest) for _ in block)]
    return lines
