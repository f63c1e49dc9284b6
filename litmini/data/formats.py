"""Records of data files -> examples. The keys of a file's first record decide its form.

Forms: `messages`, ShareGPT `conversations`, Alpaca `instruction`/`output`, `prompt`/`completion`, or plain `text`; as
JSONL, JSON, CSV or Parquet.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from litmini.data.readers import Chunk, check_text, parse_json, read_chunks
from litmini.errors import UserError, by_cause
from litmini.tokenizer import ROLES, Message
from litmini.tool_calls import read_calls, read_objects

FORMS = {
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "tool": "tool"}
SYSTEM = ("system", "system_prompt")
TRAIN = ("weight", "train", "training", "loss")
"""Keys with which data say whether a turn is trained."""
TURN_KEYS = {"role", "from", "content", "value", *TRAIN}
UNUSED = {
    "functions": "give them as tools",
    "documents": "put their texts into a turn",
    "chat_template_kwargs": "give them as --data.template_kwargs",
    **dict.fromkeys(("images", "image", "videos", "audios", "audio"), "only text is trained"),
}
"""Keys of a conversation that change what it means -> what to do instead."""
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """One record: `messages`, or `text`, of which what follows `prompt` is supervised."""

    where: str
    """file:line, for errors."""
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    """JSON schemas of the functions that the model may call."""
    untrained: frozenset[int] = frozenset()
    """Numbers of the assistant turns that are context only."""
    prompt: str = ""
    text: str = ""


def read_examples(path: str, has_template: bool) -> list[Example]:
    """Return all records of a file.

    Args:
        has_template: Alpaca and prompt/completion become messages; without a chat template, plain text.

    Raises:
        UserError: the file is missing, empty, of unknown form, mixes forms, or has broken records; all named by file:line.
    """
    examples: list[Example] = []
    problems: list[str] = []
    form = None
    for chunk in read_chunks(path):
        form = parse_chunk(chunk, form, has_template, examples, problems)
    if problems:
        raise bad_records(problems, len(examples) + len(problems))
    return examples


def pick_examples(path: str, has_template: bool, wanted: Collection[int]) -> list[Example]:
    """Return the records with the numbers `wanted` (from 0), in the order of the file.

    Raises:
        UserError: as `read_examples`.
    """
    picked: list[Example] = []
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
            picked += [examples[n] for n in sorted(inside)]
    return picked


def find_locations(path: str, wanted: Collection[int]) -> dict[int, str]:
    """Return file:line of the records with the numbers `wanted` (from 0). The file is read up to the last of them."""
    locations = (where for chunk in read_chunks(path) for where in chunk.locations)
    return {n: where for n, where in zip(range(max(wanted) + 1), locations, strict=False) if n in wanted}


def parse_chunk(
    chunk: Chunk, form: str | None, has_template: bool, examples: list[Example], problems: list[str]
) -> str | None:
    """Add the examples in a chunk to `examples`, and the faults of others to `problems`; return the file's form.

    Args:
        form: of the records before; None: that of the first decides.
    """
    for where, record in chunk.records():
        try:
            forms = _find_forms(record)
            form = form or forms[0]
            if form not in forms:
                raise ValueError(f"is {forms[0]}, but the records before it are {form}; one form in a file")
            examples.append(_example(where, record, form, has_template))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return form


def bad_records(problems: list[str], total: int | None = None) -> UserError:
    """Return one error for all problems, with a line for each cause; `total` is the number of all records."""
    return UserError(f"bad records:\n  {by_cause(problems, total)}")


def _find_forms(record: Any) -> list[str]:
    """Return the forms that a record can be read as, the preferred one first."""
    if isinstance(record, ValueError):
        raise record
    forms = [name for name, keys in FORMS.items() if isinstance(record, dict) and all(key in record for key in keys)]
    if not forms:
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"found {keys}; expected one of: {'; '.join(' + '.join(k) for k in FORMS.values())}")
    return forms


def _example(where: str, record: dict[str, Any], form: str, has_template: bool) -> Example:
    """Return a record of any form as an `Example`; a ValueError says what is wrong with it."""
    if form == "text":
        return Example(where, text=check_text(record["text"], "text"))
    if unused := [key for key in UNUSED if record.get(key)]:
        raise ValueError(f"has {unused[0]}, which is not read: {UNUSED[unused[0]]}")
    tools, before = read_objects(record.get("tools"), "tools"), _turns_before(record, form)
    if form in ("messages", "ShareGPT"):
        messages, untrained = _messages(record[FORMS[form][0]])
        if before and messages[0]["role"] == "system":
            raise ValueError("has a system key and a system turn; expected one of them")
        return Example(where, before + messages, tools, frozenset(i + len(before) for i in untrained))
    fields = [check_text(record[key], key) for key in FORMS[form]]
    prompt, completion = fields
    chat = plain = prompt
    if form == "Alpaca":
        extra = check_text(record.get("input") or "", "input")
        chat = f"{prompt}\n\n{extra}" if extra else prompt
        context = ", paired with an input that provides further context" if extra else ""
        plain = ALPACA.format(context, prompt, f"### Input:\n{extra}\n\n" if extra else "")
    if has_template:
        turns: list[Message] = [{"role": "user", "content": chat}, {"role": "assistant", "content": completion}]
        return Example(where, before + turns, tools)
    if before or tools:
        raise ValueError("has tools, system or history, for which plain text has no place; expected a chat template")
    return Example(where, prompt=plain, text=plain + completion)


def _turns_before(record: dict[str, Any], form: str) -> list[Message]:
    """Return the turns of the keys `system` and `history`, of pairs of a prompt and a completion."""
    found = [check_text(record[key], key) for key in SYSTEM if record.get(key)]
    if len(found) > 1:
        raise ValueError(f"has {' and '.join(SYSTEM)}; expected one of them")
    turns: list[Message] = [{"role": "system", "content": text} for text in found]
    history = record.get("history") or []
    history = parse_json(history) if isinstance(history, str) else history
    if history and form in ("messages", "ShareGPT"):
        raise ValueError("has history, which goes with instruction or prompt; expected all turns in one list")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("history is no list of pairs of a prompt and a completion")
    for pair in history:
        roles = zip(("user", "assistant"), pair, strict=True)
        turns += [{"role": role, "content": check_text(text, "a text in history")} for role, text in roles]
    return turns


def _messages(turns: Any) -> tuple[list[Message], list[int]]:
    """Return messages, and the numbers of assistant turns that are not to be trained."""
    if isinstance(turns, str):  # a CSV cell
        turns = parse_json(turns)
        if isinstance(turns, ValueError):
            raise turns
    if not isinstance(turns, list) or not turns:
        raise ValueError("expected a list of turns, with at least one")
    messages: list[Message] = []
    untrained = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a turn is {type(turn).__name__}, expected role and content")
        role = turn.get("role", turn.get("from"))
        role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise ValueError(f"role {role!r}; expected one of {', '.join(ROLES)}")
        if turn.get("function_call"):
            raise ValueError("a turn has function_call, which is not read; expected tool_calls")
        if not _is_trained(turn, role):
            untrained.append(len(messages))
        rest = {k: v for k, v in turn.items() if k not in TURN_KEYS and v is not None}
        calls = rest["tool_calls"] = read_calls(rest.get("tool_calls"))
        if not calls:
            del rest["tool_calls"]
        elif role != "assistant":
            raise ValueError(f"a {role} turn has tool_calls; expected them in assistant turns")
        content = turn.get("content", turn.get("value"))
        if content is not None or not calls:
            rest = {"content": check_text(content, f"content of a {role} turn"), **rest}
        messages.append({"role": role, **rest})
    return messages, untrained


def _is_trained(turn: dict[str, Any], role: str) -> bool:
    """Return whether a turn is trained, which the keys of `TRAIN` say of it."""
    given = {key: turn[key] for key in TRAIN if turn.get(key) is not None}
    wrong = [key for key, value in given.items() if value not in (0, 1)]
    if wrong or len(set(given.values())) > 1:
        raise ValueError(f"a {role} turn has {given}; expected 0 or 1, or false or true, and the same in all of them")
    if role != "assistant" and any(given.values()):
        raise ValueError(f"a {role} turn has {given}; only assistant turns are trained: leave it out, or set it to 0")
    return all(given.values())
