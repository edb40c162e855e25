"""What the commands print of a run: the table of its evaluation, and minutes."""

import json
from collections.abc import Sequence
from pathlib import Path

from grpo_kit.config import KitError
from grpo_kit.evaluation.pools import pool_runs, read_runs, write_tables
from grpo_kit.runs.notebooks import Executed
from grpo_kit.show.comparison import runs_text, write_comparison
from grpo_kit.show.report import write_report
from grpo_kit.show.summary import comparison_table, pooled_table


def print_results(folder: Path) -> None:
    """Print the table of a run's evaluation, with pooled seeds and minutes; nothing where there is no evaluation."""
    results = folder / "final_results.json"
    if not results.is_file():
        return
    data = json.loads(results.read_text(encoding="utf-8"))
    print(f"\n{comparison_table(data)}")
    for found in data.get("pooled", {}).values():
        print(f"\n{found['training_seeds']} training seeds of one setting, pooled ({', '.join(found['policies'])}):")
        print(pooled_table(found))
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


def print_comparison(folders: Sequence[Path], page: Path, tables: Path | None = None) -> None:
    """Print runs side by side, write the page that compares them, and into the folder `tables` their figures.

    Raises:
        KitError: the page's path is a folder, or that of the tables a file.
    """
    if page.is_dir():
        raise KitError(f"--html {page}: a folder. Name a file in it")
    if tables is not None and tables.is_file():
        raise KitError(f"--tables {tables}: a file. Name a folder")
    pools = pool_runs(read_runs(folders))
    print(f"\n{runs_text(pools)}\n\ncomparison: {write_comparison(pools, page)}")
    if tables is not None:
        print(f"tables: {write_tables(pools, tables)}")
