"""Saved runs and policies beside each other: what they are called, what answers for them, and the command."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from support.config_files import save_config

from grpo_kit import cli
from grpo_kit.config import KitError, load_config
from grpo_kit.evaluation.evaluate import evaluate, name_variants, rewrites
from grpo_kit.evaluation.pools import pool_evaluations
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator
from grpo_kit.models.policy import Policy
from grpo_kit.rewards.composition import Rewards
from grpo_kit.show.summary import comparison_table

QUICK = {
    "evaluation_settings.num_prompts": 5,
    "evaluation_settings.seeds_per_prompt": 2,
    "evaluation_settings.n_resamples": 200,
    "evaluation_settings.paraphrases": False,
    "generation_settings.num_inference_steps": 2,
    "model_settings.device": "cpu",
}


@pytest.fixture(scope="module")
def quick(kit: Experiment) -> Experiment:
    """Five prompts, two latents, two denoising steps."""
    generator = Generator(kit.generator.pipeline, num_inference_steps=2, guidance_scale=1.0)
    return dataclasses.replace(kit, config=load_config(kit.config, QUICK), generator=generator)


@pytest.fixture
def runs(own_policy: Policy, tmp_path: Path) -> list[Path]:
    """Two runs of one setting, two training seeds; the first one's policy is the initial one."""
    folders = []
    for seed, scale in enumerate((1.0, 1.5)):
        with torch.no_grad():
            for parameter in own_policy.trainable_parameters():
                parameter.mul_(scale)
        folder = tmp_path / f"run-{seed}"
        folder.mkdir()
        save_config(load_config("tiny", {**QUICK, "training_settings.seed": seed}), folder / "config.json")
        own_policy.save_pretrained(folder / "best")
        folders.append(folder)
    return folders


# --- who answers ------------------------------------------------------------------------------------------------------


def test_a_run_is_answered_for_by_its_best_policy(quick: Experiment, runs: list[Path]):
    prompts = quick.val_prompts[:5]
    initial = rewrites(quick, prompts, "initial")
    assert rewrites(quick, prompts, runs[0]) == rewrites(quick, prompts, runs[0] / "best") == initial
    assert rewrites(quick, prompts, runs[1]) != initial
    alone = shutil.copytree(runs[1] / "best", runs[1].parent / "policy")
    assert rewrites(quick, prompts, alone) == rewrites(quick, prompts, runs[1])


def test_a_run_answers_under_its_own_settings(quick: Experiment, runs: list[Path]):
    other = load_config("tiny", {**QUICK, "generation_settings.max_new_tokens": 3})
    save_config(other, runs[0] / "config.json")
    prompts = quick.val_prompts[:3]
    cut = [quick.policy.tokenizer(text).input_ids for text in rewrites(quick, prompts, runs[0])]
    assert max(map(len, cut)) <= 3 < max(len(text.split()) for text in rewrites(quick, prompts, "initial"))


def test_runs_are_compared_with_raw_and_with_the_first(quick: Experiment, runs: list[Path], tmp_path: Path):
    out = tmp_path / "new" / "folder"
    found = evaluate(quick, compare=("raw", "initial", *runs), run_dir=out)
    assert set(found.rows["variant"]) == {"raw", "initial", "run_0", "run_1"}
    assert list(found.results["differences"]) == ["initial-raw", "run_0-raw", "run_1-raw", "run_1-run_0"]
    same = found.rows.pivot(index=["prompt_id", "seed"], columns="variant", values="reward")
    np.testing.assert_array_equal(same["run_0"], same["initial"])  # the same weights on the same latents
    assert (same["run_1"] != same["initial"]).any()
    assert found.results["policies"] == {"run_0": str(runs[0]), "run_1": str(runs[1])}
    assert (out / "thumbnails" / "evaluation_0_run_1_0.jpg").is_file()
    table = comparison_table(found.results)
    assert "run_1 − run_0" in table and "\nrun_1 " in table and "A difference run_1 − run_0" in table


def test_a_run_beside_the_trained_policy_is_compared_with_it(quick: Experiment, runs: list[Path]):
    found = evaluate(quick, compare=("raw", "trained", runs[1]))
    assert "run_1-trained" in found.results["differences"] and "run_1-raw" in found.results["win_rate"]


