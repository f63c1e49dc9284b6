"""Raw text -> documents, streamed: files, folders, globs and URLs of .txt, .jsonl and .parquet, compressed or not.

Memory does not grow with a file or a document: a long one is read in pieces, which end with a line.
"""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import fsspec

from litmini.data.readers import check_text, import_pyarrow, read_lines, read_parquet
from litmini.errors import UserError
from litmini.files import existing_file

KINDS = (".txt", ".jsonl", ".parquet")
PIECE = 1 << 20
"""Characters of a document that are tokenised at once."""


@dataclass(frozen=True)
class Source:
    """One file of text."""

    name: str
    """A path, or a URL that fsspec opens."""
    size: int
    """Bytes."""
    stamp: str
    """Changes when the file does: its modification time, or a checksum where the file system has one."""


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one."""

    text: str
    first: bool
    """It begins a document."""
    last: bool
    """It ends one."""


def find_sources(inputs: list[str]) -> list[Source]:
    """Return the text files of files, folders (with their folders), globs and URLs, each once, folders sorted.

    Args:
        inputs: paths, or URLs of any file system of fsspec (`hf://datasets/org/name`, `s3://...`).

    Raises:
        UserError: one is missing, holds no text, or is of a kind that is not read.
    """
    sources: dict[str, Source] = {}
    for name in inputs:
        files = _remote(name) if "://" in name else _local(name)
        if not files:
            raise UserError(f"{name} holds no {', '.join(KINDS)} file (.gz and .zst are read, too).")
        sources.update({source.name: source for source in files})
    return list(sources.values())


def _local(name: str) -> list[Source]:
    if has_magic(name) and not Path(name).exists():
        paths = [Path(p) for p in sorted(glob(name, recursive=True))]
        paths = [p for p in paths if p.is_file() and _kind(p.name)]
    elif Path(name).is_dir():
        paths = [p for p in sorted(Path(name).rglob("*")) if p.is_file() and _kind(p.name) and p.name[0] != "."]
    else:
        paths = [existing_file(name, "text")]
        if not _kind(name):
            raise UserError(f"{name}: expected {', '.join(KINDS)}, as it is or with .gz or .zst after it.")
    return [Source(str(p), p.stat().st_size, str(p.stat().st_mtime_ns)) for p in paths]


def _remote(name: str) -> list[Source]:
    try:
        system, path = fsspec.core.url_to_fs(name)
        paths = sorted(system.glob(path) if has_magic(path) else system.find(path))
        infos = [(system.unstrip_protocol(p), system.info(p)) for p in paths if _kind(p)]
    except Exception as error:  # each file system raises its own
        raise UserError(f"{name} cannot be listed: {type(error).__name__}: {error}") from None
    stamps = [
        next((str(i[k]) for k in ("blob_id", "ETag", "etag", "mtime", "created") if i.get(k)), "") for _, i in infos
    ]
    return [Source(url, info["size"] or 0, stamp) for (url, info), stamp in zip(infos, stamps, strict=True)]


def _kind(name: str) -> str | None:
    """Return `.txt`, `.jsonl` or `.parquet`, compressed or not; None for another kind."""
    return next((k for k in KINDS for c in ("", ".gz", ".zst") if name.lower().endswith(k + c)), None)


def read_pieces(source: Source, text_key: str = "text", separator: str | None = None) -> Iterator[Piece]:
    """Yield the documents of a file, in pieces of about `PIECE` characters.

    Args:
        text_key: the field of JSONL records, or column of Parquet files, that holds the text.
        separator: the string between the documents of a .txt file; None: a file is one document.

    Raises:
        UserError: the file is damaged or not UTF-8, or a record has no text; names file and line.
    """
    with _opened(source) as raw:
        kind = _kind(source.name)
        if kind == ".txt":
            yield from _text(source.name, raw, separator)
            return
        is_parquet = kind == ".parquet"
        chunks = read_parquet(source.name, raw, text_key) if is_parquet else read_lines(source.name, raw)
        for where, record in (pair for chunk in chunks for pair in chunk.records()):
            text = _field(record, text_key, where)
            if len(text) <= PIECE:
                yield Piece(text, True, True)
                continue
            start = 0
            while start < len(text):
                stop = _find_end(text, start, start + PIECE)
                yield Piece(text[start:stop], start == 0, stop == len(text))
                start = stop


@contextmanager
def _opened(source: Source) -> Iterator[Any]:
    """Open a file for reading its bytes, decompressed; errors of reading name the file."""
    try:
        with fsspec.open(source.name, "rb") if "://" in source.name else open(source.name, "rb") as raw:
            if source.name.lower().endswith(".gz"):
                with gzip.open(raw) as plain:
                    yield plain
            elif source.name.lower().endswith(".zst"):
                with import_pyarrow().CompressedInputStream(raw, "zstd") as plain:
                    yield io.BufferedReader(plain)  # pyarrow's stream has no lines
            else:
                yield raw
    except UserError:
        raise
    except Exception as error:  # each remote file system raises its own
        if "://" not in source.name and not isinstance(error, (OSError, EOFError, zlib.error)):
            raise
        raise UserError(f"{source.name} cannot be read: {error}") from None


def _find_end(text: str, start: int, stop: int) -> int:
    """Return where to end a piece: after the last line, or else word, before `stop`; or the end of the text if near."""
    if stop >= len(text):
        return len(text)
    for mark in ("\n", " "):
        if (at := text.rfind(mark, start, stop)) > start:
            return at + 1 if mark == "\n" else at
    return stop


def _text(name: str, raw: Any, separator: str | None) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    buffer, first, line = "", True, 1
    while data := raw.read(PIECE):
        buffer += _decode(decoder, data, name, line)
        line += data.count(b"\n")
        if separator:
            *whole, buffer = buffer.split(separator)
            for text in whole:
                yield Piece(text, first, True)
                first = True
        while len(buffer) > PIECE:  # its end may be half a separator, which must stay whole
            stop = _find_end(buffer, 0, PIECE - len(separator or ""))
            yield Piece(buffer[:stop], first, False)
            buffer, first = buffer[stop:], False
    _decode(decoder, b"", name, line)
    if not (separator and first and not buffer.strip()):  # a separator may end the last document, too
        yield Piece(buffer, first, True)


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, name: str, line: int) -> str:
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise UserError(f"{name}:{line} is not UTF-8 text: {error.reason}. Convert the file to UTF-8.") from None


def _field(record: Any, key: str, where: str) -> str:
    if isinstance(record, ValueError):
        raise UserError(f"{where}: {record}")
    if not isinstance(record, dict) or key not in record:
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: no '{key}', found {keys}; name the field that holds the text with --text_key.")
    try:
        return check_text(record[key], f"'{key}'")
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from None
