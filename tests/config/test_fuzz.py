"""10,000 fuzzed configurations (R15) and 10,000 fuzzed prompt lines (R16): each is valid, or one clear line.

A test run takes 1,000 of each; `make test ARGS="tests/config/test_fuzz.py -m slow"` takes all 10,000. The same seed
makes the same cases, so a failure can be repeated by its number. What is elsewhere: single mistakes and their exact
words (test_config.py, test_prompts.py), what hypothesis draws (there too), a line of 100 GB.
"""

from __future__ import annotations

import copy
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from support.config_files import save_config

from grpo_kit.config import (
    PROFILES,
    Config,
    ConfigError,
    load_config,
    loading,
    prompt_files,
    strict,
    validated,
    validation,
)
from grpo_kit.config import prompts as prompts_module
from grpo_kit.config.prompt_files import MAX_LINE_BYTES
from grpo_kit.config.prompts import Prompt, load_prompts

SOME, ALL = 1_000, 10_000
COUNTS = [SOME, pytest.param(ALL, marks=[pytest.mark.slow, pytest.mark.long])]
PER_FILE = 20  # prompt lines in one file, so that the line in the error can be wrong


# --- configurations (R15) ---------------------------------------------------------------------------------------------

PROFILE_DATA = {name: load_config(name).to_dict() for name in PROFILES}
SETTINGS = [
    (section, key) for section, values in PROFILE_DATA["tiny"].items() if isinstance(values, dict) for key in values
]
TEXTS = ["", " ", "NaN", "1e999", "-0", "0x10", "null", "true", "None", "{prompt}", "cuda:99", "../../etc/passwd", "~"]
TEXTS += [
    "~nobody/x",
    "a\0b",
    "\x1b[31mred",
    "line\nbreak\r\n\u2028end",
    "\u202emirror",
    "\ud800",
    "é😀مرحبا",
    "x" * 9000,
]
TEXTS += ["$(id)", "{{7*7}}", "__class__", "a.b.c", "//", "data/", "file:///etc/passwd", "\ufeff", "e" + "\u0301" * 99]
NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 1e308, -1e-308, 0.1, 1e999, -1e999, float("nan"), 0.5, 2.5]
BARE = [None, True, False]


def any_value(draw: random.Random, depth: int = 3) -> object:
    """Anything that JSON can hold, and NaN, infinities and integers of 400 digits, which Python's JSON reads too."""
    kind = draw.randrange(6 if depth else 4)
    if kind < 3:
        return draw.choice((TEXTS, NUMBERS, BARE)[kind])
    if kind == 3:
        return "".join(chr(draw.randrange(0x3000)) for _ in range(draw.randrange(12)))
    count = draw.randrange(4)
    if kind == 4:
        return [any_value(draw, depth - 1) for _ in range(count)]
    return {any_key(draw): any_value(draw, depth - 1) for _ in range(count)}


def any_key(draw: random.Random) -> str:
    """A key that exists somewhere, such a key misspelt, or junk."""
    _section, known = draw.choice(SETTINGS)
    place = draw.randrange(len(known))
    return draw.choice([known, known[:place] + known[place + 1 :], known.upper(), draw.choice(TEXTS)])


def mutated(draw: random.Random) -> dict:
    """A profile's settings after one to four changes: values, unknown keys, missing keys, sections that are none."""
    data = copy.deepcopy(PROFILE_DATA[draw.choice(PROFILES)])
    for _ in range(draw.randint(1, 4)):
        name, key = draw.choice(SETTINGS)
        section = data.get(name)
        kind = draw.randrange(16)
        if kind >= 8 and isinstance(section, dict):  # what another profile has there
            section[key] = PROFILE_DATA[draw.choice(PROFILES)][name].get(key)
        elif kind == 0:
            data[name] = any_value(draw)
        elif kind == 1:
            data[any_key(draw)] = any_value(draw)
        elif not isinstance(section, dict):
            data.pop(name, None)
        elif kind == 2:
            section.pop(key, None)
        elif kind == 3:
            section[any_key(draw)] = any_value(draw)
        elif kind == 4 and isinstance(section.get(key), dict):
            section[key] |= {any_key(draw): any_value(draw)}
        elif kind == 5:
            data["reward_settings"] = {
                **PROFILE_DATA["tiny"]["reward_settings"],
                "options": {"safety": {"x": any_value(draw)}},
            }
        else:
            section[key] = any_value(draw)
    return data


