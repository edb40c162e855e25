"""Do rewrites converge? Measures of diversity that are known for made-up rewrites."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_kit.evaluation.diversity import common_ending, mean_jaccard_distance, rewrite_diversity
from grpo_kit.rewards.words import words

PROMPTS = ["a cat", "two red dogs", "the sea at night", "an old man"]
SUFFIX = "highly detailed, 8k, masterpiece"
text = st.text(st.characters(categories=["L", "Zs", "Po"]), max_size=30)


def test_one_suffix_for_all_is_named_and_counted():
    found = rewrite_diversity(PROMPTS, [f"{prompt}, {SUFFIX}" for prompt in PROMPTS])
    assert found["suffix"] == "highly detailed 8k masterpiece" and found["suffix_share"] == 1.0
    assert found["added_distance"] == 0.0 and found["added_words"] == 4
    assert found["distinct"] == 1.0  # that the texts differ says nothing: the users' prompts do


def test_rewrites_of_their_own_kind_have_no_common_suffix():
    added = ["on a sofa", "running through snow", "under a full moon", "with kind eyes"]
    found = rewrite_diversity(PROMPTS, [f"{prompt} {more}" for prompt, more in zip(PROMPTS, added, strict=True)])
    assert found["suffix_share"] == 0.25 and found["added_distance"] > 0.8


def test_a_policy_that_always_says_the_same_is_seen():
    found = rewrite_diversity(PROMPTS, ["a masterpiece"] * 4)
    assert found["distinct"] == 0.25 and found["added_distance"] < 0.3 and found["suffix_share"] > 0.5


def test_no_rewrite_adds_nothing():
    found = rewrite_diversity(PROMPTS, PROMPTS)
    assert (found["added_words"], found["added_distance"], found["suffix"], found["suffix_share"]) == (0, 0.0, "", 0.0)


def test_what_the_user_said_is_no_suffix():
    asked = [f"{prompt} at night" for prompt in PROMPTS]
    assert rewrite_diversity(asked, asked)["suffix"] == ""
    with_sharp = rewrite_diversity(asked, [f"{prompt}, sharp" for prompt in asked])
    assert with_sharp["suffix"] == "sharp"  # a twin that compared the texts' ends alone would say "at night sharp"
    assert common_ending([words(f"{prompt}, sharp") for prompt in asked])[0] == ("at", "night", "sharp")


def test_case_and_punctuation_make_no_difference():
    assert words("Sharp, 8K; a cat's well-lit coat!", compounds=True) == [
        "sharp",
        "8k",
        "a",
        "cat's",
        "well-lit",
        "coat",
    ]
    one, other = (rewrite_diversity(PROMPTS, [f"{p}{end}" for p in PROMPTS]) for end in (", Sharp.", " sharp"))
    assert one == other


@pytest.mark.parametrize(
    ("endings", "found"),
    [
        ([["a", "b"], ["c", "b"], ["b"], []], (("b",), 0.75)),  # "a b" has a quarter
        ([["a", "b"], ["a", "b"], ["c"], ["d"]], (("a", "b"), 0.5)),
        ([["a"], ["b"], ["c"]], (("a",), 1 / 3)),
        ([["a", "b", "c"]], (("a", "b", "c"), 1.0)),
        ([[], []], ((), 0.0)),
    ],
)
def test_the_longest_ending_of_half_the_rewrites_counts(endings: list[list[str]], found: tuple):
    assert common_ending(endings) == found


@given(st.lists(st.tuples(text, text), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_shares_are_shares_whatever_the_texts(pairs: list[tuple[str, str]]):
    prompts, rewrites = zip(*pairs, strict=True)
    found = rewrite_diversity(prompts, rewrites)
    assert 0 < found["distinct"] <= 1 and 0 <= found["suffix_share"] <= 1 and found["added_words"] >= 0
    assert len(pairs) == 1 or 0 <= found["added_distance"] <= 1
    assert rewrite_diversity(prompts[::-1], rewrites[::-1])["added_distance"] == pytest.approx(
        found["added_distance"], nan_ok=True
    )


def test_distance_is_the_share_of_words_that_two_do_not_have_in_common():
    assert mean_jaccard_distance([{"a", "b"}, {"b", "c"}]) == pytest.approx(2 / 3)
    assert mean_jaccard_distance([set(), set()]) == 0.0 and mean_jaccard_distance([set(), {"a"}]) == 1.0


@pytest.mark.parametrize(("prompts", "rewrites"), [([], []), (["a"], []), (["a", "b"], ["a"])])
def test_each_prompt_needs_its_rewrite(prompts: list[str], rewrites: list[str]):
    with pytest.raises(ValueError, match="allowed: one each"):
        rewrite_diversity(prompts, rewrites)
