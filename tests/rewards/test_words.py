"""Words in any script: what a repetition, a length and a suffix are measured in."""

import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_kit.evaluation.diversity import rewrite_diversity
from grpo_kit.rewards.plain import Length, Repetition
from grpo_kit.rewards.words import phrase, words

LATIN = [chr(code) for code in range(sys.maxunicode) if "LATIN" in unicodedata.name(chr(code), "") and chr(code) != "İ"]
ALPHABET = [*map(chr, range(32, 127)), *(c for c in LATIN if unicodedata.category(c)[0] == "L"), *"éßø²½’–…\n"]


@given(st.text(st.sampled_from(ALPHABET), max_size=60))
def test_latin_words_are_those_that_they_always_were(text: str):
    assert words(text) == re.findall(r"\w+", text.lower())
    assert words(text, compounds=True) == re.findall(r"\w+(?:['’-]\w+)*", text.lower())


@pytest.mark.field("F13")
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("红色的球，在桌子上", list("红色的球在桌子上")),
        ("赤いボールとテーブル", ["赤", "い", "ボール", "と", "テーブル"]),
        ("빨간 공이 탁자 위에", ["빨간", "공이", "탁자", "위에"]),
        ("ลูกบอล", ["ลู", "ก", "บ", "อ", "ล"]),
        ("हिन्दी में लाल गेंद", ["हिन्दी", "में", "लाल", "गेंद"]),
        ("🔥🔥 fire 👩\u200d🎨 🇰🇷❤\ufe0f", ["🔥", "🔥", "fire", "👩\u200d🎨", "🇰🇷", "❤\ufe0f"]),
        ("e\u0301te\u0301, 4K球 © ™", ["e\u0301te\u0301", "4k", "球"]),
    ],
)
def test_each_script_has_its_own_words(text: str, found: list[str]):
    assert words(text) == found


@pytest.mark.field("F13")
@pytest.mark.parametrize("word", ["美丽的", "きれいな", "สวย", "सुंदर ", "✨"])
def test_repetition_length_and_diversity_see_every_script(word: str):
    once, often = word + "球", word * 40 + "球"
    assert Repetition()([None] * 2, ["球"] * 2, [once, often])[1] < -0.8
    assert Repetition()([None], ["球"], [once]) == [0.0]
    assert Length(30)([None] * 2, ["球"] * 2, [once, often]) == [
        0.0,
        pytest.approx(-min(1, len(words(often)) / 30 - 1)),
    ]
    ended = rewrite_diversity(["球", "树", "房子"], [f"{one}，高质量" for one in ("红球", "树", "房子")])
    assert (ended["suffix"], ended["suffix_share"]) == ("高质量", 1.0) and ended["added_words"] > 3


def test_a_phrase_has_the_spaces_of_its_script():
    assert phrase(["in", "high", "quality"]) == "in high quality"
    assert phrase(["高", "质", "量", "4k", "图"]) == "高质量 4k 图"
