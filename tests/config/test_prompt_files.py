"""Prompts in the forms in which people have them, and batches from many of them."""

import json
import random
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import FrameType

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from grpo_kit.config import PROJECT_ROOT, ConfigError
from grpo_kit.config.prompts import Prompt, balanced_batch, load_prompts
from grpo_kit.config.seeds import derive_seed

ROWS = [
    {"user_prompt": "a cat", "category": "animals", "difficulty": "easy"},
    {"user_prompt": "ein Igel 🦔", "category": None, "difficulty": None, "count": 3},
    {"user_prompt": 'two dogs, "left" and right', "category": "animals", "paraphrases": ["a pair; of dogs"]},
]
PROMPTS = [
    Prompt("a cat", "animals", "easy"),
    Prompt("ein Igel 🦔", metadata={"count": 3}),
    Prompt('two dogs, "left" and right', "animals", metadata={"paraphrases": ["a pair; of dogs"]}),
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
BOM = "\ufeff"


def written(folder: Path, content: str | bytes, name: str = "p.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_prompts(path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and text.isprintable() and str(path) in text
    return text.replace(str(path), path.name)


FORMS = {
    "lines": LINES,
    "two files with byte-order marks joined": f"{BOM}{LINES.splitlines()[0]}{BOM}" + LINES.partition("\n")[2],
    "a mark at the start of a later line": f"{BOM}{LINES}".replace("\n", f"\n{BOM}"),
    "a mark twice": f"{BOM}{BOM}{LINES}",
    "an array on one line": json.dumps(ROWS),
    "an array laid out": f"\n {json.dumps(ROWS, indent=2)}\r\n",
    "an array with a mark": BOM + json.dumps(ROWS, ensure_ascii=False),
    "UTF-16 as PowerShell writes it": LINES.replace("\n", "\r\n").encode("utf-16"),
    "UTF-16 with the large end first": (BOM + LINES).encode("utf-16-be"),
    "UTF-16 without a mark": LINES.encode("utf-16-le"),
    "an array in UTF-16": json.dumps(ROWS, indent=1).encode("utf-16"),
}


@pytest.mark.field("F14")
@pytest.mark.parametrize("form", FORMS)
def test_it_is_read(form: str, tmp_path: Path) -> None:
    assert load_prompts(written(tmp_path, FORMS[form])) == PROMPTS


GOOD = LINES.splitlines()[0]
WRONG = {
    "single quotes": (f"{GOOD}\n{{'user_prompt': 'a'}}", "p.jsonl:2: not JSON:", "double quotes"),
    "typographic quotes": (f"{GOOD}\n{{“user_prompt”: “a”}}", "p.jsonl:2: not JSON:", "plain quotes"),
    "Python's words": (
        f'{GOOD}\n{{"user_prompt": "a", "category": None}}',
        "p.jsonl:2: not JSON:",
        "null, true, false",
    ),
    "two records on a line": (
        f"{GOOD}\n{GOOD} {GOOD}",
        "p.jsonl:2: not JSON: Extra data, found '{",
        "one record a line",
    ),
    "an entry that is a text": (json.dumps([*ROWS, "a cat"], indent=1), "p.jsonl: entry 4: found 'a cat'", "allowed"),
    "an array cut off": (json.dumps(ROWS, indent=1)[:-30], "p.jsonl:16: not JSON:", "column"),
    "a null for the prompt": (f'{GOOD}\n{{"user_prompt": null}}', "p.jsonl:2: user_prompt: found null", "allowed"),
    "gzip": (b"\x1f\x8b\x08\x00rest", "p.jsonl: found gzip", "Unpack it"),
    "a workbook": (b"PK\x03\x04rest", "p.jsonl: found a zip archive, such as a workbook of Excel", "CSV"),
    "UTF-16 cut off": (LINES.encode("utf-16")[:-1], "p.jsonl:3: not UTF-16 text", "UTF-8"),
}


@pytest.mark.field("F14")
@pytest.mark.parametrize("form", WRONG)
def test_the_line_says_what_it_found(form: str, tmp_path: Path) -> None:
    content, start, part = WRONG[form]
    text = error_of(written(tmp_path, content))
    assert text.startswith(start) and part in text, text


# --- tables -----------------------------------------------------------------------------------------------------------

CSV = (
    "user_prompt,category,difficulty,count,paraphrases\na cat,animals,easy,,\nein Igel 🦔,,,3,\n\n"
    '"two dogs, ""left"" and right",animals,,,"[""a pair; of dogs""]"\n'
)
TABLES = {
    "CSV": (CSV.encode(), "p.csv"),
    "CSV of Excel": (f"{BOM}{CSV}".replace("\n", "\r\n").encode(), "P.CSV"),
    "tabs in UTF-16": ("user_prompt\tcategory\tcount\r\na cat\tanimals\t3\r\n".encode("utf-16"), "p.tsv"),
    "semicolons": (b"category;user_prompt\nanimals;a cat, or two\n", "p.csv"),
}


@pytest.mark.field("F11")
@pytest.mark.parametrize("form", TABLES)
def test_a_csv_file_is_read(form: str, tmp_path: Path) -> None:
    content, name = TABLES[form]
    found = load_prompts(written(tmp_path, content, name))
    if form.startswith("CSV"):
        assert found[0] == PROMPTS[0] and found[2] == PROMPTS[2]
        assert found[1] == Prompt("ein Igel 🦔", metadata={"count": "3"})  # a cell is text
    else:
        text = {"tabs in UTF-16": "a cat", "semicolons": "a cat, or two"}[form]
        assert [(p.user_prompt, p.category) for p in found] == [(text, "animals")]


def table() -> pa.Table:
    return pa.Table.from_pylist(ROWS, pa.schema([*((n, pa.string()) for n in list(ROWS[0])), ("count", pa.int64()),
                                                 ("paraphrases", pa.list_(pa.string()))]))  # fmt: skip


@pytest.mark.field("F11")
@pytest.mark.parametrize("name", ["p.parquet", "renamed.jsonl", "stream.arrow"])
def test_a_column_file_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith(".arrow"):
        with ipc.new_stream(str(path), table().schema) as writer:
            writer.write_table(table(), max_chunksize=2)
    else:
        parquet.write_table(table(), path, row_group_size=2)
    assert load_prompts(path) == PROMPTS


@pytest.mark.field("F11")
def test_a_folder_of_datasets_is_read_and_of_several_splits_one_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset(table())
    one.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=one).save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=one, test=one.select([2])).save_to_disk(tmp_path / "both")
    for path in ("one", "single", "both/train"):
        assert load_prompts(tmp_path / path) == PROMPTS, path
    assert load_prompts(tmp_path / "both" / "test") == PROMPTS[2:]
    assert "both: found the splits train, test. Name one" in error_of(tmp_path / "both")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    parquet.write_table(table(), tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    assert load_prompts(tmp_path / "hub") == PROMPTS
    (tmp_path / "empty").mkdir()
    assert "empty: a folder without state.json or parquet files" in error_of(tmp_path / "empty")


def test_pandas_and_dates_come_back_as_json_has_them(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(
        {"user_prompt": ["a", "b"], "score": [0.5, float("nan")], "day": pd.to_datetime(["2026-01-02"] * 2)}
    )
    frame.to_parquet(tmp_path / "p.parquet")
    assert [p.metadata for p in load_prompts(tmp_path / "p.parquet")] == [
        {"score": 0.5, "day": "2026-01-02 00:00:00"},
        {"day": "2026-01-02 00:00:00"},
    ]


WRONG_TABLES = {
    "no such column": (b"prompt,id\na cat,1\n", "p.csv", "p.csv:1: found columns prompt, id, allowed: user_prompt"),
    "a column twice": (b"user_prompt,x,x\na,1,2\n", "p.csv", "p.csv:1: found the column 'x' twice"),
    "too few cells": (b'user_prompt,category\n"a\nb",x\nc\n', "p.csv", "p.csv:4: found 1 cells, the header has 2"),
    "an open quote": (b'user_prompt,category\na,b\n"c,d\n', "p.csv", "p.csv:3: not CSV: unexpected end of data"),
    "an empty prompt": (b"user_prompt,category\n,b\n", "p.csv", "p.csv:2: found {'category': 'b'}, allowed"),
    "Windows' own letters": ("user_prompt\na\ncafé\n".encode("cp1252"), "p.csv", "p.csv:3: not UTF-8 text (byte 17)"),
    "parquet cut off": (b"PAR1rest", "p.parquet", "p.parquet: row 1: "),
    "no arrow": (b"\xff\xff\xff\xffrest", "p.arrow", "p.arrow: row 1: "),
    "bytes": ([{"user_prompt": "a", "thumbnail": b"\xff\xd8"}], "p.parquet", "p.parquet: row 1: found a value"),
    "no picture": ([{"user_prompt": "a", "image": b"\xff\xd8"}], "p.parquet", "p.parquet: row 1: image: found 2 b"),
    "a null": ([{"user_prompt": "a"}, {"user_prompt": None}], "p.parquet", "p.parquet: row 2: found {}, allowed"),
    "a number": ([{"user_prompt": "a", "category": 3}], "p.parquet", "p.parquet: row 1: category: found 3, allowed"),
    "another column": ([{"text": "a"}], "p.parquet", "p.parquet: found columns text, allowed: user_prompt"),
}  # fmt: skip


@pytest.mark.field("F11")
@pytest.mark.parametrize("form", WRONG_TABLES)
def test_an_error_in_a_table_names_file_and_row(form: str, tmp_path: Path) -> None:
    content, name, expected = WRONG_TABLES[form]
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else parquet.write_table(
        pa.Table.from_pylist(content), path
    )
    assert error_of(path).startswith(expected)


# --- batches ----------------------------------------------------------------------------------------------------------


def shuffled(items: list[int] | range, seed: int, purpose: str, number: int) -> list[int]:
    result = list(items)
    random.Random(derive_seed(seed, "prompts", purpose, number)).shuffle(result)
    return result


def batch_as_before(prompts: list[Prompt], size: int, seed: int, iteration: int) -> list[Prompt]:
    """The batch by whole shuffled lists, as the kit made it before it knew large files."""
    categories: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        categories.setdefault(prompt.category, []).append(index)
    names, chosen = sorted(categories), []
    for place in range(iteration * size, (iteration + 1) * size):
        round_number, turn = divmod(place, len(names))
        name = names[shuffled(range(len(names)), seed, "categories", round_number)[turn]]
        epoch, position = divmod(round_number, len(categories[name]))
        order = shuffled(categories[name], seed, name, epoch)
        preferred = order[position:] + order[:position]
        others = chain(preferred, shuffled(range(len(prompts)), seed, "any", place))
        chosen.append(next((index for index in others if index not in chosen), preferred[0]))
    return [prompts[index] for index in chosen]


@pytest.mark.field("F11")
@pytest.mark.parametrize("name", ["shapeworld_train", "shapeworld_val", "train_prompts", "val_prompts"])
def test_batches_of_the_shipped_prompts_are_those_of_before(name: str) -> None:
    prompts = load_prompts(PROJECT_ROOT / "data" / "prompts" / f"{name}.jsonl")
    for seed, size, iteration in [(0, 4, 0), (0, 8, 1), (1, 8, 77), (2**40, 16, 1234)]:
        assert balanced_batch(prompts, size, seed, iteration) == batch_as_before(prompts, size, seed, iteration)


@pytest.mark.field("F11")
def test_batches_of_random_sets_are_those_of_before_however_large_they_are() -> None:
    draw = random.Random(5)
    for count in [1, 2, 3, 7, 60, 2047, 2048, 2049, 4095, 4096, 4097, 8192, 20_001]:
        kinds = draw.randint(1, 6)
        prompts = [Prompt(f"{i}", f"c{min(draw.randrange(kinds), draw.randrange(kinds))}") for i in range(count)]
        for size in (1, 5, 9):
            seed, iteration = draw.randrange(2**63), draw.randrange(10_000)
            expected = batch_as_before(prompts, size, seed, iteration)
            assert balanced_batch(prompts, size, seed, iteration) == expected, (count, size, seed, iteration)


def test_a_list_that_was_changed_in_place_gives_the_batch_of_what_it_holds_now() -> None:
    prompts = [Prompt(f"{i}", f"c{i % 3}") for i in range(30)]
    balanced_batch(prompts, 4, 0, 0)
    prompts.reverse()
    prompts[4] = Prompt("new", "c9")
    assert balanced_batch(prompts, 4, 0, 0) == batch_as_before(prompts, 4, 0, 0)
    assert balanced_batch(tuple(prompts), 4, 0, 1) == batch_as_before(prompts, 4, 0, 1)


KINDS = {
    "one category": lambda index: "c",
    "twelve": lambda index: f"c{index % 12}",
    "thousands": lambda index: f"c{index % 5000}",
    "one of three prompts": lambda index: "rare" if index < 3 else "c",
}


@pytest.mark.field("F11")
@pytest.mark.parametrize("kinds", KINDS)
def test_the_work_of_an_iteration_does_not_grow_with_the_prompts(kinds: str) -> None:
    prompts = [Prompt(f"{i}", KINDS[kinds](i)) for i in range(400_000)]
    assert lines_run(prompts) < 100_000  # by whole lists: millions
    batch = balanced_batch(prompts, 8, 0, 3)
    assert len(set(batch)) == 8 and (kinds != "one of three prompts" or set(prompts[:3]) < set(batch))


def lines_run(prompts: list[Prompt]) -> int:
    """How many lines of Python ten batches run, beside the first two, which look at every prompt and shuffle."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable:
        nonlocal count
        count += event == "line"
        return trace

    for iteration in (0, 1):
        balanced_batch(prompts, 8, 0, iteration)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for iteration in range(2, 12):
            balanced_batch(prompts, 8, 0, iteration)
    finally:
        sys.settrace(before)
    return count
