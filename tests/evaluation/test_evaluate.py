"""The comparison: the same latents for every variant, honest intervals, and nothing where nothing differs."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from grpo_kit.config import KitError, load_config
from grpo_kit.config.prompts import Prompt
from grpo_kit.evaluation import cells
from grpo_kit.evaluation.conclusions import summarize
from grpo_kit.evaluation.evaluate import EvalResult, evaluate, rewrites, test_prompts
from grpo_kit.evaluation.intervals import interval
from grpo_kit.evaluation.validation import validate
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator
from grpo_kit.models.policy import Policy
from grpo_kit.rewards.composition import Rewards
from grpo_kit.runs.folder import RunFolder

test_prompts.__test__ = False  # a function of the kit, not a test

VARIANTS = ("raw", "initial", "trained", "oracle")
QUICK = {
    "evaluation_settings.num_prompts": 7,
    "evaluation_settings.seeds_per_prompt": 2,
    "evaluation_settings.validation_prompts": 3,
    "evaluation_settings.n_resamples": 300,
    "evaluation_settings.paraphrases": False,  # test_evaluate_paraphrases.py
}


class Crisp(Policy):
    """A policy that was trained to add one word, beside the reference that was not."""

    def __init__(self, policy: Policy) -> None:
        vars(self).update(vars(policy))

    def enhance_prompts(self, prompts: list[str], images: list | None = None, *, reference: bool = False) -> list[str]:
        return [prompt if reference else f"{prompt}, sharp" for prompt in prompts]


@pytest.fixture(scope="module")
def quick(kit: Experiment) -> Experiment:
    """Seven held-out prompts, two latents each, two denoising steps."""
    generator = Generator(kit.generator.pipeline, num_inference_steps=2, guidance_scale=1.0)
    return dataclasses.replace(kit, config=load_config(kit.config, QUICK), generator=generator)


@pytest.fixture(scope="module")
def compared(quick: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[EvalResult, Path]:
    folder = tmp_path_factory.mktemp("evaluated")
    return evaluate(quick, compare=VARIANTS, run_dir=folder), folder


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_policy_compared_with_itself_differs_by_exactly_nothing(compared: tuple[EvalResult, Path]):
    result, _ = compared  # this policy was never trained
    for metric in ("reward", "gold", "keeps_objects", "grammatical"):
        assert result.results["differences"]["trained-initial"][metric] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    for number in range(7):
        one, other = (result.images[number, variant, 1] for variant in ("initial", "trained"))
        assert one.tobytes() == other.tobytes()


def test_latents_are_shared_by_variants_and_by_nothing_else(quick: Experiment, monkeypatch: pytest.MonkeyPatch):
    calls, draw = [], quick.generator.generate_images

    def listen(texts: list[str], seeds: list[int]) -> list:
        calls.append(list(seeds))
        return draw(texts, seeds)

    monkeypatch.setattr(quick.generator, "generate_images", listen)
    evaluate(quick, quick.val_prompts[:3], compare=("raw", "trained", "oracle"))
    assert calls[0] == calls[1] == calls[2] and len(set(calls[0])) == 6


def test_latents_that_differ_between_variants_would_be_noticed(quick: Experiment, monkeypatch: pytest.MonkeyPatch):
    streams = iter(range(1000))
    monkeypatch.setattr(cells, "derive_seed", lambda *parts: next(streams))
    found = evaluate(quick, quick.val_prompts[:3], compare=("initial", "trained"))
    assert found.results["differences"]["trained-initial"]["reward"]["mean"] != 0.0


def test_evaluation_repeats(quick: Experiment):
    one, two = (evaluate(quick, quick.val_prompts[:3], compare=("raw", "trained")) for _ in range(2))
    pd.testing.assert_frame_equal(one.rows, two.rows)
    assert one.results == two.results


def test_rows_are_tidy(compared: tuple[EvalResult, Path], quick: Experiment):
    rows = compared[0].rows
    assert len(rows) == 7 * 4 * 2 == len(rows.drop_duplicates(["prompt_id", "variant", "seed"]))
    raw = rows[rows["variant"] == "raw"]
    assert (raw["text"] == raw["user_prompt"]).all()
    assert rows.groupby("prompt_id")["user_prompt"].nunique().eq(1).all()
    assert {"reward/clip_similarity", "reward/gold", "gold", "category", "difficulty"} <= set(rows.columns)
    assert (rows["reward"] == rows["reward/clip_similarity"]).all() and rows["gold"].between(0, 1).all()


def test_rewards_are_for_the_users_prompt(compared: tuple[EvalResult, Path], quick: Experiment):
    result, _ = compared
    cell = result.rows[(result.rows["variant"] == "oracle") & (result.rows["seed"] == 0)].iloc[0]
    image = result.images[cell["prompt_id"], "oracle", 0]
    assert quick.rewards.calculate_reward(image, cell["user_prompt"]) == pytest.approx(cell["reward"], abs=1e-5)


# --- conclusions ------------------------------------------------------------------------------------------------------


def test_every_interval_contains_its_mean(compared: tuple[EvalResult, Path]):
    results = compared[0].results
    found = [v for part in ("variants", "differences") for metrics in results[part].values() for v in metrics.values()]
    assert len(found) == (4 + 5) * 4
    assert all(value["low"] <= value["mean"] <= value["high"] for value in found)
    assert any(value["low"] < value["mean"] < value["high"] for value in found)


def test_means_are_means_over_prompts_of_means_over_latents(compared: tuple[EvalResult, Path]):
    rows, results = compared[0].rows, compared[0].results
    for variant in VARIANTS:
        mine = rows[rows["variant"] == variant].groupby("prompt_id")["reward"].mean().mean()
        assert results["variants"][variant]["reward"]["mean"] == pytest.approx(mine)
    difference = results["variants"]["trained"]["gold"]["mean"] - results["variants"]["raw"]["gold"]["mean"]
    assert results["differences"]["trained-raw"]["gold"]["mean"] == pytest.approx(difference)


def _rows(**by_variant: list[float]) -> pd.DataFrame:
    """Two latents a prompt, half above and half below each prompt's given reward."""
    return pd.DataFrame(
        [
            {
                "prompt_id": i,
                "user_prompt": f"prompt {i}",
                "text": f"{variant} {i}",
                "variant": variant,
                "seed": seed,
                "category": "ab"[i % 2],
                "difficulty": "easy" if i < 2 else "hard",
                "reward": value + shift,
            }
            for variant, values in by_variant.items()
            for i, value in enumerate(values)
            for seed, shift in enumerate((-0.5, 0.5))
        ]
    )


