"""Records of a data file, a chunk at a time: JSONL, JSON, CSV and Parquet. Memory does not grow with the file."""

from __future__ import annotations

import csv
import json
import re
import sys
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from litmini.errors import UserError
from litmini.files import existing_file

CHUNK, CHUNK_BYTES = 1000, 1 << 20  # records in memory at once: so many, or fewer where they are long


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of a file, as they were read: what follows is work for any process."""

    locations: list[str]
    """Where each record is, for errors: file:line."""
    records: Any
    """Lines as bytes, or records as dictionaries, or a table of Parquet; a ValueError is a record that cannot be read."""


def read_chunks(path: str) -> Iterator[Chunk]:
    """The records of a file, `CHUNK` at a time: memory does not grow with the file.

    Raises:
        UserError: the file is missing, empty or of a kind that is not read, or is not what its name says.
    """
    file = existing_file(path, "data file")
    readers = {".jsonl": _lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if file.suffix.lower() not in readers:
        raise UserError(f"{file}: expected .jsonl, .json, .csv or .parquet")
    empty = True
    for chunk in readers[file.suffix.lower()](file):
        empty = False
        yield chunk
    if empty:
        raise UserError(f"{file} holds no examples.")


def _lines(file: Path) -> Iterator[Chunk]:
    with file.open("rb") as opened:
        opened.seek(len(BOM_UTF8) if opened.read(len(BOM_UTF8)) == BOM_UTF8 else 0)
        lines = ((f"{file}:{number}", line) for number, line in enumerate(opened, 1) if line.strip())
        yield from _group(lines)


def _json(file: Path) -> Iterator[Chunk]:
    with file.open(encoding="utf-8-sig") as opened:
        try:
            yield from _group(
                (f"{file}:record {number}", record) for number, record in enumerate(read_items(opened), 1)
            )
        except UnicodeDecodeError:
            _decode(file.read_bytes(), file)
            raise
        except (ValueError, RecursionError) as error:  # the latter: absurdly deep lists
            raise UserError(f"{file}: {error}; one record a line belongs in a .jsonl file") from None


def _csv(file: Path) -> Iterator[Chunk]:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than csv's 128 KiB

    def records(rows: csv.DictReader[str]) -> Iterator[tuple[str, Any]]:
        for record in rows:
            short = None in record or None in record.values()
            yield (
                f"{file}:{rows.line_num}",
                ValueError("has more or fewer fields than the header") if short else record,
            )

    with file.open(encoding="utf-8-sig", newline="") as opened:
        rows = csv.DictReader(opened)
        try:
            yield from _group(records(rows))
        except csv.Error as error:
            raise UserError(f"{file}:{rows.line_num}: not valid CSV: {error}") from None
        except UnicodeDecodeError:
            _decode(file.read_bytes(), file)
            raise


def _parquet(file: Path) -> Iterator[Chunk]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError('Parquet files need pyarrow: pip install "litmini[parquet]"') from None
    try:
        first = 1
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(CHUNK):
            yield Chunk([f"{file}:row {number}" for number in range(first, first + len(batch))], batch)
            first += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is not valid Parquet: {error}") from None


def _group(records: Iterator[tuple[str, Any]]) -> Iterator[Chunk]:
    locations: list[str] = []
    contents: list[Any] = []
    size = 0
    for place, content in records:
        locations.append(place)
        contents.append(content)
        size += len(content) if isinstance(content, bytes) else 0
        if len(locations) == CHUNK or size > CHUNK_BYTES:
            yield Chunk(locations, contents)
            locations, contents, size = [], [], 0
    if locations:
        yield Chunk(locations, contents)


def _decode(content: bytes, where: str | Path) -> str:
    """UTF-8 as text; `where` is a file, or a line of one."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        place = f"{where}:{line}" if isinstance(where, Path) else where
        raise UserError(f"{place} is not UTF-8 text: {error.reason}. Convert the file to UTF-8.") from None


PIECE = 1 << 20  # characters read at once


ENDS = (",", "]", " ", "\t", "\n", "\r")  # what may follow an item


SOLID = re.compile(r"[^ \t\n\r]")


def read_items(file: TextIO) -> Iterator[Any]:
    """The items of the list that a file holds.

    Raises:
        ValueError: the file holds something else, or no JSON: then it says at which line and column.
    """
    pieces = _Pieces(file)
    if pieces.next() != "[":
        pieces.value()
        if pieces.next():
            raise pieces.error("Extra data")
        raise ValueError("expected a JSON list of records")
    pieces.at += 1
    end = pieces.next() == "]"
    pieces.at += end
    while not end:
        yield pieces.value()
        mark = pieces.next()
        if mark not in ("]", ","):
            raise pieces.error("Expecting ',' delimiter")
        pieces.at += 1
        end = mark == "]"
        if not end:
            pieces.next()
    if pieces.next():
        raise pieces.error("Extra data")


class _Pieces:
    """A file of which no more than what is being read is in memory."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at = file, "", 0
        self.lines = self.columns = 0  # before the text
        self.decode = json.JSONDecoder().raw_decode

    def more(self) -> bool:
        """Read on and forget what is before `at`; whether there was more."""
        used = self.text[: self.at]
        self.lines += used.count("\n")
        self.columns = len(used) - used.rfind("\n") - 1 if "\n" in used else self.columns + len(used)
        piece = self.file.read(max(PIECE, len(self.text)))  # a long item is not begun again for each piece
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)

    def next(self) -> str:
        """The next character that is no white space, which is then at `at`; none at the end."""
        while not (found := SOLID.search(self.text, self.at)):
            self.at = len(self.text)
            if not self.more():
                return ""
        self.at = found.start()
        return found[0]

    def value(self) -> Any:
        """The value that begins at `at`."""
        last = False
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                if last or self.text[end : end + 1] in ENDS:  # else it may go on: 1, 1.5
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                if last:
                    raise self.error(error.msg, error.pos) from None
            last = not self.more()

    def error(self, what: str, at: int | None = None) -> ValueError:
        before = self.text[: self.at if at is None else at]
        column = len(before) - before.rfind("\n") if "\n" in before else self.columns + len(before) + 1
        return ValueError(f"not valid JSON: {what}: line {self.lines + before.count(chr(10)) + 1} column {column}")
