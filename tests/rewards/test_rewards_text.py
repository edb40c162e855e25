"""Penalties of the rewrite's text: length and repetition."""

from itertools import pairwise

import pytest

from grpo_kit.rewards import Length, Repetition, RewardError, Rewards

HOSTILE = ["", " ", "\n\t", "🙂🙂", "\ud800 half", "مرحبا بالعالم", "\u202eright to left", "a" * 10_000, ",,,"]


def _penalties(reward: object, texts: list[str]) -> list[float]:
    return reward([None] * len(texts), [""] * len(texts), texts)


def test_length_is_free_up_to_the_limit_then_falls_linearly_to_minus_one():
    texts = [" ".join(["red"] * count) for count in (0, 9, 10, 11, 15, 20, 400)]
    assert _penalties(Length(10), texts) == pytest.approx([0, 0, 0, -0.1, -0.5, -1, -1])


def test_length_counts_words_and_not_punctuation():
    assert _penalties(Length(2), ["a - b !!", "a, b, c."]) == [0, -0.5]


def test_repetition_is_the_share_of_runs_that_stood_there_before():
    texts = ["sharp sharp sharp sharp", "a red circle, sharp", "a red circle a red circle", "Sharp, sharp; SHARP"]
    assert _penalties(Repetition(1), texts) == pytest.approx([-0.75, 0, -0.5, -2 / 3])
    assert _penalties(Repetition(2), texts) == pytest.approx([-2 / 3, 0, -2 / 5, -0.5])
    assert _penalties(Repetition(3), ["one two", "one", ""]) == [0, 0, 0]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_saying_it_again_is_never_rewarded(size: int):
    text = "two red circles, white background, sharp"
    found = _penalties(Repetition(size), [", ".join([text] * times) for times in (1, 2, 3, 6)])
    assert found[0] == 0 and all(later < earlier for earlier, later in pairwise(found))
    assert found[-1] > -1


@pytest.mark.parametrize("reward", [Length(5), Repetition(1), Repetition(3)])
def test_hostile_texts_are_scored_like_any(reward: object):
    assert all(-1 <= value <= 0 for value in _penalties(reward, HOSTILE))


def test_penalties_enter_a_total_beside_other_rewards():
    images = [object()] * 3  # never looked at
    rewards = Rewards({"length": Length(2), "repetition": Repetition(1)}, {"length": 0.5, "repetition": 2.0})
    found = rewards(images, ["a"] * 3, ["a b", "a a", "a b c d"])
    assert found.tolist() == [0.0, -1.0, -0.5]


@pytest.mark.parametrize(("kind", "name"), [(Length, "max_words"), (Repetition, "size")])
def test_limit_below_one_is_one_line(kind: type, name: str):
    with pytest.raises(RewardError, match=f"{name}: found 0, allowed: at least 1"):
        kind(0)