def test_success_and_closed_gap_are_what_they_are_called(quick: Experiment):
    rows = _rows(raw=[0.0, 0.0, 0.0, 0.0], trained=[1.0, 2.0, -1.0, 0.0], oracle=[1.0, 1.0, 1.0, 1.0])
    found = summarize(rows, quick.config.evaluation_settings)
    assert found["success_rate"]["reward"] == 2 / 4  # a tie is no success
    assert found["gap_closed"]["reward"] == pytest.approx(0.5)
    assert found["by_category"]["b"]["trained"]["reward"] == pytest.approx(1.0)
    assert found["success"]["trained-raw"]["reward"]["ties"] == 1 / 4
    assert found["win_rate"]["trained-raw"]["reward"]["mean"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    upside_down = summarize(
        _rows(raw=[1.0, 1.0], trained=[1.0, 1.0], oracle=[0.0, 0.0]), quick.config.evaluation_settings
    )
    assert upside_down["gap_closed"]["reward"] is None


def _covers(scale: float, quick: Experiment) -> float:
    """How often an interval of 95 % over 30 prompts holds the true mean."""
    settings, rng, hits = quick.config.evaluation_settings, np.random.default_rng(0), 0
    for _ in range(150):
        found = interval(rng.normal(0.3, 1.0, 30), settings)
        middle, half = found["mean"], scale * (found["high"] - found["low"]) / 2
        hits += abs(middle - 0.3) <= half
    return hits / 150


def test_intervals_cover_the_true_mean_as_often_as_they_say(quick: Experiment):
    assert 0.88 <= _covers(1.0, quick) <= 0.99
    assert _covers(0.5, quick) < 0.8


def test_pairing_is_what_makes_intervals_of_differences_narrow(quick: Experiment):
    rng = np.random.default_rng(0)
    raw = rng.normal(0, 1, 40)
    rows = _rows(raw=list(raw), trained=list(raw + rng.normal(0.1, 0.05, 40)))
    found = summarize(rows, quick.config.evaluation_settings)
    paired, single = found["differences"]["trained-raw"]["reward"], found["variants"]["raw"]["reward"]
    assert paired["high"] - paired["low"] < 0.2 * (single["high"] - single["low"]) and paired["low"] > 0


@pytest.mark.parametrize("values", [[2.0, 2.0], [2.0, np.nan, 2.0]])
def test_interval_of_what_does_not_vary_is_a_point(values: list[float], quick: Experiment):
    found = interval(np.array(values), quick.config.evaluation_settings)
    assert found["low"] == found["mean"] == found["high"] == 2.0


@pytest.mark.parametrize("values", [[], [np.nan], [2.0], [2.0, np.nan]])
def test_one_prompt_or_none_has_no_interval(values: list[float], quick: Experiment):
    found = interval(np.array(values), quick.config.evaluation_settings)
    assert np.isnan([found["low"], found["high"]]).all()


def test_prompt_that_could_not_be_scored_is_left_out(quick: Experiment):
    rows = _rows(raw=[0.0, 0.0, 0.0], trained=[1.0, 1.0, 5.0])
    rows.loc[(rows["prompt_id"] == 2) & (rows["variant"] == "trained"), "reward"] = np.nan
    found = summarize(rows, quick.config.evaluation_settings)
    assert (
        found["variants"]["trained"]["reward"]["mean"] == found["differences"]["trained-raw"]["reward"]["mean"] == 1.0
    )


# --- variants ---------------------------------------------------------------------------------------------------------


def test_initial_is_the_reference_and_trained_the_policy(quick: Experiment):
    trained = dataclasses.replace(quick, policy=Crisp(quick.policy))
    prompts = [Prompt("a red circle"), Prompt("two blue crosses")]
    assert (
        rewrites(trained, prompts, "raw")
        == rewrites(trained, prompts, "initial")
        == ["a red circle", "two blue crosses"]
    )
    assert rewrites(trained, prompts, "trained") == ["a red circle, sharp", "two blue crosses, sharp"]
    assert rewrites(trained, prompts, "oracle")[1] == "two blue crosses, white background, sharp"
    found = evaluate(trained, prompts, compare=("raw", "initial", "trained"))
    assert found.results["differences"]["initial-raw"]["reward"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert found.results["differences"]["trained-initial"]["reward"]["mean"] != 0.0


def test_moved_weights_change_trained_and_leave_initial(quick: Experiment):
    moved = copy.deepcopy(quick.policy)
    with torch.no_grad():
        for parameter in moved.trainable_parameters():
            parameter.mul_(1.5)
    prompts = quick.val_prompts[:4]
    before, after = (dataclasses.replace(quick, policy=policy) for policy in (quick.policy, moved))
    assert rewrites(before, prompts, "initial") == rewrites(after, prompts, "initial")
    assert rewrites(before, prompts, "trained") != rewrites(after, prompts, "trained")


def test_evaluation_and_validation_look_at_different_prompts(quick: Experiment):
    looked_at = quick.val_prompts[: quick.config.evaluation_settings.validation_prompts]
    assert not set(looked_at) & set(test_prompts(quick)) and len(test_prompts(quick)) == 7


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        (("raw", "finetuned"), "compare: found 'finetuned', allowed: raw, initial, trained, oracle"),
        (("Raw",), "compare: found 'Raw'"),
    ],
)
def test_unknown_variant_is_one_line(quick: Experiment, compare: tuple[str, ...], message: str):
    with pytest.raises(KitError, match=message) as error:
        evaluate(quick, quick.val_prompts[:2], compare=compare)
    assert "\n" not in str(error.value)


