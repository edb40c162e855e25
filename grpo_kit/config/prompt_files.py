"""Files of records as people have them: JSONL, a JSON array, CSV, parquet, arrow, and the folders of `datasets`."""

import codecs
import csv
import datetime
import decimal
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from grpo_kit.config.errors import ConfigError, one_line, printable, shown
from grpo_kit.config.strict import strict_json

MAX_LINE_BYTES = 1_000_000
MAX_WHOLE_BYTES = 1_000_000_000  # of an array or a CSV file, which is read in one piece
NEEDED = "user_prompt"  # the column that a table must have
_SEPARATORS = (",", ";", "\t", "|")
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip archive, such as a workbook of Excel"}
_JOINED = b"}" + codecs.BOM_UTF8 + b"{"  # where a file without a last line end was joined with one that has a mark


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a file with its place for an error: file:line, or file and row.

    What a file is its first bytes say, of tables without such bytes the end of its name (.csv, .tsv, .arrow). Lines are
    read one by one, parquet and arrow in batches. A `ConfigError` says what is wrong, and where.
    """
    if path.is_dir():
        yield from _table_rows(path, _dataset_files(path))
        return
    with path.open("rb") as file:
        head = file.read(4096)
        file.seek(0)
        if packed := next((name for magic, name in _PACKED.items() if head.startswith(magic)), None):
            raise ConfigError(f"{path}: found {packed}. Unpack it, or save it as CSV or JSONL in UTF-8")
        suffix, encoding = path.suffix.lower(), _encoding(head)
        if head.startswith(b"PAR1") or suffix in (".parquet", ".arrow"):
            yield from _table_rows(path, [path])
        elif suffix in (".csv", ".tsv"):
            yield from _csv_rows(_whole_text(file, path, encoding), path)
        elif head.decode(encoding, "ignore").lstrip("\ufeff \t\r\n").startswith("["):
            entries = strict_json(_whole_text(file, path, encoding).encode(), path)
            yield from ((f"{path}: entry {number}", entry) for number, entry in enumerate(entries, start=1))
        else:
            yield from _lines(file, path, encoding)


def _encoding(head: bytes) -> str:
    """UTF-16 where a byte-order mark or the zeros of plain letters show it, else UTF-8."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    zeros = head[:2].find(b"\0") if len(head) > 1 and head[:2] != b"\0\0" else -1
    return {0: "utf-16-be", 1: "utf-16-le"}.get(zeros, "utf-8")


def _whole_text(file: BinaryIO, path: Path, encoding: str) -> str:
    content = file.read(MAX_WHOLE_BYTES + 1)
    if len(content) > MAX_WHOLE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_WHOLE_BYTES:,} bytes. Write JSONL, one object a line, or parquet")
    try:
        return content.decode(encoding).lstrip("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not {encoding.upper()} text (byte {error.start}). Save as UTF-8") from None


def _lines(file: BinaryIO, path: Path, encoding: str) -> Iterator[tuple[str, Any]]:
    text = None if encoding == "utf-8" else io.TextIOWrapper(file, encoding)
    for number in itertools.count(1):
        try:
            line = file.readline(MAX_LINE_BYTES + 1) if text is None else text.readline(MAX_LINE_BYTES + 1).encode()
        except UnicodeError:
            raise ConfigError(f"{path}:{number}: not {encoding.upper()} text. Save the file as UTF-8") from None
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise ConfigError(f"{path}:{number}: longer than {MAX_LINE_BYTES:,} bytes. Split it, or remove it")
        for part in line.replace(_JOINED, b"}\n{").split(b"\n"):
            if part.replace(codecs.BOM_UTF8, b"").strip():
                yield f"{path}:{number}", strict_json(part, path, number)


def _csv_rows(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows below a header; an empty cell is a key left out, one that begins with [ or { is JSON, all else is text."""
    first, last = text.partition("\n")[0], 0
    separator = max(_SEPARATORS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        _require_columns(names, f"{path}:1")
        last = reader.line_num
        for row in reader:
            line, last = last + 1, reader.line_num
            if len(row) <= 1 and not "".join(row).strip():
                continue
            if len(row) != len(names):
                raise ConfigError(f"{path}:{line}: found {len(row)} cells, the header has {len(names)}")
            record: dict[str, Any] = {name: cell for name, cell in zip(names, row, strict=True) if cell.strip()}
            for name, cell in record.items():
                if name != NEEDED and cell.startswith(("[", "{")):
                    record[name] = strict_json(cell.encode(), path, line)
            yield f"{path}:{line}", record
    except csv.Error as error:
        raise ConfigError(f"{path}:{last + 1}: not CSV: {error}") from None


def _require_columns(names: Sequence[str], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if NEEDED not in names or twice is not None:
        found = f"columns {', '.join(names):.100}" if twice is None else f"the column {shown(twice)} twice"
        raise ConfigError(f"{where}: found {printable(found)}, allowed: {NEEDED} and others, each once. Rename them")


def _table_rows(path: Path, files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of parquet and arrow files; a null, and NaN, which pandas writes for it, is a key left out."""
    from pyarrow import ArrowException

    number = 0
    for file in files:
        try:
            for batch in _batches(file):
                _require_columns(batch.schema.names, str(file))
                for row in batch.to_pylist():
                    number += 1
                    plain = {name: _plain(value) for name, value in row.items()}
                    yield f"{path}: row {number}", {name: value for name, value in plain.items() if value is not None}
        except (ArrowException, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: row {number + 1}: {printable(one_line(error))}") from None


def _batches(file: Path) -> Iterator[Any]:
    from pyarrow import ipc, memory_map, parquet

    with memory_map(str(file)) as source:
        is_stream = file.suffix.lower() == ".arrow" and not source.read(4).startswith(b"PAR1")
        source.seek(0)
        yield from ipc.open_stream(source) if is_stream else parquet.ParquetFile(source).iter_batches()


def _plain(value: object) -> object:
    """Dates and decimal numbers as text; NaN as None."""
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def _dataset_files(folder: Path) -> list[Path]:
    """The arrow files of a folder that `save_to_disk` of `datasets` wrote, or the parquet files of one."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = [name for name in strict_json(splits.read_bytes(), splits)["splits"] if (folder / name).is_dir()]
        if len(names) != 1:
            raise ConfigError(f"{folder}: found the splits {', '.join(names) or 'none'}. Name one: {folder / 'train'}")
        folder = folder / names[0]
    state = folder / "state.json"
    if state.is_file():
        return [folder / one["filename"] for one in strict_json(state.read_bytes(), state)["_data_files"]]
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise ConfigError(f"{folder}: a folder without state.json or parquet files. Name a file with prompts")
    return files
