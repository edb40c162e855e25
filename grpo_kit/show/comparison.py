"""The comparison of several runs: its tables as text, its figures, and one page, offline, in which nothing runs."""

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from grpo_kit.config import KitError
from grpo_kit.evaluation import pools as pooling
from grpo_kit.evaluation.table import VARIANT_NAMES, VARIANTS, interval_text, metric_name, number_text
from grpo_kit.runs.record import RunRecord
from grpo_kit.show.curves import seeds_figure
from grpo_kit.show.intervals import interval_figure
from grpo_kit.show.pages import figure_uri, write_page
from grpo_kit.show.style import aligned, plain_text

Row = list[str]  # a label, then the cells


def settings_rows(pools: Sequence[pooling.Pool]) -> list[Row]:
    """Return the settings that differ as a table: header, then a row a pool."""
    differing = pooling.differing_settings(pools)
    names = [name.split(".")[-1] for name in differing]
    rows = [["", *names, "seeds", "iterations", "s an iteration", "minutes"]]
    for number, pool in enumerate(pools):
        row = [pool.label, *(pooling.value_text(values[number]) for values in differing.values())]
        done = sorted({run.iterations for run in pool.runs})
        iterations = f"{done[0]}" if len(done) == 1 else f"{done[0]}–{done[-1]}"
        asked = pool.settings.get("training_settings.num_iterations")
        if asked is not None and done[0] < asked:
            iterations += f" of {asked}"
        times = pool.step_times
        minutes = times.groupby(level=0).sum().mean() / 60  # of a run
        row += [", ".join(map(pooling.value_text, pool.seeds)), iterations]
        rows.append([*row, number_text(times.median(), ".2f"), number_text(minutes, ".1f")])
    return rows


def final_rows(pools: Sequence[pooling.Pool]) -> tuple[list[str], list[tuple[str, list[Row]]]]:
    """Return the final figures as a table: the metrics' names, then for each pool its title and rows.

    A pool that was not evaluated has no rows.
    """
    measured = [m for m in pooling.METRICS if any(pool.final("variants", v, m) for pool in pools for v in VARIANTS)]
    body = []
    for pool in pools:
        lines: list[Row] = []
        for kind, names in (("variants", VARIANTS), ("differences", ("trained-raw", "trained-initial"))):
            for name in names:
                found = [pool.final(kind, name, metric) for metric in measured]
                if any(found):
                    signed = kind == "differences"
                    cells = [interval_text(m, value, signed) for m, value in zip(measured, found, strict=True)]
                    lines.append([VARIANT_NAMES.get(name, name.replace("-", " − ")), *cells])
        seeds = f"{len(pool.runs)} seeds, intervals over seeds" if pool.over_seeds else "1 run, intervals over prompts"
        judged = seeds if any(run.results for run in pool.runs) else "not evaluated"
        body.append((f"{pool.label} ({judged})", lines))
    return [metric_name(metric) for metric in measured], body


def against_rows(pools: Sequence[pooling.Pool]) -> list[Row]:
    """Return each later pool's trained policy minus the first pool's as a table, a column a metric."""
    found = {metric: pooling.against_first(pools, metric) for metric in pooling.METRICS}
    labels = dict.fromkeys(label for values in found.values() for label in values)
    return [
        [label, *(interval_text(metric, values.get(label), signed=True) for metric, values in found.items())]
        for label in labels
    ]


def cautions(pools: Sequence[pooling.Pool]) -> list[str]:
    """Return what a reader must know before believing the comparison; empty where there is nothing."""
    runs = [run for pool in pools for run in pool.runs]
    judged = {(run.results.get("num_prompts"), run.results.get("seeds_per_prompt")) for run in runs if run.results}
    found = []
    if len(judged) > 1:
        texts = sorted(f"{prompts} prompts × {seeds} images" for prompts, seeds in judged)
        found.append(f"The runs were not judged alike ({'; '.join(texts)}): compare their final figures with care.")
    asked = [run.config.get("training_settings", {}).get("num_iterations") or 0 for run in runs]
    lacking = {
        "Not trained to the end": [run for run, planned in zip(runs, asked, strict=True) if run.iterations < planned],
        "Not evaluated": [run for run in runs if not run.results],
    }
    for words, some in lacking.items():
        if some:
            names = plain_text(", ".join(run.path.resolve().name for run in some), 200)
            found.append(f"{words}: {names}.")
    if len({repr(sorted(run.config.get("versions", {}).items())) for run in runs}) > 1:
        found.append("The runs were made with different versions of Python or of a library.")
    return found


