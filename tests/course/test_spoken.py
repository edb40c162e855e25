"""What a check says in Korean: the whole of it, with the same numbers; elsewhere English stays as it is."""

import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

from grpo_kit import course
from grpo_kit.course.editions import misconceptions
from grpo_kit.course.exercise import EXERCISES
from grpo_kit.course.spoken import spoken
from tools.korean_course import ANSWERS

for module in pkgutil.iter_modules(course.__path__):
    if module.name.startswith("exercises_"):
        importlib.import_module(f"grpo_kit.course.{module.name}")


def numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d+(?:\.\d+)?", text))


@pytest.mark.parametrize("name", sorted(EXERCISES))
def test_titles_and_misconceptions_of_an_exercise_are_spoken(name: str):
    for said in {EXERCISES[name].title, *misconceptions(EXERCISES[name])} - ANSWERS:
        assert re.search("[가-힣]", spoken(said, "ko")), said
        assert spoken(said, "en") == said


@pytest.mark.parametrize(
    ("name", "answer", "words"),
    [
        ("00.1", lambda rewards: rewards, "보상 [0.8, 0.6, 0.4, 0.2]: 기대한 값은 "),
        ("00.1", lambda rewards: list(np.array(rewards) - np.mean(rewards)), "(표준편차로 나누지 않았습니다)"),
        ("00.1", lambda rewards: [][0], "코드가 IndexError 오류로 멈췄습니다: list index out of range"),
        ("06.1", lambda ratio, advantage, epsilon: -ratio * advantage, "(클리핑이 빠졌습니다. "),
        ("02b.5", lambda rewards: np.array(rewards) - np.mean(rewards), "(전체의 평균입니다. 자기 자신을 빼야 합니다)"),
    ],
)
def test_a_mistake_is_told_in_the_language_of_the_folder(
    name: str, answer: object, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checked = course.check(name, answer)
    assert repr(checked) == f"✗ {name}: {checked.message}"
    (tmp_path / "ko").mkdir()
    monkeypatch.chdir(tmp_path / "ko")
    assert words in repr(checked) and words.split("'")[0] in checked._repr_html_()
    assert numbers(repr(checked)) == numbers(f"{name} {checked.message}")


def test_what_was_right_is_told_too():
    title = EXERCISES["06.2"].title
    assert ":" in title and spoken(f"{title}: right", "ko").endswith(": 맞았습니다")
    said = "CLIP agrees with you on 20 of 28 pairs (chance: 14); CLIP puts picture 3 first, you put picture 1"
    said += ". Is your list from the worst to the best?"
    korean = spoken(f"{EXERCISES['00.2'].title}: {said}", "ko")
    assert ": 28쌍 가운데 20쌍에서 CLIP과 같습니다(우연이면 14쌍). CLIP이 맨 앞에 놓은 그림은 3번" in korean
    assert korean.endswith("나쁜 순서로 적지 않았나요?")


@pytest.mark.parametrize("text", ["", "{}", "{0} {", "a sentence of nobody", "x" * 9000, "(" * 500, ": " * 900])
def test_what_is_not_known_stays(text: str):
    assert spoken(text, "ko") == text