def test_rewards_hear_which_prompt_and_which_latent(quick: Experiment):
    heard = {}

    def listening(
        images: list, prompts: list[str], rewrites: list[str], group_ids: torch.Tensor, image_seeds: torch.Tensor
    ) -> list[float]:
        heard.update(groups=group_ids.tolist(), seeds=image_seeds.tolist())
        return [1.0] * len(images)

    monitored = dataclasses.replace(quick.rewards, monitors={"listening": listening})
    evaluate(quick.with_rewards(monitored), quick.val_prompts[:3], compare=("raw",))
    assert heard["groups"] == [0, 0, 1, 1, 2, 2] and len(set(heard["seeds"])) == 6


def test_every_scored_part_is_compared_and_the_total_is_the_raw_sum(quick: Experiment):
    clip = quick.rewards.parts["clip_similarity"]
    both = Rewards(
        {"clip": clip, "length": lambda i, p, texts: [float(len(t)) for t in texts]}, {"clip": 1, "length": 0.1}
    )
    found = evaluate(quick.with_rewards(both), quick.val_prompts[:3], compare=("raw", "initial"))
    assert set(found.results["variants"]["raw"]) == {"reward", "clip", "length"}
    rows = found.rows
    np.testing.assert_allclose(rows["reward"], rows["reward/clip"] + 0.1 * rows["reward/length"])


# --- names ------------------------------------------------------------------------------------------------------------


def test_folders_of_one_name_are_told_apart_by_their_parents(runs: list[Path], tmp_path: Path):
    twin = shutil.copytree(runs[0], tmp_path / "other" / "run-0")
    odd = shutil.copytree(runs[0], tmp_path / "raw")
    names = name_variants(["raw", runs[0], twin, odd, "trained"])
    assert list(names)[:3] == ["raw", "run_0", "other_run_0"] and list(names)[4] == "trained"
    assert list(names)[3].endswith("_raw") and names[list(names)[3]] == str(odd)


def test_names_make_keys_and_file_names_that_can_be_read_back(runs: list[Path], tmp_path: Path):
    odd = shutil.copytree(runs[0], tmp_path / "ä b-c $(x) <i>")
    (name,) = name_variants([odd])
    assert name == "_b_c_x_i_" and "-" not in name


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        (lambda runs: ["raw", "raw"], "compare: 'raw' stands twice"),
        (lambda runs: [runs[0], str(runs[0])], "stands twice. Give it once"),
        (
            lambda runs: ["finetuned"],
            "allowed: raw, initial, trained, oracle, or the folder of a trained run or policy",
        ),
        (lambda runs: [runs[0].parent], "or the folder of a trained run or policy"),
    ],
)
def test_what_is_no_policy_is_one_line(runs: list[Path], compare: Callable, message: str):
    with pytest.raises(KitError, match=message) as error:
        name_variants(compare(runs))
    assert "\n" not in str(error.value)


# --- the command ------------------------------------------------------------------------------------------------------


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return stop.value.code or 0


def test_several_runs_are_judged_alike_and_their_seeds_pooled(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "judged"
    assert _run("evaluate", *map(str, runs), "--out", str(out), "-o", "evaluation_settings.num_prompts=3") == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "final_results.json").read_text())
    rows = pd.read_parquet(out / "evaluation" / "rows.parquet")
    assert set(results["variants"]) == {"raw", "initial", "run_0", "run_1", "oracle"} and results["num_prompts"] == 3
    assert "2 training seeds of one setting, pooled (run_0, run_1)" in printed and str(out) in printed
    (pooled,) = results["pooled"].values()
    tables = [
        rows[rows["variant"].isin(["raw", name])].replace({"variant": {name: "trained"}}) for name in ("run_0", "run_1")
    ]
    mine = pool_evaluations(tables)["differences"]["trained-raw"]["reward"]
    assert pooled["differences"]["trained-raw"]["reward"] == pytest.approx(mine)
    assert not (runs[0] / "final_results.json").exists()


def test_a_run_of_several_is_not_overwritten(runs: list[Path], capsys: pytest.CaptureFixture):
    assert _run("evaluate", *map(str, runs), "--out", str(runs[1])) == 2
    assert "whose own evaluation would be lost" in capsys.readouterr().err


def test_the_command_evaluates_one_run_in_its_folder(runs: list[Path], capsys: pytest.CaptureFixture):
    assert _run("evaluate", str(runs[1]), "-o", "evaluation_settings.num_prompts=2") == 0
    results = json.loads((runs[1] / "final_results.json").read_text())
    assert results["num_prompts"] == 2 and "trained-raw" in results["differences"] and "policies" not in results
    assert "trained − raw" in capsys.readouterr().out