def runs_text(pools: Sequence[pooling.Pool]) -> str:
    """Return the whole comparison as plain text for a terminal."""
    blocks, differing = [], pooling.differing_settings(pools)
    wide = len(differing)  # those columns stand in the labels, or in lines of their own
    if differing:
        texts = pooling.setting_texts(differing)
        named = [pool.label for pool in pools] in (texts, pooling.setting_texts(differing, changes_only=True))
        settings = [f"{pool.label}: {text}" for pool, text in zip(pools, texts, strict=True)]
        blocks.append(settings[:1] if named else settings)
    blocks.append(aligned([row[:1] + row[1 + wide :] for row in settings_rows(pools)]))
    metrics, body = final_rows(pools)
    lines = [[f"  {name}", *cells] for _, block in body for name, *cells in block]
    if lines:
        table = iter(aligned([["mean [95 % interval]", *metrics], *lines]))
        blocks.append([next(table)])
        for title, block in body:
            blocks[-1] += [title, *islice(table, len(block))]
    against = against_rows(pools)
    if against:
        heading = [f"trained policy, minus {pools[0].label}", *map(metric_name, pooling.METRICS)]
        blocks.append([*aligned([heading, *against]), "(paired by seed, interval over seeds)"])
    return "\n\n".join(["\n".join(block) for block in blocks] + cautions(pools))


def write_comparison(pools: Sequence[pooling.Pool], path: Path) -> Path:
    """Write the comparison as the page `path`, each run with a link to its own page where it has one."""
    metrics, final = final_rows(pools)
    curves = pooling.curves_table(pools)
    finals = {}  # each pool's trained policy on the held-out prompts, a panel a metric
    for metric in pooling.METRICS:
        found = {pool.label: value for pool in pools if (value := pool.final("variants", "trained", metric))}
        if found:
            finals[f"{metric_name(metric)}, trained policy"] = {"": found}
    return write_page(
        path,
        "comparison.html.j2",
        title=f"{sum(len(pool.runs) for pool in pools)} runs of {len(pools)} settings",
        cautions=cautions(pools),
        settings=settings_rows(pools),
        final={"metrics": metrics, "pools": final},
        against={"first": pools[0].label, "metrics": [*map(metric_name, pooling.METRICS)], "rows": against_rows(pools)},
        charts={
            "finals": figure_uri(interval_figure(finals)) if finals else "",
            "curves": figure_uri(seeds_figure(curves)) if len(curves) else "",
        },
        runs={pool.label: [_run_link(run, path.parent) for run in pool.runs] for pool in pools},
    )


def _run_link(run: RunRecord, folder: Path) -> dict[str, str | None]:
    """A run's name, and where its page lies as seen from the folder of this one."""
    page = run.path.resolve() / "index.html"
    try:
        address = Path(os.path.relpath(page, folder.resolve())).as_posix()
        link = f"./{quote(address)}"  # with ./, so that no name can be read as javascript: or a host
    except ValueError:  # another drive of Windows
        link = page.as_uri()
    return {"name": plain_text(run.path.resolve().name, 100), "link": link if page.is_file() else None}


def print_comparison(folders: Sequence[Path], page: Path, tables: Path | None = None) -> None:
    """Print runs side by side; write their page, a file, and their tables, in a folder; a `KitError` elsewhere."""
    if page.is_dir():
        raise KitError(f"--html {page}: a folder. Name a file in it")
    if tables is not None and tables.is_file():
        raise KitError(f"--tables {tables}: a file. Name a folder")
    pools = pooling.pool_runs(pooling.read_runs(folders))
    print(f"\n{runs_text(pools)}\n\ncomparison: {write_comparison(pools, page)}")
    if tables is not None:
        print(f"tables: {pooling.write_tables(pools, tables)}")
