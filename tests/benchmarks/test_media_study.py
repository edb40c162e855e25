"""The study of films and tones: what its tables say is what its runs were, and the document shows no others."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import media
from grpo_kit.config import PROJECT_ROOT

RECORDED = PROJECT_ROOT / "docs" / "media.json"
DOCUMENT = PROJECT_ROOT / "docs" / "media.md"
WORLDS = tuple(media.PROFILES)


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads(RECORDED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("world", WORLDS)
def test_the_document_has_the_tables_of_the_recorded_study(recorded: dict, world: str):
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, table in media.markdown(recorded[world]).items():
        assert table in text, name


def test_figures_in_the_text_stand_in_a_table(recorded: dict):
    _, _, measured = DOCUMENT.read_text(encoding="utf-8").partition("## What was measured")
    prose = "\n".join(line for line in measured.splitlines() if not line.startswith(("|", "!")))
    tables = "\n".join(table for world in WORLDS for table in media.markdown(recorded[world]).values())
    for figure in re.findall(r"-?\d\.\d{3}", prose):
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", tables), figure


@pytest.mark.parametrize("world", WORLDS)
def test_the_generators_rates_are_those_of_their_cards(world: str):
    card = json.loads((PROJECT_ROOT / "data" / world / "generator" / "card.json").read_text(encoding="utf-8"))
    rates = card["metrics"]["obeys the best caption"]
    row = f"| {' | '.join(f'{100 * rate:.0f}' for rate in rates.values())} |"
    assert row in DOCUMENT.read_text(encoding="utf-8"), row


@pytest.mark.parametrize("world", WORLDS)
def test_each_world_is_learned_and_its_game_is_found(recorded: dict, world: str):
    """The intervals over seeds leave no doubt; no alarm is in the arm that is mended."""
    trained = recorded[world]["learning"]["trained on the reward"]["gold"]
    control = recorded[world]["learning"]["trained on random rewards"]["gold"]["trained"]
    assert trained["trained"]["low"] > max(trained["raw"]["high"], trained["initial"]["high"], control["high"])
    alarms = {arm: [] for arm in media.ARMS[world]}
    for run in recorded[world]["arms"]:
        alarms[run["arm"]].append(run["divergence"] is not None)
    assert alarms == {"game": [True] * 3, "mended": [False] * 3}


def test_results_are_means_over_seeds(tmp_path: Path):
    for seed, gold in enumerate((0.5, 0.9)):
        metrics = {name: {"mean": gold, "low": gold, "high": gold} for name in ("reward", "gold")}
        for run in ("seed", "random_rewards"):
            (tmp_path / f"{run}_{seed}").mkdir()
            variants = {"variants": {"raw": metrics, "trained": metrics}}
            (tmp_path / f"{run}_{seed}" / "final_results.json").write_text(json.dumps(variants), encoding="utf-8")
    found = media.pooled(media.compared(tmp_path))
    assert list(found) == ["trained on the reward", "trained on random rewards"]
    half = 12.706 * np.std([0.5, 0.9], ddof=1) / np.sqrt(2)
    for metrics in found.values():
        assert metrics["gold"]["trained"]["mean"] == pytest.approx(0.7)
        assert metrics["gold"]["trained"]["high"] == pytest.approx(0.7 + half, rel=1e-3)
    assert "0.700" in media.markdown({"watched": [], "learning": found, "arms": []})["learning"]