def broken_text(draw: random.Random, data: dict) -> bytes:
    """A configuration as a file's bytes, most often damaged: cut, doubled, nested, in another encoding."""
    text = json.dumps(data).encode("utf-8", "surrogatepass")
    place = draw.randrange(len(text))
    return draw.choice(
        [
            text,
            text,
            b"\xef\xbb\xbf" + text.replace(b", ", b",\r\n"),
            text[:place],
            text[:place] + draw.randbytes(3) + text[place:],
            text[:place] + b"\0" + text[place:],
            text[:-1] + b', "model_settings": {}}',
            text[:-1] + b', "x": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
            text[:-1] + b', "training_settings": {"seed": ' + b"9" * 5_000 + b"}}",
            text.decode().encode("utf-16"),
            b"[" + text + b"]",
            b"",
        ]
    )


def any_configuration(draw: random.Random, folder: Path) -> Callable[[], Config]:
    """One way of the three to give settings: a dict, a file, overrides by dotted key."""
    data, kind = mutated(draw), draw.randrange(3)
    if kind == 0:
        return lambda: load_config(data)
    if kind == 1:
        place = folder / "c.json"
        place.write_bytes(broken_text(draw, data))
        return lambda: load_config(place)
    keys = [".".join(draw.choice(SETTINGS)) + draw.choice(["", "", "", ".", ".x", ".x.y"]) for _ in range(2)]
    keys.append(draw.choice([any_key(draw), keys[0]]))
    overrides = {key: any_value(draw) for key in keys}
    return lambda: load_config(draw.choice(PROFILES), overrides)


# Every one-line error says what is allowed, or what to do where there is nothing to choose from.
SAYS_WHAT = ("allowed", "not JSON", "Save the file as UTF-8", "nested too deeply", "Keep one of them", "integer string")
SAYS_WHAT += ("Write training_settings.", "Set it without a further dot")
NAMES_A_KEY = ("_settings", "profile", "unknown key", "key '", "c.json", "versions")


def check_configurations(count: int, folder: Path, seed: int = 15) -> Counter:
    """Read that many; every outcome is a `Config` that can be saved and read again, or one line."""
    draw, outcomes = random.Random(seed), Counter()
    for number in range(count):
        read = any_configuration(draw, folder)
        try:
            config = read()
        except ConfigError as error:
            text = str(error)
            assert len(text.splitlines()) == 1 and text.isprintable() and len(text) < 1_000, (number, text)
            assert any(words in text for words in SAYS_WHAT), (number, text)
            assert any(words in text for words in NAMES_A_KEY), (number, text)
            outcomes["one line"] += 1
        else:
            again = json.loads(json.dumps(config.to_dict(), allow_nan=False).encode("utf-8"))
            assert load_config(again) == config, number
            save_config(config, folder / "saved.json")
            outcomes["valid"] += 1
    return outcomes


@pytest.mark.parametrize("count", COUNTS)
def test_any_configuration_is_valid_or_one_line(count: int, tmp_path: Path) -> None:
    outcomes = check_configurations(count, tmp_path)
    print(dict(outcomes))
    assert outcomes.total() == count
    assert min(outcomes["valid"], outcomes["one line"]) > count / 50  # both happen, so both were tried


def unchecked_json(content: bytes, path: Path) -> dict:
    return json.loads(content)


def two_line_error(model: type, values: dict, **place: object) -> Config:
    try:
        return validated(model, values, **place)
    except ConfigError:
        raise ConfigError("model_settings: wrong\nallowed: another") from None


@pytest.mark.parametrize(
    ("module", "name", "broken"),
    [
        (strict, "strict_json", unchecked_json),
        (loading, "validated", two_line_error),
        (validation, "printable", str),
    ],
    ids=["a file read as it is", "an error of two lines", "an error with escape codes"],
)
def test_a_reader_that_is_less_careful_is_caught(
    module: ModuleType, name: str, broken: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, broken)
    with pytest.raises((AssertionError, ValueError, RecursionError, AttributeError, TypeError)) as caught:
        check_configurations(SOME, tmp_path)
    assert not isinstance(caught.value, ConfigError)


# --- prompts (R16) ----------------------------------------------------------------------------------------------------


