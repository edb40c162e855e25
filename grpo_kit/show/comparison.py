"""The tables of a comparison of runs: settings that differ, final figures, and what a reader must know of both."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_kit.evaluation.intervals import Interval
from grpo_kit.evaluation.pools import METRICS, Pool, against_first, differing_settings, setting_texts, value_text
from grpo_kit.runs.record import RunRecord
from grpo_kit.show.style import VARIANT_NAMES, VARIANTS, aligned, metric_name, number_text, plain_text
from grpo_kit.show.summary import interval_text

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
    texts = setting_texts(differing)
    told = [pool.label for pool in pools] in (texts, setting_texts(differing, changes_only=True))
    return [f"{pool.label}: {text}" for pool, text in zip(pools, texts, strict=True)][: 1 if told else None]


def _signed(metric: str, value: Interval | None) -> str:
    return interval_text(metric, value, signed=True)


def _with_titles(table: list[str], body: Sequence[tuple[str, list[Row]]]) -> list[str]:
    """Put each pool's title above its lines."""
    lines, rest = [table[0]], iter(table[1:])
    for title, block in body:
        lines += [title, *(next(rest) for _ in block)]
    return lines
