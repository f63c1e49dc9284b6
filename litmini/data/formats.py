"""Records of data files -> examples. The keys of a file's first record decide its form.

Forms: `messages`, ShareGPT `conversations`, Alpaca `instruction`/`output`, `prompt`/`completion`, or plain `text`; as
JSONL, JSON, CSV or Parquet.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from litmini.data.messages import UNUSED, read_messages
from litmini.data.readers import Chunk, check_text, parse_json, read_chunks
from litmini.errors import UserError, by_cause
from litmini.templates.render import REASONING
from litmini.templates.tool_calls import read_objects
from litmini.tokenizer import Message

FORMS = {
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
SYSTEM = ("system", "system_prompt")
PREFERENCES = "Preferences are for scripts/finetune_preference.py"
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


def last_only(example: Example) -> Example:
    """Return an example of whose assistant turns only the last one is supervised, if it is at all."""
    turns = [i for i, message in enumerate(example.messages or ()) if message["role"] == "assistant"]
    return replace(example, untrained=example.untrained | frozenset(turns[:-1]))


def read_examples(path: str, has_template: bool, columns: dict[str, str] | None = None) -> list[Example]:
    """Return all records of a file.

    Args:
        has_template: Alpaca and prompt/completion become messages; without a chat template, plain text.
        columns: key that litmini reads -> the column of the file that has it.

    Raises:
        UserError: the file is missing, empty, of unknown form, mixes forms, or has broken records; all named by file:line.
    """
    examples: list[Example] = []
    problems: list[str] = []
    form = None
    for chunk in read_chunks(path, columns):
        form = parse_chunk(chunk, form, has_template, examples, problems)
    if problems:
        raise bad_records(problems, len(examples) + len(problems))
    return examples


def pick_examples(
    path: str, has_template: bool, wanted: Collection[int], columns: dict[str, str] | None = None
) -> list[Example]:
    """Return the records with the numbers `wanted` (from 0), in the order of the file.

    Raises:
        UserError: as `read_examples`.
    """
    picked: list[Example] = []
    problems: list[str] = []
    first, form = 0, None
    for chunk in read_chunks(path, columns):
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
            forms = _find_forms(record, chunk.columns)
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


def _find_forms(record: Any, columns: Collection[str]) -> list[str]:
    """Return the forms that a record can be read as, the preferred one first: those with keys that were renamed."""
    if isinstance(record, ValueError):
        raise record
    forms = [name for name, keys in FORMS.items() if isinstance(record, dict) and all(key in record for key in keys)]
    if not forms:
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        pairs = f". {PREFERENCES}" if isinstance(record, dict) and record.keys() >= {"chosen", "rejected"} else ""
        raise ValueError(f"found {keys}; expected one of: {'; '.join(' + '.join(k) for k in FORMS.values())}{pairs}")
    return sorted(forms, key=lambda name: set(columns).isdisjoint(FORMS[name]))


def _example(where: str, record: dict[str, Any], form: str, has_template: bool) -> Example:
    """Return a record of any form as an `Example`; a ValueError says what is wrong with it."""
    if form == "text":
        return Example(where, text=check_text(record["text"], "text"))
    if form == "prompt/completion" and str(record.get("label")).lower() in ("true", "false"):
        raise ValueError(f"has a label, and an undesirable completion would be imitated. {PREFERENCES}")
    if unused := [key for key in UNUSED if record.get(key)]:
        raise ValueError(f"has {unused[0]}, which is not read: {UNUSED[unused[0]]}")
    if weighed := [key for key in ("weight", "train") if record.get(key) not in (None, 1, "", "1")]:
        raise ValueError(
            f"has {weighed[0]}, which is read in turns only: give it to a turn, or a file a --data.weights"
        )
    tools, before = read_objects(record.get("tools"), "tools"), turns_before(record, form)
    if form == "ShareGPT":  # which has functions as they are
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    are_turns = form == "prompt/completion" and any(isinstance(record[key], list) for key in FORMS[form])
    if form in ("messages", "ShareGPT") or are_turns:
        messages, untrained = read_messages(
            _as_turns(record[FORMS[form][0]], "user") if are_turns else record[FORMS[form][0]]
        )
        if are_turns:  # those of the prompt are context
            untrained = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
            completed, skipped = read_messages(_as_turns(record["completion"], "assistant"))
            untrained += [i + len(messages) for i in skipped]
            messages += completed
        if before and messages[0]["role"] == "system":
            raise ValueError("has a system key and a system turn; expected one of them")
        return Example(where, before + messages, tools, frozenset(i + len(before) for i in untrained))
    fields = [check_text(record[key], key) for key in FORMS[form]]
    prompt, completion = fields
    thoughts = [check_text(record[key], key) for key in REASONING if record.get(key)]
    thought = {"reasoning_content": thoughts[0]} if thoughts else {}
    chat = plain = prompt
    if form == "Alpaca":
        extra = check_text(record.get("input") or "", "input")
        chat = f"{prompt}\n\n{extra}" if extra else prompt
        context = ", paired with an input that provides further context" if extra else ""
        plain = ALPACA.format(context, prompt, f"### Input:\n{extra}\n\n" if extra else "")
    if has_template:
        turns: list[Message] = [
            {"role": "user", "content": chat},
            {"role": "assistant", "content": completion, **thought},
        ]
        return Example(where, before + turns, tools)
    if before or tools or thought:
        what = "tools, system, history or reasoning"
        raise ValueError(f"has {what}, for which plain text has no place; expected a chat template")
    return Example(where, prompt=plain, text=plain + completion)


def _as_turns(value: Any, role: str) -> Any:
    """Return a text as a list of one turn; a list stays."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def turns_before(record: dict[str, Any], form: str) -> list[Message]:
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
