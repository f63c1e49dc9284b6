"""Records of a data file, a chunk at a time: JSONL, JSON, CSV and Parquet. Memory does not grow with the file."""

from __future__ import annotations

import csv
import io
import json
import sys
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from litmini.errors import UserError
from litmini.files import existing_file

CHUNK, CHUNK_BYTES = 1000, 1 << 20  # records in memory at once: so many, or fewer where they are long


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of a file, as they were read; any process can parse them."""

    locations: list[str]
    """Where each record is, for errors: file:line."""
    content: Any
    """Lines as bytes, or records as dictionaries, or a record batch of Parquet."""
    columns: dict[str, str] = field(default_factory=dict)
    """Key that a record gets -> the one that it has."""

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield the location and the value of each record; a ValueError in place of one that cannot be read."""
        values = self.content if isinstance(self.content, list) else map(_without_nulls, self.content.to_pylist())
        for where, value in zip(self.locations, values, strict=True):
            value = parse_json(_decode(value, where)) if isinstance(value, bytes) else value
            yield where, _renamed(value, self.columns) if self.columns and isinstance(value, dict) else value


def read_chunks(path: str, columns: dict[str, str] | None = None) -> Iterator[Chunk]:
    """Yield the records of a file, `CHUNK` at a time.

    Args:
        columns: key that a record gets -> the one that it has.

    Raises:
        UserError: the file is missing, empty or of a kind that is not read, or is not what its name says.
    """
    file = existing_file(path, "data file")
    readers = {".jsonl": read_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": read_parquet}
    if file.suffix.lower() not in readers:
        raise UserError(f"{file}: expected .jsonl, .json, .csv or .parquet")
    empty = True
    with file.open("rb") as raw:
        for chunk in readers[file.suffix.lower()](str(file), raw):
            empty = False
            yield replace(chunk, columns=columns) if columns else chunk
    if empty:
        raise UserError(f"{file} holds no examples.")


def read_lines(name: str, raw: Iterable[bytes]) -> Iterator[Chunk]:
    """Yield the lines of a JSONL file that are not blank."""
    lines = (line if number > 1 else line.removeprefix(BOM_UTF8) for number, line in enumerate(raw, 1))
    return _group((f"{name}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())


def read_parquet(name: str, raw: Any, column: str | None = None) -> Iterator[Chunk]:
    """Yield the rows of a Parquet file.

    Args:
        column: the only one to read (--text_key); None: all.

    Raises:
        UserError: the file is damaged or has no such column, or pyarrow is not installed.
    """
    pyarrow = import_pyarrow()
    first = 1
    try:
        file = pyarrow.parquet.ParquetFile(raw)
        names = file.schema_arrow.names
        if column and column not in names:
            raise UserError(f"{name} has no column '{column}'; there are {', '.join(names)}: --text_key.")
        for batch in file.iter_batches(CHUNK, columns=[column] if column else None):
            yield Chunk([f"{name}:row {number}" for number in range(first, first + len(batch))], batch)
            first += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name} is not valid Parquet: {error}") from None


def import_pyarrow() -> Any:
    """Return pyarrow, with its Parquet reader."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError('Parquet and zstd files need pyarrow: pip install "litmini[parquet]"') from None
    return pyarrow


def parse_json(text: str) -> Any:
    """Return what a JSON text holds, or the ValueError that says why it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: absurdly deep lists
        return ValueError(f"not valid JSON: {error}")


def check_text(value: Any, what: str) -> str:
    """Return `value` if it is a string that UTF-8 can encode.

    Raises:
        ValueError: it is not; begins with `what`.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half a character (a lone \\ud800 to \\udfff escape)") from None
    return value


def _read_json(name: str, raw: Any) -> Iterator[Chunk]:
    from litmini.data.json_list import read_items

    try:
        items = read_items(io.TextIOWrapper(raw, encoding="utf-8-sig"))
        yield from _group((f"{name}:record {number}", record) for number, record in enumerate(items, 1))
    except UnicodeDecodeError:
        _find_bad_line(name)
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: {error}; one record a line belongs in a .jsonl file") from None


def _read_csv(name: str, raw: Any) -> Iterator[Chunk]:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than csv's 128 KiB
    reader = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""))

    def records() -> Iterator[tuple[str, Any]]:
        for record in reader:
            is_complete = None not in record and None not in record.values()
            problem = ValueError("has more or fewer fields than the header")
            yield f"{name}:{reader.line_num}", record if is_complete else problem

    try:
        yield from _group(records())
    except csv.Error as error:
        raise UserError(f"{name}:{reader.line_num}: not valid CSV: {error}") from None
    except UnicodeDecodeError:
        _find_bad_line(name)
        raise


def _renamed(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any] | ValueError:
    """Return a record with the keys of `columns`, or the ValueError that says which one it lacks."""
    if lost := [theirs for theirs in columns.values() if theirs not in record]:
        said = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
        return ValueError(
            f"has no {', '.join(lost)}, found {', '.join(record)}; data.columns is {{{said}}}: each a key that litmini "
            f"reads, and the column that has it"
        )
    rest = {key: value for key, value in record.items() if key not in columns.values()}
    return rest | {ours: record[theirs] for ours, theirs in columns.items()}


def _without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """Return a row of Parquet without the keys within its values that are null: a struct has all keys of its column."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(one) for key, one in value.items() if one is not None}
        return [clean(one) for one in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in record.items()}


def _group(records: Iterable[tuple[str, Any]]) -> Iterator[Chunk]:
    locations: list[str] = []
    content: list[Any] = []
    size = 0
    for where, value in records:
        locations.append(where)
        content.append(value)
        size += len(value) if isinstance(value, bytes) else 0
        if len(locations) == CHUNK or size > CHUNK_BYTES:
            yield Chunk(locations, content)
            locations, content, size = [], [], 0
    if locations:
        yield Chunk(locations, content)


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {error.reason}. Convert the file to UTF-8.") from None


def _find_bad_line(name: str) -> None:
    """Raise the UserError that names the first line of a file that is not UTF-8."""
    with open(name, "rb") as raw:
        for number, line in enumerate(raw, 1):
            _decode(line, f"{name}:{number}")
