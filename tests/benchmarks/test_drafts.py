"""What docs/training.md says of denoising steps in training is what its recorded runs give."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from benchmarks.studies import drafts
from benchmarks.studies.budget import keep
from grpo_kit.config import PROJECT_ROOT, load_config

RUNS = pd.read_json(PROJECT_ROOT / "docs" / "drafts.jsonl", lines=True, dtype={"arm": str, "seed": str}).set_index(
    ["arm", "seed"]
)
TEXT = (PROJECT_ROOT / "docs" / "training.md").read_text(encoding="utf-8")
COLUMNS = [*drafts.METRICS[1:], "cpu_seconds"]


def test_the_table_is_that_of_the_recorded_runs():
    table = drafts.results(RUNS).set_index("arm")
    assert set(table["training seeds"]) == {10}
    for arm in "8432":
        digits = [0 if name == "cpu_seconds" else 3 for name in COLUMNS]
        cells = [
            f"{table.loc[arm, name]:.{d}f} ± {table.loc[arm, f'{name} ±']:.{d}f}"
            for name, d in zip(COLUMNS, digits, strict=True)
        ]
        assert f"| {arm} | {' | '.join(cells)} |" in TEXT
    less = "gold less 8 steps'"
    assert f"4 steps less 8 is {table.loc['4', less]:+.3f} ± {table.loc['4', f'{less} ±']:.3f}" in TEXT
    assert f"cost {table.loc['4', 'cpu_seconds'] / table.loc['8', 'cpu_seconds']:.2f} of" in TEXT


def test_the_sentences_about_the_grammar_count_the_recorded_runs():
    words = ("none", "one", "two", "three", "four")
    text, low = " ".join(TEXT.split()), (RUNS["reward/grammatical"] < 0.9).groupby("arm").sum()
    told = [words[low[arm]] for arm in "8432"]
    assert "in {} of ten runs with 8 steps, in {} with 4, in {} with 3 and in {} with 2".format(*told) in text
    counts = RUNS[["rewrites", "outside", "repeating"]].sum()
    said = re.search(r"Of the ([\d,]+) rewrites (\d+) are outside the grammar, and (\d+) of them repeat", text)
    assert [int(number.replace(",", "")) for number in said.groups()] == counts.tolist()


def test_what_the_readme_says_of_ten_seeds() -> None:
    """The profile's own arm, and how often all steps lead out of the grammar."""
    own, text = RUNS.loc["4"], " ".join((PROJECT_ROOT / "README.md").read_text(encoding="utf-8").split())
    assert len(own) == 10 and load_config("tiny").generation_settings.rollout_steps == 4
    low, high = (f"{100 * own['reward/gold'].agg(end):.0f}" for end in ("min", "max"))
    assert f"ends between {low} and {high} %" in text
    assert f"at least {100 * own['reward/grammatical'].min():.0f} % of its rewrites follow the grammar" in text
    assert int((RUNS.loc["8", "reward/grammatical"] < 0.9).sum()) == 3 and "three of ten seeds come to repeat" in text


def test_runs_are_counted_by_rewrite_and_averaged_over_latents(tmp_path):
    rows = [("a ring, crisp", 1), ("a ring, crisp, crisp", 0), ("ring", 0)]
    frame = pd.DataFrame(
        {"prompt_id": n, "text": text, **dict.fromkeys(drafts.METRICS, grammar), "cpu_seconds": 2.0}
        for n, (text, grammar) in enumerate(rows)
        for _ in range(2)
    )
    keep(frame, tmp_path / "4-0.1_3.parquet")
    found = drafts.runs(tmp_path).loc[("4-0.1", "3")]
    assert found[["rewrites", "outside", "repeating"]].tolist() == [3, 2, 1]
    assert found["reward"] == pytest.approx(1 / 3) and found["cpu_seconds"] == 2
