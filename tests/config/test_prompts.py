"""Prompt files, broken ones too, and batches balanced over categories."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_kit.config import ConfigError
from grpo_kit.config.prompt_files import MAX_LINE_BYTES
from grpo_kit.config.prompts import Prompt, balanced_batch, load_prompts


def _write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_known_keys_are_fields_and_further_ones_metadata(tmp_path: Path):
    row = {"user_prompt": "ein Igel 🦔", "category": "animals", "difficulty": "easy", "source": {"page": 3}}
    path = _write(tmp_path, json.dumps(row), json.dumps({"user_prompt": " a cat "}))
    first, second = load_prompts(path)
    assert first == Prompt("ein Igel 🦔", "animals", "easy", {"source": {"page": 3}})
    assert second == Prompt("a cat", "basic", "medium", {})
    assert len({first, second}) == 2  # usable as keys


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_fine(tmp_path: Path):
    path = _write(tmp_path, b'\xef\xbb\xbf{"user_prompt": "a"}\r', b"   \r", b"", b'{"user_prompt": "b"}\r', b"")
    assert [prompt.user_prompt for prompt in load_prompts(path)] == ["a", "b"]


GOOD = '{"user_prompt": "a cat"}'
BROKEN = {
    "not JSON": "{user_prompt: 1}",
    "cut off": '{"user_prompt": "a ca',
    "two objects": f"{GOOD} {GOOD}",
    "not an object": '["a cat"]',
    "a number": "7",
    "missing": '{"prompt": "a cat"}',
    "not a string": '{"user_prompt": 7}',
    "null": '{"user_prompt": null}',
    "empty": '{"user_prompt": "  "}',
    "NUL": '{"user_prompt": "a\\u0000b"}',
    "lone surrogate": '{"user_prompt": "a\\ud800"}',
    "surrogate in metadata": '{"user_prompt": "a", "note": "\\udfff"}',
    "category of a wrong type": '{"user_prompt": "a", "category": 3}',
    "key twice": '{"user_prompt": "a", "user_prompt": "b"}',
    "NaN": '{"user_prompt": "a", "weight": NaN}',
    "deep": '{"user_prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "huge integer": '{"user_prompt": "a", "x": ' + "9" * 5000 + "}",
    "not UTF-8": b'{"user_prompt": "\xff"}',
    "binary": b"\x00\x01\x02",
    "too long": '{"user_prompt": "' + "a" * MAX_LINE_BYTES + '"}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_line_is_one_error_with_file_and_line(name: str, tmp_path: Path):
    path = _write(tmp_path, GOOD, "", BROKEN[name], GOOD)
    with pytest.raises(ConfigError) as error:
        load_prompts(path)
    text = str(error.value)
    assert text.startswith(f"{path}:3: ") and "\n" not in text and len(text) < len(str(path)) + 250


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
def test_empty_file_is_an_error(content: bytes, tmp_path: Path):
    with pytest.raises(ConfigError, match="empty"):
        load_prompts(_write(tmp_path, content))


@pytest.mark.parametrize("path", ["missing.jsonl", ".", "a\0b", "x" * 5000])
def test_file_that_cannot_be_read_is_an_error(path: str, tmp_path: Path):
    with pytest.raises(ConfigError):
        load_prompts(f"{tmp_path}/{path}")


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "prompts.jsonl"
    with path.open("wb") as file:
        file.truncate(10**11)  # sparse: 100 GB of zeros on one line
    with pytest.raises(ConfigError, match=":1: longer than"):
        load_prompts(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=40), max_size=4))
def test_any_bytes_give_prompts_or_a_prompt_error(tmp_path: Path, lines: list[bytes]):
    try:
        prompts = load_prompts(_write(tmp_path, *lines))
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert prompts


# -- batches -----------------------------------------------------------------------------------------------------------


def _prompts(**sizes: int) -> list[Prompt]:
    return [Prompt(f"{category} {index}", category) for category, size in sizes.items() for index in range(size)]


def test_batch_is_decided_by_seed_and_iteration_alone():
    prompts = _prompts(a=5, b=9, c=2)
    straight = [balanced_batch(prompts, 4, seed=3, iteration=i) for i in range(20)]
    assert straight[13] == balanced_batch(prompts, 4, seed=3, iteration=13)
    assert straight != [balanced_batch(prompts, 4, seed=4, iteration=i) for i in range(20)]


SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@given(SIZES, st.integers(1, 12), st.integers(0, 2**62), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_batch_repeats_no_prompt_while_there_are_others(sizes: list[int], size: int, seed: int, iteration: int):
    prompts = _prompts(**{f"c{index}": count for index, count in enumerate(sizes)})
    batch = balanced_batch(prompts, size, seed, iteration)
    assert len(batch) == size
    assert len({prompt.user_prompt for prompt in batch}) == min(size, len(prompts))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_categories_differ_by_at_most_one_however_unequal_their_sizes(categories: int, size: int, seed: int):
    prompts = _prompts(**{f"c{index}": 20 * (index + 1) for index in range(categories)})
    seen = Counter(p.category for i in range(30) for p in balanced_batch(prompts, size, seed, i))
    assert max(seen.values()) - min(seen.get(f"c{index}", 0) for index in range(categories)) <= 1


def test_an_epoch_shows_each_prompt_of_a_category_once():
    prompts = _prompts(a=12, b=12)
    seen = Counter(p.user_prompt for i in range(6) for p in balanced_batch(prompts, 4, seed=0, iteration=i))
    assert set(seen.values()) == {1} and len(seen) == 24


def test_batch_of_nothing_is_refused():
    for prompts, size in (([], 4), (_prompts(a=1), 0)):
        with pytest.raises(ConfigError, match="allowed"):
            balanced_batch(prompts, size, seed=0, iteration=0)
