"""The audit of a reward: what it says is true of rewards whose faults are known."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from grpo_kit.config import KitError
from grpo_kit.evaluation.audit import agreement, audit, idle_change, saturation, seed_share
from grpo_kit.experiment import Experiment
from grpo_kit.rewards import Gain, RewardError
from grpo_kit.rewards.plain import JpegSize
from grpo_kit.rollout import Rollout
from grpo_kit.show import audit_figure

P, N = 30, 6
IDS = np.repeat(np.arange(P), N)
AGREEMENT = ("rank within", "rank over all", "pairs within", "pairs over all")


def flat(count: int) -> list[Image.Image]:
    """Pictures that tell their number by their colour."""
    return [Image.new("RGB", (4, 4), (i % 256, i // 256, 0)) for i in range(count)]


def number(image: Image.Image) -> int:
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def looking_up(values: np.ndarray) -> Callable[..., list[float]]:
    """A reward that gives each of the flat pictures its number's value."""
    return lambda images, prompts, enhanced_prompts: [float(values[number(image)]) for image in images]


def one(reward: Callable, gold: object = None, **options: object) -> dict[str, float]:
    prompts = [f"prompt {group}" for group in IDS]
    return audit({"it": reward}, flat(P * N), prompts, gold=gold, **options).rows["it"]


# --- agreement --------------------------------------------------------------------------------------------------------


def assert_agreement_is_right(measure: Callable[..., dict]) -> None:
    rng = np.random.default_rng(0)
    gold = rng.normal(size=P * N)
    perfect, opposite, blind = (measure(scores, gold, IDS) for scores in (np.exp(gold), -gold, 0 * gold))
    for name in ("rank within", "rank over all"):
        assert perfect[name]["mean"] == pytest.approx(1) and opposite[name]["mean"] == pytest.approx(-1)
        assert blind[name]["mean"] == 0
    for name in ("pairs within", "pairs over all"):
        assert perfect[name]["mean"] == 1 and opposite[name]["mean"] == 0 and blind[name]["mean"] == 0.5
    level = 10 * rng.normal(size=P)[IDS]  # knows easy prompts from hard ones, and nothing of siblings
    found = measure(level + rng.normal(size=P * N), level + gold, IDS)
    assert abs(found["rank within"]["mean"]) < 0.2 < 0.8 < found["rank over all"]["mean"]
    assert abs(found["pairs within"]["mean"] - 0.5) < 0.1 < 0.8 < found["pairs over all"]["mean"]


def test_agreement_of_rewards_that_are_right_wrong_blind_and_right_about_prompts_alone() -> None:
    assert_agreement_is_right(partial(agreement, n_resamples=50))


@pytest.mark.parametrize("twin", ["ignores the prompts", "forgets that a tie is no success"])
def test_a_broken_agreement_is_caught(twin: str) -> None:
    def broken(scores: np.ndarray, gold: np.ndarray, ids: np.ndarray) -> dict:
        if twin == "ignores the prompts":
            return agreement(scores, gold, np.zeros_like(ids), n_resamples=50)
        return agreement(scores + 1e-9 * gold, gold, ids, n_resamples=50)

    with pytest.raises(AssertionError):
        assert_agreement_is_right(broken)


def test_over_all_it_is_scipys_correlation_and_a_count_of_pairs() -> None:
    rng = np.random.default_rng(1)
    scores, gold = rng.integers(0, 5, size=(2, P * N)).astype(float)  # many ties
    found = agreement(scores, gold, IDS)
    assert found["rank over all"]["mean"] == pytest.approx(stats.spearmanr(scores, gold).statistic)
    pairs = [(i, j) for i in range(P * N) for j in range(P * N) if gold[i] > gold[j]]
    right = [1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0 for i, j in pairs]
    assert found["pairs over all"]["mean"] == pytest.approx(np.mean(right))
    inside = [value for value, (i, j) in zip(right, pairs, strict=True) if IDS[i] == IDS[j]]
    assert found["pairs within"]["mean"] == pytest.approx(np.mean(inside))


