"""Files -> examples. A file's form is found by looking at its records.

Forms: `messages`, ShareGPT `conversations`, Alpaca `instruction`/`output`, `prompt`/`completion`, or plain `text`; as
JSONL, JSON, CSV or Parquet.
"""

from __future__ import annotations

import csv
import json
import sys
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litmini.config import UserError
from litmini.files import existing_file
from litmini.json_list import read_items
from litmini.tokenizer import Message

CHUNK, CHUNK_BYTES = 1000, 1 << 20  # records in memory at once: so many, or fewer where they are long
FORMS = {
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "tool": "tool"}
ROLES = ("system", "developer", "user", "assistant", "tool")
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """One record: `messages`, or `text` of which what follows `prompt` is trained."""

    where: str
    """file:line, for errors."""
    messages: list[Message] | None = None
    prompt: str = ""
    text: str = ""


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of a file, as they were read: what follows is work for any process."""

    places: list[str]
    """Where each record is, for errors: file:line."""
    records: Any
    """Lines as bytes, or records as dictionaries, or a table of Parquet; a ValueError is a record that cannot be read."""


def read_examples(path: str, has_template: bool) -> list[Example]:
    """All records of a file.

    Args:
        has_template: Alpaca and prompt/completion become messages; without one, plain text.

    Raises:
        UserError: the file is missing, empty, of unknown form, mixes forms, or has broken records; all named by file:line.
    """
    examples: list[Example] = []
    problems: list[str] = []
    form = None
    for chunk in read_chunks(path):
        form = parse_chunk(chunk, form, has_template, examples, problems)
    if problems:
        raise bad_records(problems)
    return examples


def pick_examples(path: str, has_template: bool, wanted: Collection[int]) -> list[Example]:
    """The records with the numbers `wanted` (from 0), in the order of the file; the others are passed over.

    Raises:
        UserError: as `read_examples`.
    """
    found: list[Example] = []
    problems: list[str] = []
    first, form = 0, None
    for chunk in read_chunks(path):
        inside = [n - first for n in wanted if first <= n < first + len(chunk.places)]
        first += len(chunk.places)
        if form is None or inside:
            examples: list[Example] = []
            form = parse_chunk(chunk, form, has_template, examples, problems)
            if problems:
                raise bad_records(problems)
            found += [examples[n] for n in sorted(inside)]
    return found


def find_places(path: str, wanted: Collection[int]) -> dict[int, str]:
    """Where the records with the numbers `wanted` (from 0) are: file:line. The file is read up to the last of them."""
    found: dict[int, str] = {}
    first, last = 0, max(wanted)
    for chunk in read_chunks(path):
        found |= {n: chunk.places[n - first] for n in wanted if first <= n < first + len(chunk.places)}
        first += len(chunk.places)
        if first > last:
            break
    return found


def parse_chunk(
    chunk: Chunk, form: str | None, has_template: bool, examples: list[Example], problems: list[str]
) -> str | None:
    """Add the examples in a chunk to `examples`, and what is wrong with others to `problems`; returns the file's form.

    Args:
        form: of the records before; None: take that of the first.
    """
    records = chunk.records if isinstance(chunk.records, list) else chunk.records.to_pylist()
    for where, raw in zip(chunk.places, records, strict=True):
        try:
            record = _parse(_decode(raw, where)) if isinstance(raw, bytes) else raw
            found = _forms(record)
            form = form or found[0]
            if form not in found:
                raise ValueError(f"is {found[0]}, but the records before it are {form}; one form in a file")
            examples.append(_example(where, record, form, has_template))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return form


def bad_records(problems: list[str]) -> UserError:
    """One error for all problems; the first ten are listed."""
    more = [f"... and {len(problems) - 10} more"] * (len(problems) > 10)
    return UserError("bad records:\n  " + "\n  ".join(problems[:10] + more))


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
    places: list[str] = []
    contents: list[Any] = []
    size = 0
    for place, content in records:
        places.append(place)
        contents.append(content)
        size += len(content) if isinstance(content, bytes) else 0
        if len(places) == CHUNK or size > CHUNK_BYTES:
            yield Chunk(places, contents)
            places, contents, size = [], [], 0
    if places:
        yield Chunk(places, contents)


def _decode(content: bytes, where: str | Path) -> str:
    """UTF-8 as text; `where` is a file, or a line of one."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        place = f"{where}:{line}" if isinstance(where, Path) else where
        raise UserError(f"{place} is not UTF-8 text: {error.reason}. Convert the file to UTF-8.") from None


def _parse(text: str) -> Any:
    """JSON, or the ValueError which says why it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: absurdly deep lists
        return ValueError(f"not valid JSON: {error}")


def _forms(record: Any) -> list[str]:
    """The forms that a record can be read as, the first being the one to take."""
    if isinstance(record, ValueError):
        raise record
    found = [name for name, keys in FORMS.items() if isinstance(record, dict) and all(key in record for key in keys)]
    if not found:
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"found {keys}; expected one of: {'; '.join(' + '.join(k) for k in FORMS.values())}")
    return found


def _example(where: str, record: dict[str, Any], form: str, has_template: bool) -> Example:
    """Bring a record of any form to an `Example`; ValueError says what is wrong with it."""
    if form in ("messages", "ShareGPT"):
        return Example(where, messages=_messages(record[FORMS[form][0]]))
    fields = [_text(record[key], key) for key in FORMS[form]]
    if form == "text":
        return Example(where, text=fields[0])
    question, answer = fields
    chat = plain = question
    if form == "Alpaca":
        extra = _text(record.get("input") or "", "input")
        chat = f"{question}\n\n{extra}" if extra else question
        context = ", paired with an input that provides further context" if extra else ""
        plain = ALPACA.format(context, question, f"### Input:\n{extra}\n\n" if extra else "")
    if has_template:
        turns: list[Message] = [{"role": "user", "content": chat}, {"role": "assistant", "content": answer}]
        return Example(where, messages=turns)
    return Example(where, prompt=plain, text=plain + answer)


def _messages(turns: Any) -> list[Message]:
    if isinstance(turns, str):  # a CSV cell
        turns = _parse(turns)
        if isinstance(turns, ValueError):
            raise turns
    if not isinstance(turns, list) or not turns:
        raise ValueError("expected a list of turns, with at least one")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a turn is {type(turn).__name__}, expected role and content")
        role = turn.get("role", turn.get("from"))
        role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise ValueError(f"role {role!r}; expected one of {', '.join(ROLES)}")
        content = _text(turn.get("content", turn.get("value")), f"content of a {role} turn")
        # Parquet gives every turn every key; None stands for one that is not there
        rest = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value") and v is not None}
        messages.append({"role": role, "content": content, **rest})
    return messages


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half a character (a lone \\ud800 to \\udfff escape)") from None
    return value
