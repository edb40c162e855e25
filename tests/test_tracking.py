"""wandb mirrors a run when the config says so, and otherwise is not even imported."""

import subprocess
import sys
from pathlib import Path

from grpo_kit.config import load_config
from grpo_kit.runs.tracking import Tracker


def test_offline_wandb_gets_the_metrics_under_their_own_steps(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = load_config("tiny", {"tracking_settings.wandb": "offline"})
    with Tracker(config, tmp_path) as tracker:
        tracker.log({"iteration": 1, "reward": 0.25})
        tracker.log({"iteration": 1, "reward": 0.5}, prefix="eval")
        assert tracker._run.summary["train/reward"] == 0.25
        assert tracker._run.summary["eval/reward"] == 0.5
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_disabled_tracking_neither_imports_wandb_nor_writes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from grpo_kit.config import load_config\n"
        "from grpo_kit.runs.tracking import Tracker\n"
        f"with Tracker(load_config('tiny'), Path({str(tmp_path)!r})) as tracker: tracker.log({{'iteration': 1}})\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert not list(tmp_path.iterdir())
