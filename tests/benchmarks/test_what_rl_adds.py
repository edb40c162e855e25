"""How much the RL adds: the supervised arm is plain cross-entropy on the best rewrites, and pictures are equal."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks.studies import what_rl_adds as study
from benchmarks.studies.budget import keep
from grpo_kit.config import PROJECT_ROOT
from grpo_kit.experiment import Experiment
from grpo_kit.models.rows import row_logits


def test_the_best_row_of_each_group_is_the_first_with_the_highest_usable_reward() -> None:
    nan, groups = torch.nan, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    rewards = torch.tensor([0.1, 0.9, 0.9, nan, -1.0, -2.0, nan, torch.inf])
    assert study.best_rows(rewards, groups).tolist() == [1, 4], "no row of the group without a score"
    assert len(study.best_rows(torch.full((2,), nan), torch.tensor([0, 0]))) == 0


def test_the_supervised_loss_has_the_gradient_of_torch_cross_entropy(own_kit: Experiment) -> None:
    policy, prompts = own_kit.policy, [prompt.user_prompt for prompt in own_kit.train_prompts[:3]]
    drawn, rows = policy.sample(prompts, 1, seed=3), torch.arange(3)
    with torch.enable_grad():
        own = study.cross_entropy(policy.score(prompts, rows, drawn.ids, drawn.mask).logprobs, drawn.mask)
        inputs = policy.encode(prompts).on(policy.device)
        logits = row_logits(policy.model, inputs, drawn.ids, drawn.mask)[drawn.mask]
        plain = torch.nn.functional.cross_entropy(logits, drawn.ids[drawn.mask])
        parameters = policy.trainable_parameters()
        gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (own, plain)]
    torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-6)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def _write(out: Path, arm: str, seed: int, score: float, pictures: int) -> None:
    rows = pd.DataFrame({"prompt_id": [0, 1], **dict.fromkeys(study.METRICS, score)})
    keep(rows.assign(pictures=pictures, cpu_seconds=1.0), out / f"{arm}_{seed}.parquet")


def test_the_table_has_intervals_over_seeds_and_refuses_unequal_pictures(tmp_path: Path) -> None:
    for seed, luck in enumerate((0.0, 0.1, 0.2)):
        _write(tmp_path, "raw", seed, luck, 0)
        _write(tmp_path, "supervised", seed, 0.4 + luck, 3840)
        _write(tmp_path, "GRPO", seed, 0.5 + luck, 3840)
    table = study.results(tmp_path).set_index("arm")
    assert list(table.index) == ["raw", "supervised", "GRPO"] and set(table["seeds"]) == {3}
    row, name = table.loc["supervised"], "GRPO's final check less this"
    assert row["final check"] == pytest.approx(0.5) and row["final check, high"] == pytest.approx(
        0.5 + 4.303 * 0.0577, abs=1e-3
    )
    assert row[name] == pytest.approx(0.1) == row[f"{name}, low"], "paired by seed, so shared luck drops out"
    assert study.figure(table.reset_index()).alt.endswith("GRPO 0.600.")
    _write(tmp_path, "supervised", 3, 0.9, 3872)  # one more rollout than the others
    with pytest.raises(ValueError, match=r"pictures: found .*3,872"):
        study.results(tmp_path)


def test_what_the_documents_say_is_what_was_recorded() -> None:
    """docs/training.md has a row an arm and three differences, README and notebook 08 the last one."""
    rows = {row["arm"]: row for row in json.loads((PROJECT_ROOT / "docs" / "what_rl_adds.json").read_text("utf-8"))}
    assert list(rows) == list(study.ARMS) and {row["seeds"] for row in rows.values()} == {5}
    text = _flat(PROJECT_ROOT / "docs" / "training.md")
    for arm, row in rows.items():
        check = "{:.3f} [{:.3f}, {:.3f}]".format(*(row[f"final check{end}"] for end in ("", ", low", ", high")))
        others = f"{row['reward']:.3f} | {row['keeps objects']:.3f} | {row['CPU-seconds']:.0f}"
        assert f"| {arm} | {row['pictures']:,} | {check} | {others} |" in text
    less = {arm: _difference(rows[arm], "final check") for arm in (study.BEST, "supervised once", "supervised")}
    assert f"*supervised once* by {less['supervised once']}, and than *best of 8* by {less[study.BEST]}" in text
    assert f"differs by {less['supervised']}, the reward by {_difference(rows['supervised'], 'reward')}" in text
    readme = _flat(PROJECT_ROOT / "README.md")
    assert f"GRPO's check less its own is {less['supervised']}, over five seeds" in readme
    assert f"once, before training, it ends at {rows['supervised once']['final check']:.3f}." in readme
    cells = json.loads((PROJECT_ROOT / "notebooks" / "08_evaluate.ipynb").read_text("utf-8"))["cells"]
    told = " ".join(" ".join("".join(cell["source"]) for cell in cells).split())
    for arm in study.ARMS:
        assert f"| {arm} | {rows[arm]['final check']:.3f} |" in told
    assert f"differ by {less['supervised']}" in told


def _difference(row: dict, name: str) -> str:
    ends = (row[f"GRPO's {name} less this{end}"] for end in ("", ", low", ", high"))
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*ends).replace("-", "−")


def _flat(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8").split())
