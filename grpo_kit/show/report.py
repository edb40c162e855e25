"""A run as one page to open, project or send: offline, self-contained, nothing in it runs; and as text."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from grpo_kit.config import KitError
from grpo_kit.config.media import as_html, open_medium
from grpo_kit.evaluation import table
from grpo_kit.runs.notebooks import Executed
from grpo_kit.runs.record import RunRecord, file_beside, read_run
from grpo_kit.show import summary
from grpo_kit.show.curves import CURVES, training_curves
from grpo_kit.show.images import SMOOTH_FROM
from grpo_kit.show.intervals import category_plot, comparison_plot, looks_plot
from grpo_kit.show.loop import loop_figure
from grpo_kit.show.pages import NotebookPage, figure_uri, image_uri, write_notebook_pages, write_page
from grpo_kit.show.style import Drawing, score_text

CASES, LOSSES = 8, 3


def write_report(run_dir: Path) -> Path:
    """Write `index.html` into a run folder, each of its executed notebooks as a page beside it, and return its path.

    What the run does not hold yet is left out of the page; no run, or a damaged file in it, is a `RecordError`.
    """
    record = read_run(run_dir)
    notebooks = write_notebook_pages(record.path / "notebooks")
    results, branch, kept = record.results, record.branch, record.rollout_iterations
    metrics, rows = table.comparison_rows(results)
    header, categories = summary.category_rows(record)
    first = next(iter(sorted(record.path.glob("thumbnails/*"))), None)
    context = {
        "name": record.path.resolve().name,
        "profile": record.config.get("profile"),
        "origin": f"branch of {branch.get('parent')}, {record.branch_text()}" if branch else "",
        "headline": summary.headline(results),
        "paragraph": summary.paragraph(record),
        "warning": _warning(record),
        "tiles": _tiles(results),
        "charts": {
            "loop": figure_uri(loop_figure()),
            "comparison": _chart(comparison_plot, results),
            "categories": _chart(category_plot, results),
            "looks": _chart(looks_plot, results),
            "curves": _chart(training_curves, record.metrics, record.validations, sentinel=record.sentinel),
        },
        "curve_names": ", ".join(CURVES[name][0] for name in CURVES if name in record.metrics),
        "confidence": table.percent(results.get("confidence", 0.95)),
        "comparison": {"metrics": metrics, "rows": rows},
        "pixelated": first is not None and record.image(f"thumbnails/{first.name}").width < SMOOTH_FROM,
        "cases": [_case(record, case) for case in summary.representative_cases(record.evaluation, CASES)],
        "losses": [_case(record, case) for case in summary.worst_cases(record.evaluation, LOSSES)],
        "groups": {iteration: _group(record, iteration) for iteration in kept[:1] + kept[-1:]},
        "categories": {"header": header, "rows": categories},
        "minutes": _minutes(record, notebooks),
        "notebooks": notebooks,
        "config": json.dumps(record.config, indent=2, ensure_ascii=False) if record.config else "",
    }
    return write_page(record.path / "index.html", "report.html.j2", **context)


def _warning(record: RunRecord) -> str:
    """Return a caution where training or the evaluation gives reason to doubt the reward; else an empty text."""
    differences, divergence = record.results.get("differences", {}), record.sentinel.get("divergence")
    if divergence:
        return f"The check for reward hacking, {divergence['text']}. Look at the gallery before you believe the reward."
    change = differences.get("trained-raw", {})
    if [summary.direction(change.get(m)) for m in ("reward", "gold")] == [summary.RISES, summary.FALLS]:
        return "The reward and the gold check part ways: look at the gallery before you believe the reward."
    if summary.direction(differences.get("trained-initial", {}).get("keeps_objects")) == summary.FALLS:
        return "The trained policy keeps the user's objects less often than the initial one did: read its rewrites."
    return ""


def _tiles(results: Mapping) -> list[tuple[str, str]]:
    """Return the run's main numbers, each with what it is."""
    change = results.get("differences", {}).get("trained-raw", {})
    tiles = []
    for metric, words in (("reward", "reward"), ("gold", "points in the gold check")):
        if metric in change:
            value, interval = table.interval_text(metric, change[metric], signed=True).split(" ", 1)
            tiles.append((value, f"{words} over the raw prompt {interval}"))
    shares = {
        "gap_closed": "of the way from the raw prompt to the oracle (gold check)",
        "success_rate": "of the prompts have a better gold check than before",
    }
    found = [(table.percent(results.get(key, {}).get("gold")), words) for key, words in shares.items()]
    return tiles + [tile for tile in found if tile[0] != "–"]