def any_line(draw: random.Random) -> bytes:
    """One line of a prompt file: a record with any values, or one of the ways in which such files break."""
    record = {"user_prompt": draw.choice(["a red circle", *TEXTS])}
    record |= {draw.choice(["category", "difficulty", "note", any_key(draw)]): any_value(draw) for _ in range(2)}
    text = json.dumps(record, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    place = draw.randrange(len(text))
    depth = draw.choice([10, 500, 5_000])
    ways = [
        text,
        json.dumps(record).encode() + b"\r",
        b"\xef\xbb\xbf" + text,
        text[:place],
        text[:place] + draw.randbytes(2) + text[place:],
        text[:place] + b"\0" + text[place:],
        b'{"user_prompt": "a", "user_prompt": "b"}',
        b'{"user_prompt": "a", "x": {"y": 1, "y": 2}}',
        b'{"user_prompt": "a", "x": ' + b"[" * depth + b"]" * depth + b"}",
        b'{"user_prompt": "a", "x": ' + b"9" * depth + b"}",
        b'{"user_prompt": "\\ud800"}',
        b'{"user_prompt": "a", "x": NaN}',
        text.decode("utf-8", "replace").encode("utf-16"),
        draw.randbytes(draw.randrange(60)),
        b"",
        b"null",
    ]
    return draw.choice(ways).replace(b"\n", b" ")


def good_line(number: int) -> bytes:
    return json.dumps({"user_prompt": f"a red circle, number {number}", "category": "basic"}).encode()


def check_lines(count: int, folder: Path, seed: int = 16) -> Counter:
    """Read that many lines, each at some place in a file of good ones: records, or `file:line` of just that line."""
    draw, outcomes, place = random.Random(seed), Counter(), folder / "p.jsonl"
    for number in range(count):
        row = draw.randint(1, PER_FILE)
        lines = [good_line(i) for i in range(1, PER_FILE + 1)]
        lines[row - 1] = any_line(draw)
        place.write_bytes(b"\n".join(lines) + draw.choice([b"", b"\n", b"\r\n\n"]))
        try:
            found = load_prompts(place)
        except ConfigError as error:
            text = str(error)
            assert text.startswith(f"{place}:{row}: "), (number, text)
            assert len(text.splitlines()) == 1 and text.isprintable() and len(text) < len(str(place)) + 300, number
            outcomes["one line"] += 1
        else:
            assert PER_FILE - 1 <= len(found) <= PER_FILE and all(map(is_sound, found)), number
            outcomes["valid"] += 1
    return outcomes


def is_sound(prompt: Prompt) -> bool:
    """Its texts are texts, not empty, without NUL, and all of it can be written as JSON again."""
    texts = (prompt.user_prompt, prompt.category, prompt.difficulty)
    json.dumps(prompt.metadata, allow_nan=False, ensure_ascii=False).encode("utf-8")
    return all(isinstance(text, str) and text.strip() and "\0" not in text for text in texts)


@pytest.mark.parametrize("count", COUNTS)
def test_any_line_is_a_prompt_or_an_error_with_its_place(count: int, tmp_path: Path) -> None:
    outcomes = check_lines(count, tmp_path)
    print(dict(outcomes))
    assert outcomes.total() == count
    assert min(outcomes["valid"], outcomes["one line"]) > count / 50


def parsed_as_it_is(record: dict, where: str) -> Prompt:
    return Prompt(record.pop("user_prompt"), metadata=record)


def parsed_without_its_place(record: object, where: str) -> Prompt:
    return SOUND(record, where.rpartition(":")[0])


SOUND = prompts_module._prompt


@pytest.mark.parametrize("broken", [parsed_as_it_is, parsed_without_its_place])
def test_a_parser_that_is_less_careful_is_caught(
    broken: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts_module, "_prompt", broken)
    with pytest.raises((AssertionError, ValueError, RecursionError, AttributeError, TypeError, KeyError)) as caught:
        check_lines(SOME, tmp_path)
    assert not isinstance(caught.value, ConfigError)


def peak_of(place: Path) -> tuple[str, int]:
    """The error that reading a file gives, and the most bytes that were held on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as caught:
            load_prompts(place)
        return str(caught.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_line_of_50_mb_takes_no_50_mb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "p.jsonl"
    with place.open("wb") as file:
        file.write(good_line(1) + b'\n{"user_prompt": "')
        for _ in range(50):
            file.write(b"x" * 10**6)
        file.write(b'"}\n')
    error, peak = peak_of(place)
    print(f"peak {peak / 1e6:.1f} MB")
    assert error.startswith(f"{place}:2: longer than {MAX_LINE_BYTES:,} bytes")
    assert peak < 5 * MAX_LINE_BYTES
    monkeypatch.setattr(prompt_files, "_lines", lambda file, *_: [("1", file.read())])
    assert peak_of(place)[1] > 50e6  # the measure sees a reader that takes the line whole
