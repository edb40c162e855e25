"""The study of learning: a run and its control on random rewards are both judged by the profile's rewards."""

import json
from pathlib import Path

import pytest

from benchmarks.studies import learning

SHORT = {
    "profile": "tiny",
    "generation_settings": {"num_inference_steps": 1, "rollout_steps": None},
    "training_settings": {"num_iterations": 1, "prompts_per_iteration": 2, "group_size": 2, "validate_every": 1},
    "evaluation_settings": {"num_prompts": 6, "seeds_per_prompt": 1, "paraphrases": False, "validation_prompts": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("random_rewards", [False, True])
def test_a_run_is_trained_and_judged_once(tmp_path: Path, random_rewards: bool):
    profile = tmp_path / "short.json"
    profile.write_text(json.dumps(SHORT), encoding="utf-8")
    run = tmp_path / "run"
    learning.measure(run, str(profile), 0, random_rewards)
    written = (run / "final_results.json").read_bytes()
    variants = json.loads(written)["variants"]
    assert list(variants) == list(learning.COMPARE)
    assert all(metrics["reward"]["mean"] <= 1 and metrics["gold"]["mean"] <= 1 for metrics in variants.values())
    metrics = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert ("rewards/random/mean" in metrics) == random_rewards
    learning.measure(run, str(profile), 0, random_rewards)
    assert (run / "final_results.json").read_bytes() == written