def test_oracle_outside_the_embedded_world_is_one_line(quick: Experiment):
    foreign = [Prompt("a cat on a sofa"), Prompt("a red circle")]
    with pytest.raises(KitError, match="'a cat on a sofa': outside the embedded world's grammar"):
        evaluate(quick, foreign, compare=("oracle",))
    elsewhere = dataclasses.replace(quick, config=load_config(quick.config, {"evaluation_settings.gold": None}))
    with pytest.raises(KitError, match="'oracle', which only the embedded world has"):
        evaluate(elsewhere, foreign, compare=("oracle",))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_prompts_are_one_line(quick: Experiment, count: int):
    with pytest.raises(KitError, match=f"prompts: found {count}, allowed: at least 2"):
        evaluate(quick, quick.val_prompts[:count])


def test_world_without_gold_is_compared_by_its_rewards_alone(quick: Experiment):
    plain = quick.with_rewards(Rewards(quick.rewards.parts, quick.rewards.weights))
    found = evaluate(plain, quick.val_prompts[:2], compare=("raw", "trained"))
    assert set(found.results["variants"]["raw"]) == {"reward"} and "gold" not in found.rows


# --- files ------------------------------------------------------------------------------------------------------------


def test_results_rows_and_pictures_are_written(compared: tuple[EvalResult, Path]):
    result, folder = compared
    assert json.loads((folder / "final_results.json").read_text()) == result.results
    rows = pd.read_parquet(folder / "evaluation" / "rows.parquet")
    pd.testing.assert_frame_equal(rows.drop(columns="thumbnail"), result.rows, check_dtype=False)
    assert all((folder / name).is_file() for name in rows["thumbnail"]) and rows["thumbnail"].is_unique
    assert set(result.results) >= {
        "num_prompts", "seeds_per_prompt", "confidence", "variants", "differences", "by_category", "success_rate",
        "gap_closed",
    }  # fmt: skip
    assert (result.results["num_prompts"], result.results["seeds_per_prompt"]) == (7, 2)


