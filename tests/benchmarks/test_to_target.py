"""W15: when a run has reached its target, and what is made of the recorded looks."""

from pathlib import Path

import pandas as pd
import pytest

from benchmarks.speed import to_target
from benchmarks.speed.results import BenchmarkError, Settings, fingerprint
from benchmarks.studies.budget import keep


def looks(*checks: float) -> pd.DataFrame:
    rows = enumerate(checks, start=1)
    return pd.DataFrame({"iterations": 2 * n, "cpu_seconds": 3.0 * n, "check": check} for n, check in rows)


def test_a_run_has_reached_it_at_the_first_of_two_looks_in_a_row_that_find_it():
    assert to_target.reached(looks(0.5, 0.91, 0.89, 0.9, 0.95)) == (8, 12.0)
    assert all(value != value for value in to_target.reached(looks(0.5, 0.91, 0.89, 0.95)))


def recorded(out: Path, late: int) -> Path:
    folder = out / str(fingerprint(Settings())["code"])
    for seed in range(2):
        keep(looks(*[0.5] * (late + seed), 0.9, 0.9), folder / f"all steps_{seed}.parquet")
        keep(looks(*[0.5] * seed, 0.9, 0.9), folder / f"as the profile_{seed}.parquet")
    return folder


def test_the_figure_is_the_ratio_of_seconds_paired_by_seed(tmp_path):
    recorded(tmp_path, late=2)
    found = {figure.name: figure for figure in to_target.to_target(Settings(quick=True), tmp_path).figures}
    ratio = found["CPU-seconds to 90% of the check, by all steps'"]
    assert ratio.value == pytest.approx((1 / 3 * 2 / 4) ** 0.5) and ratio.must == 0.5
    assert found["CPU-seconds, all steps"].value == pytest.approx(10.5)


def test_a_run_that_never_reaches_it_is_named(tmp_path):
    keep(looks(0.5, 0.6), recorded(tmp_path, late=2) / "all steps_1.parquet")
    with pytest.raises(BenchmarkError, match="not reached by: all steps, seed 1"):
        to_target.to_target(Settings(quick=True), tmp_path)