def test_intervals_hold_the_truth_and_resample_prompts() -> None:
    rng, held, truth = np.random.default_rng(2), 0, 6 / math.pi * math.asin(0.8 / 2)
    for _ in range(40):  # a bivariate normal: Spearman's correlation is known
        gold = rng.normal(size=(P, 1)) + 0.2 * rng.normal(size=(P, N))
        noise = 0.75 * (rng.normal(size=(P, 1)) + 0.2 * rng.normal(size=(P, N)))
        found = agreement((gold + noise).ravel(), gold.ravel(), IDS, n_resamples=150)["rank over all"]
        held += found["low"] <= truth <= found["high"]
    assert held >= 33  # samples in place of prompts would hold it in about half


def test_gold_may_be_a_reward_and_what_it_cannot_score_is_left_out() -> None:
    gold = np.random.default_rng(0).normal(size=P * N)
    holed = np.where(np.arange(P * N) % 7 == 0, np.nan, gold)
    given, scored = (one(looking_up(gold), gold=one_gold) for one_gold in (holed, looking_up(holed)))
    names = [f"{kind}{end}" for kind in AGREEMENT for end in ("", ", low", ", high")]
    assert [given[name] for name in names] == [scored[name] for name in names]
    assert not set(names) & set(one(looking_up(gold)))
    assert one(looking_up(holed), gold=gold)["scored"] == pytest.approx(np.isfinite(holed).mean())


# --- noise ------------------------------------------------------------------------------------------------------------


def assert_seed_share_is_right(measure: Callable[..., dict]) -> None:
    rng, prompts = np.random.default_rng(0), 600
    words = np.repeat(rng.normal(size=(prompts, 4)).ravel(), 3)  # 4 texts a prompt, 3 seeds each
    ids = np.repeat(np.arange(prompts), 12)
    texts = np.repeat(np.arange(4 * prompts), 3)
    level = 5 * rng.normal(size=prompts)[ids]
    for std, share in ((0.0, 0.0), (1.0, 0.5), (2.0, 0.8)):
        scores = level + words + std * rng.normal(size=len(ids))
        kept = rng.random(len(ids)) < 0.9
        assert measure(scores, texts, ids)["mean"] == pytest.approx(share, abs=0.03)
        assert measure(scores[kept], texts[kept], ids[kept])["mean"] == pytest.approx(share, abs=0.03)


def test_the_seeds_share_is_the_known_one_whatever_the_prompts_level() -> None:
    assert_seed_share_is_right(seed_share)


def test_a_seed_share_that_takes_prompts_for_texts_is_caught() -> None:
    with pytest.raises(AssertionError):
        assert_seed_share_is_right(lambda scores, texts, ids: seed_share(scores, texts, np.zeros_like(ids)))


def test_without_a_text_that_was_drawn_twice_the_share_is_unknown() -> None:
    assert math.isnan(seed_share(np.arange(6.0), np.arange(6), np.repeat([0, 1], 3))["mean"])


# --- saturation and idle words ----------------------------------------------------------------------------------------


def test_saturation() -> None:
    found = saturation(np.array([0.0, 0.5, *[1.0] * 6, 0.995, np.nan]))
    assert found == {"at ceiling": pytest.approx(7 / 9), "at floor": pytest.approx(1 / 9), "top decile": 0}
    assert saturation(np.linspace(0, 1, 1001))["top decile"] == pytest.approx(0.1)
    assert saturation(np.ones(5)) == {"at ceiling": 1, "at floor": 1, "top decile": 0}


def test_idle_words_are_told_apart_by_the_text_that_they_stand_in() -> None:
    values = np.random.default_rng(0).normal(size=P * N)
    within = np.mean([values[IDS == group].var(ddof=1) for group in range(P)]) ** 0.5

    def fond_of_praise(images: list, prompts: Sequence[str], enhanced_prompts: Sequence[str]) -> np.ndarray:
        praised = [0.5 * ("masterpiece" in text) for text in enhanced_prompts]
        return [values[number(image)] + extra for image, extra in zip(images, praised, strict=True)]

    found = one(fond_of_praise, idle_words=["masterpiece"])
    assert found["idle words, user"] == 0 and found["idle words, rewrite"] == pytest.approx(0.5 / within)
    two = one(fond_of_praise, idle_words=["masterpiece", "sweet"])
    assert two["idle words, rewrite"] == pytest.approx(0.25 / within)


