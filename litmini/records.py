"""Files -> examples. A file's form is found by looking at its records.

Forms: `messages`, ShareGPT `conversations`, Alpaca `instruction`/`output`, `prompt`/`completion`, or plain `text`; as
JSONL, JSON, CSV or Parquet.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litmini.config import UserError
from litmini.files import existing_file
from litmini.tokenizer import Message

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


def read_examples(path: str, has_template: bool) -> list[Example]:
    """All records of a file.

    Args:
        has_template: Alpaca and prompt/completion become messages; without one, plain text.

    Raises:
        UserError: the file is missing, empty, of unknown form, mixes forms, or has broken records; all named by file:line.
    """
    file = existing_file(path, "data file")
    examples, problems = [], []
    form = None
    for where, record in _records(file):
        try:
            found = _forms(record)
            form = form or found[0]
            if form not in found:
                raise ValueError(f"is {found[0]}, but the records before it are {form}; one form in a file")
            examples.append(_example(where, record, form, has_template))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise bad_records(problems)
    if not examples:
        raise UserError(f"{file} holds no examples.")
    return examples


def bad_records(problems: list[str]) -> UserError:
    """One error for all problems; the first ten are listed."""
    more = [f"... and {len(problems) - 10} more"] * (len(problems) > 10)
    return UserError("bad records:\n  " + "\n  ".join(problems[:10] + more))


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, record) for each record; the record is a ValueError where it cannot be read."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        yield from _parquet(file)
        return
    if kind not in (".jsonl", ".json", ".csv"):
        raise UserError(f"{file}: expected .jsonl, .json, .csv or .parquet")
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line} is not UTF-8 text: {error.reason}. Convert the file to UTF-8.") from None
    if kind == ".jsonl":
        for number, line_text in enumerate(text.split("\n"), 1):
            if line_text.strip():
                yield f"{file}:{number}", _parse(line_text)
    elif kind == ".json":
        records = _parse(text)
        if isinstance(records, ValueError):
            raise UserError(f"{file}: {records}; one record a line belongs in a .jsonl file")
        if not isinstance(records, list):
            raise UserError(f"{file}: expected a JSON list of records; one record a line belongs in a .jsonl file")
        for number, record in enumerate(records, 1):
            yield f"{file}:record {number}", record
    else:
        csv.field_size_limit(sys.maxsize)  # a text may be longer than csv's 128 KiB
        rows = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for record in rows:
                short = None in record or None in record.values()
                error_or_record = ValueError("has more or fewer fields than the header") if short else record
                yield f"{file}:{rows.line_num}", error_or_record
        except csv.Error as error:
            raise UserError(f"{file}:{rows.line_num}: not valid CSV: {error}") from None


def _parse(text: str) -> Any:
    """JSON, or the ValueError which says why it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: absurdly deep lists
        return ValueError(f"not valid JSON: {error}")


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError('Parquet files need pyarrow: pip install "litmini[parquet]"') from None
    try:
        records = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is not valid Parquet: {error}") from None
    for number, record in enumerate(records, 1):
        yield f"{file}:row {number}", record


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