def _chart(draw: Callable[..., Drawing], *data: object, **more: object) -> str:
    """Return a figure as a data URI; an empty text where the run holds nothing for it yet."""
    try:
        return figure_uri(draw(*data, **more))
    except KitError:
        return ""


def _case(record: RunRecord, case: summary.Case) -> list[dict[str, object]]:
    """Return one row of the gallery: what a prompt and a seed gave, a picture a variant."""
    rows = record.evaluation
    rows = rows[(rows["prompt_id"] == case[0]) & (rows["seed"] == case[1])].set_index("variant", drop=False)
    shown = [rows.loc[variant] for variant in table.VARIANTS if variant in rows.index]
    return [_picture(record, row, score_text(row), name=table.VARIANT_NAMES[row["variant"]]) for row in shown]


def _group(record: RunRecord, iteration: int) -> list[dict[str, object]]:
    """Return the group of an iteration whose rewards differ most, best sample first."""
    return [
        _picture(
            record,
            row,
            f"{table.format_metric('reward', row['reward'])} · {table.number_text(row['advantage'], '+.2f')}",
        )
        for _, row in record.widest_group(iteration).iterrows()
    ]


def _picture(record: RunRecord, row: pd.Series, scores: str, **more: str) -> dict[str, object]:
    """Return a row with its scores as text, its picture as a data URI (None: it has none) and what plays it."""
    file = row.get("thumbnail")
    address = image_uri(record.file(file)) if isinstance(file, str) and file else None
    beside, played = file_beside(record.file(file)) if address else None, ""
    if beside is not None:
        words = (more.get("name"), row.get("text"), row.get("enhanced_prompt"))
        played = as_html(open_medium(beside), ": ".join(filter(None, words)), "100%")
        address = None if beside.suffix == ".wav" else address  # a sound's picture is part of what plays it
    return {**row, "scores": scores, "address": address, "played": played, **more}


def _minutes(record: RunRecord, notebooks: Sequence[NotebookPage]) -> dict[str, dict[str, float]]:
    """Return tables of minutes: by notebook, by stage of the run, by part of a training iteration."""
    parts = record.metrics.filter(regex="^time/").sum() / 60
    tables = {
        "by notebook": {page.title: page.minutes for page in notebooks if page.minutes is not None},
        "by stage": record.results.get("minutes", {}),
        "training, by part of an iteration": parts.rename(lambda name: name.removeprefix("time/")).to_dict(),
    }
    return {heading: values for heading, values in tables.items() if values}


def print_results(folder: Path) -> None:
    """Print the table of a run's evaluation, with pooled seeds and minutes; nothing where there is no evaluation."""
    results = folder / "final_results.json"
    if not results.is_file():
        return
    data = json.loads(results.read_text(encoding="utf-8"))
    print(f"\n{summary.comparison_table(data)}")
    for found in data.get("pooled", {}).values():
        print(f"\n{found['training_seeds']} training seeds of one setting, pooled ({', '.join(found['policies'])}):")
        print(summary.pooled_table(found))
    if data.get("minutes"):
        print("\nminutes per stage")
        for stage, minutes in data["minutes"].items():
            print(f"  {stage:<12} {minutes:6.1f}")


def print_run(folder: Path, ran: Sequence[Executed]) -> None:
    """Print what a series of notebooks brought, how long each took and which one failed; and write the run's page."""
    print_results(folder)
    rows = [(one.name, one.minutes, "  failed" if one.error else "") for one in ran]
    rows.append(("together", sum(minutes for _, minutes, _ in rows), ""))
    width = max(len(name) for name, _, _ in rows)
    print("\nminutes per notebook")
    for name, minutes, outcome in rows:
        print(f"  {name:<{width}}  {minutes:6.1f}{outcome}")
    print(f"\nreport: {write_report(folder)}")