def test_idle_words_where_the_reward_does_not_vary() -> None:
    ids, still = np.repeat([0, 1], 2), np.zeros(4)
    assert idle_change(still, [still], ids) == 0 and idle_change(still, [still + 1], ids) == math.inf


# --- the whole, on the embedded world ---------------------------------------------------------------------------------


def test_an_audit_of_real_rewards(kit: Experiment, rollout: Rollout) -> None:
    images = [row[0] for row in rollout.images]
    prompts = [rollout.prompts[group].user_prompt for group in rollout.group_ids.tolist()]
    clip = kit.rewards.parts["clip_similarity"]
    rewards = {"clip": clip, "jpeg": JpegSize(), "gain": Gain(kit.generator, clip)}
    found = audit(
        rewards,
        images,
        prompts,
        enhanced_prompts=rollout.enhanced_prompts,
        gold=kit.rewards.monitors["gold"],
        group_ids=rollout.group_ids,
        image_seeds=rollout.image_seeds[:, 0],
    )
    table = found.table()
    assert list(table.index) == list(rewards)
    torch.testing.assert_close(torch.as_tensor(found.scores["clip"]), rollout.reward_parts["clip_similarity"])
    assert table.loc["jpeg", "idle words, rewrite"] == table.loc["clip", "idle words, rewrite"] == 0
    assert table.loc["clip", "idle words, user"] > 0  # CLIP reads the user's words, idle ones too
    assert (table["ms per image"] > 0).all() and (table["scored"] == 1).all()
    assert audit_figure(found).to_png()[:4] == b"\x89PNG"
    assert audit_figure([audit(one, images, prompts) for one in (clip, JpegSize())]).axes
    with pytest.raises(KitError, match="Give each of them once"):
        audit_figure([found, found])


def test_one_reward_goes_by_its_own_name() -> None:
    assert list(audit(JpegSize(), flat(4), ["a"] * 4).rows) == ["JpegSize"]


def test_rows_fields_and_pictures_reach_the_rewards_and_tell_prompts_apart() -> None:
    pictures, own = flat(6), [Image.new("RGB", (4, 4), shade) for shade in ("white", "black")]
    fields = [{"wanted": float(row)} for row in range(6)]
    seen = []

    def judge(images: list, prompts: list, enhanced_prompts: list, metadata: list, references: list) -> list[float]:
        seen.extend(zip(map(number, images), metadata, references, strict=True))
        return [row["wanted"] for row in metadata]

    def rank(references: list | None) -> float:
        rows = audit(judge, pictures, ["the same"] * 6, gold=[3, 4, 5, 0, 1, 2], metadata=fields, references=references)
        return rows.rows["judge"]["rank within"]

    assert rank([[own[row // 3]] for row in range(6)]) == pytest.approx(1)  # by picture; by words it is not
    assert all(row == fields[at] and shown == [own[at // 3]] for at, row, shown in seen)
    assert rank(None) < 0
    with pytest.raises(KitError, match="references: found 5 for 6 images"):
        rank([None] * 5)


def test_columns_of_another_length_and_rewards_that_fail_are_one_line() -> None:
    def failing(images: list, prompts: list, enhanced_prompts: list) -> list:
        raise RuntimeError("no server")

    with pytest.raises(KitError, match="prompts: found 2 for 3 images"):
        audit(JpegSize(), flat(3), ["a", "b"])
    with pytest.raises(KitError, match="prompts: found 0 for 0 images"):
        audit(JpegSize(), [], [])
    with pytest.raises(KitError, match=re.escape("gold: found shape (2,)")):
        audit(JpegSize(), flat(3), ["a"] * 3, gold=[1.0, 2.0])
    with pytest.raises(KitError, match="no sample that it can score"):
        audit(lambda *columns: [math.nan] * 3, flat(3), ["a"] * 3)
    with pytest.raises(RewardError, match="no server"):
        audit(failing, flat(3), ["a"] * 3)
