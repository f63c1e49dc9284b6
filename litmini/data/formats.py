"""Files -> examples. A file's form is found by looking at its records.

Forms: `messages`, ShareGPT `conversations`, Alpaca `instruction`/`output`, `prompt`/`completion`, or plain `text`; as
JSONL, JSON, CSV or Parquet.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from litmini.data.readers import Chunk, check_text, parse_json, read_chunks
from litmini.errors import UserError
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
        inside = [n - first for n in wanted if first <= n < first + len(chunk.locations)]
        first += len(chunk.locations)
        if form is None or inside:
            examples: list[Example] = []
            form = parse_chunk(chunk, form, has_template, examples, problems)
            if problems:
                raise bad_records(problems)
            found += [examples[n] for n in sorted(inside)]
    return found


def find_locations(path: str, wanted: Collection[int]) -> dict[int, str]:
    """Where the records with the numbers `wanted` (from 0) are: file:line. The file is read up to the last of them."""
    found: dict[int, str] = {}
    first, last = 0, max(wanted)
    for chunk in read_chunks(path):
        found |= {n: chunk.locations[n - first] for n in wanted if first <= n < first + len(chunk.locations)}
        first += len(chunk.locations)
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
    for where, record in chunk.records():
        try:
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
    fields = [check_text(record[key], key) for key in FORMS[form]]
    if form == "text":
        return Example(where, text=fields[0])
    question, answer = fields
    chat = plain = question
    if form == "Alpaca":
        extra = check_text(record.get("input") or "", "input")
        chat = f"{question}\n\n{extra}" if extra else question
        context = ", paired with an input that provides further context" if extra else ""
        plain = ALPACA.format(context, question, f"### Input:\n{extra}\n\n" if extra else "")
    if has_template:
        turns: list[Message] = [{"role": "user", "content": chat}, {"role": "assistant", "content": answer}]
        return Example(where, messages=turns)
    return Example(where, prompt=plain, text=plain + answer)


def _messages(turns: Any) -> list[Message]:
    if isinstance(turns, str):  # a CSV cell
        turns = parse_json(turns)
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
        content = check_text(turn.get("content", turn.get("value")), f"content of a {role} turn")
        # Parquet gives every turn every key; None stands for one that is not there
        rest = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value") and v is not None}
        messages.append({"role": role, "content": content, **rest})
    return messages
