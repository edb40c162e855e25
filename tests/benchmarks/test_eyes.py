"""The study of the policy that looks: what its table says is what its runs were, and the document shows no other."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.studies import eyes
from grpo_kit.config import PROJECT_ROOT

RECORDED = PROJECT_ROOT / "docs" / "eyes.json"
DOCUMENT = PROJECT_ROOT / "docs" / "eyes.md"


@pytest.fixture(scope="module")
def recorded() -> eyes.Results:
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def test_the_document_has_the_tables_of_the_recorded_study(recorded: eyes.Results):
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, table in eyes.markdown(recorded).items():
        assert table in text, name


def test_each_arm_has_its_seeds_and_its_intervals(recorded: eyes.Results):
    assert list(recorded) == list(eyes.ARMS)
    for arm in recorded:
        for row, metrics in recorded[arm].items():
            for name, value in metrics.items():
                assert value["low"] <= value["mean"] <= value["high"], (arm, row, name)
                assert value["seeds"] == (3 if arm in eyes.COSTS else 5) or name.startswith("kept"), (arm, row, name)


def test_percentages_in_the_text_stand_in_a_table(recorded: eyes.Results):
    text = DOCUMENT.read_text(encoding="utf-8")
    _, _, measured = text.partition("## What was measured")
    prose = "\n".join(line for line in measured.splitlines() if not line.startswith("|"))
    table = "\n".join(eyes.markdown(recorded).values())
    for figure in re.findall(r"(\d+\.\d) %", prose):
        assert re.search(rf"(?<![\d.]){re.escape(figure)} \[", table), figure


def test_a_first_turn_that_is_paid_for_its_own_picture_draws_a_better_one(recorded: eyes.Results):
    """By the intervals over seeds; after looking no credit is better than another, and none keeps "keep it"."""
    final, *others = (recorded[arm] for arm in ("refine", "refine-difference", "refine-branches"))
    for other in others:
        assert other["first picture"]["gold"]["low"] > final["first picture"]["gold"]["high"]
        assert other["own"]["gold"]["low"] < final["own"]["gold"]["high"]
        assert other["own"]["gold"]["high"] > final["own"]["gold"]["low"]
    assert all(arm["own"][f"kept when {what}"]["mean"] == 0 for arm in (final, *others) for what in ("right", "wrong"))


def test_notebook_11_cites_the_recorded_study(recorded: eyes.Results):
    cells = json.loads((PROJECT_ROOT / "notebooks" / "11_eyes.ipynb").read_text(encoding="utf-8"))["cells"]
    (cell,) = [cell for cell in cells if cell["id"] == "trained-to-the-end"]
    table = eyes.markdown(recorded)["looks"]
    cited = re.findall(r"(\d+\.\d) %", "".join(cell["source"]))
    assert len(cited) == 7 and all(re.search(rf"(?<![\d.]){re.escape(one)} \[", table) for one in cited)
    refine = recorded["refine"]
    assert refine["own"]["right"]["low"] > refine["best blind"]["right"]["high"]  # "brings more"
    assert refine["own"]["gold"]["low"] < refine["best blind"]["gold"]["mean"]  # "one could not tell"


def test_results_are_means_over_seeds(tmp_path: Path):
    for seed, gold in enumerate((0.5, 0.9)):
        rows = pd.DataFrame(
            {"arm": ["raw", "trained"] * 2, "gold": [0.1, gold, 0.3, gold], "right": 0.0, "reward": 0.2}
        )
        rows.assign(changed=0.25 + seed / 2).to_parquet(tmp_path / f"redraw_{seed}.parquet")
    found = eyes.results(tmp_path)
    assert list(found) == ["redraw"] and found["redraw"]["raw"]["gold"]["mean"] == pytest.approx(0.2)
    assert found["redraw"]["trained"]["gold"]["mean"] == pytest.approx(0.7)
    assert found["redraw"]["trained"]["changed by another picture"]["mean"] == pytest.approx(0.5)
    half = 12.706 * np.std([0.5, 0.9], ddof=1) / np.sqrt(2)
    assert found["redraw"]["trained"]["gold"]["high"] == pytest.approx(0.7 + half, rel=1e-3)


def test_what_is_kept_is_counted_by_whether_the_first_picture_was_right(tmp_path: Path):
    rows = pd.DataFrame(
        {
            "arm": ["own"] * 4 + ["other"] * 4,
            "prompt_id": [0, 1, 2, 3] * 2,
            "seed": 0,
            "text": ["a", "b", "c", "d", "a", "x", "y", "d"],
            "kept": [True, False, True, False] * 2,
            "first_right": [True, True, False, False] * 2,
            "gold": 1.0,
            "right": 1.0,
            "reward": 1.0,
        }
    )
    rows.to_parquet(tmp_path / "refine_0.parquet")
    own = eyes.results(tmp_path)["refine"]["own"]
    assert own["kept when right"]["mean"] == own["kept when wrong"]["mean"] == 0.5
    assert own["changed by another picture"]["mean"] == 0.5


def test_an_arm_changes_what_its_name_says():
    assert eyes.configured("redraw-grey", 3).model_settings.look_at == "grey"
    branches, cost = (eyes.configured(arm, 0) for arm in ("refine-branches", "refine-cost0.05"))
    assert branches.generation_settings.branches and cost.generation_settings.branches
    assert (branches.training_settings.redraw_cost, cost.training_settings.redraw_cost) == (0, 0.05)
    assert eyes.configured("refine-difference", 0).generation_settings.credit == "difference"
    plain = eyes.configured("edit", 2, 7)
    assert (plain.training_settings.seed, plain.training_settings.num_iterations) == (2, 7)
    assert plain.profile == "tiny_edit" and plain.model_settings.look_at == "own"