def test_without_a_folder_nothing_is_written(quick: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    evaluate(quick, quick.val_prompts[:2], compare=("raw",))
    assert not list(tmp_path.iterdir())


def test_validation_writes_what_it_returns(quick: Experiment, tmp_path: Path):
    found = validate(quick, 5, RunFolder(tmp_path))
    assert json.loads((tmp_path / "validation_iter_000005.json").read_text()) == found
    texts = [sample["enhanced_prompt"] for sample in found["samples"]]
    assert texts == rewrites(quick, quick.val_prompts[:3], "trained")


def test_picture_that_failed_leaves_a_gap_and_no_black_square(
    quick: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    draw = quick.generator.generate_images
    monkeypatch.setattr(quick.generator, "generate_images", lambda texts, seeds: [None, *draw(texts, seeds)[1:]])
    found = evaluate(quick, quick.val_prompts[:3], compare=("raw", "trained"), run_dir=tmp_path)
    assert found.rows["reward"].isna().sum() == 2 and found.images[0, "raw", 0] is None
    rows = pd.read_parquet(tmp_path / "evaluation" / "rows.parquet")
    assert rows["thumbnail"].isna().sum() == 2
    assert np.isfinite(found.results["variants"]["raw"]["reward"]["mean"])


def test_a_reward_that_compares_a_group_is_no_part_of_an_evaluations_total(quick: Experiment, tmp_path: Path):
    def contrast(images: list, prompts: list, enhanced: list, group_ids: torch.Tensor) -> torch.Tensor:
        alone = torch.bincount(group_ids, minlength=int(group_ids.max()) + 1)[group_ids] < 2
        return torch.ones(len(images)).masked_fill(alone, torch.nan)

    clip = quick.rewards.parts["clip_similarity"]
    mixed = quick.with_rewards(Rewards({"clip": clip, "contrast": contrast}, {"clip": 1.0, "contrast": 0.5}))
    with_it, without = (validate(kit, 0, RunFolder(tmp_path)) for kit in (mixed, quick))
    assert with_it["reward"] == without["reward"]
    scores = mixed.rewards.score([Image.new("RGB", (32, 32))] * 2, ["a"] * 2, ["a"] * 2, group_ids=torch.tensor([0, 1]))
    assert mixed.rewards.total(scores).isnan().all(), "the plain total has no value there"
    alone = quick.with_rewards(Rewards({"contrast": contrast}, {"contrast": 1.0}))
    with pytest.raises(KitError, match=r"found contrast alone.*one rewrite a prompt"):
        validate(alone, 0, RunFolder(tmp_path))
