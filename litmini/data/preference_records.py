"""Records of preferences: a prompt with a chosen and a rejected completion, or with one completion and its label."""

from dataclasses import dataclass, field, replace
from typing import Any

from litmini.data.formats import Example, bad_records, read_messages, turns_before
from litmini.data.readers import check_text, parse_json, read_chunks
from litmini.templates.tool_calls import read_objects
from litmini.tokenizer import Message

PAIR, UNPAIRED = ("chosen", "rejected"), ("prompt", "completion", "label")
EXPECTED_PAIR, EXPECTED_SINGLE = "prompt, chosen and rejected", "prompt, completion and label"
LABELS = {"true": True, "false": False, "1": True, "0": False}
"""How a label may be written."""
Turns = list[Message] | str
"""Messages; without a chat template, text."""


@dataclass(frozen=True)
class Preference:
    """One record."""

    where: str
    """file:line, for errors."""
    number: int
    """Of its record in the file, from 0."""
    prompt: Turns
    completions: list[Turns]
    """Chosen and rejected, or one that is unpaired."""
    desirable: bool = True
    """Label of the one that is unpaired."""
    margin: float = 0.0
    """By how much the chosen completion should be better: a column of the data."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """JSON schemas of the functions that the model may call."""

    def example(self, completion: Turns) -> Example:
        """Return the prompt with `completion`, whose assistant turns alone are supervised."""
        if isinstance(self.prompt, str):
            assert isinstance(completion, str), completion
            return Example(self.where, prompt=self.prompt, text=self.prompt + completion)
        assert not isinstance(completion, str), completion
        untrained = frozenset(i for i, turn in enumerate(self.prompt) if turn["role"] == "assistant")
        return Example(self.where, self.prompt + completion, self.tools, untrained)

    @property
    def has_empty(self) -> bool:
        """Whether a completion says nothing."""
        return any(not _said(completion) for completion in self.completions)


def _said(completion: Turns) -> bool:
    if isinstance(completion, str):
        return bool(completion.strip())
    return any(turn.get("tool_calls") or turn.get("content", "").strip() for turn in completion)


def read_preferences(
    path: str, has_template: bool, pairs: bool | None = None, columns: dict[str, str] | None = None
) -> list[Preference]:
    """Return the records of a file.

    Args:
        has_template: prompts and completions that are text become turns of a conversation; without a chat template, they
            stay text.
        pairs: whether they must be pairs; False: single completions, which pairs are made into; None: either.
        columns: name of a key here -> its name in the file.

    Raises:
        UserError: the file is missing or empty, or has broken records; all named by file:line.
    """
    found: list[Preference] = []
    problems: list[str] = []
    records = (record for chunk in read_chunks(path, columns) for record in chunk.records())
    for number, (where, record) in enumerate(records):
        try:
            if isinstance(record, ValueError):
                raise record
            for one in _records(where, record, has_template, pairs, path.lower().endswith(".csv")):
                found.append(replace(one, number=number))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise bad_records(problems)
    return found


def _records(where: str, record: Any, has_template: bool, pairs: bool | None, is_csv: bool) -> list[Preference]:
    """Return a record as one `Preference` or, of a pair that is made into single completions, two."""
    keys = record.keys() if isinstance(record, dict) else set()
    is_pair, is_single = keys >= set(PAIR), keys >= set(UNPAIRED)
    if not is_pair and not is_single:
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        more = ". Conversations to imitate are for scripts/finetune_lora.py and its like"
        expected = EXPECTED_PAIR if pairs else f"{EXPECTED_PAIR}, or {EXPECTED_SINGLE}"
        raise ValueError(
            f"found {found}; expected {expected}{more * bool(keys & {'messages', 'conversations', 'output'})}"
        )
    if pairs and not is_pair:
        raise ValueError(
            "found one completion with a label, expected chosen and rejected: single completions are for "
            "scripts/finetune_preference.py --preference.loss kto"
        )
    names = PAIR if is_pair else ("completion",)
    given = {name: _turns(record[name], name, is_csv) for name in names}
    prompt = _turns(record["prompt"], "prompt", is_csv) if record.get("prompt") is not None else None
    if prompt is None and not is_pair:
        raise ValueError("prompt is null, expected text or a list of messages")
    before = turns_before(record, "prompt/completion")
    tools = read_objects(record.get("tools"), "tools")
    if has_template or not isinstance(prompt, str):
        prompt, completions = _as_messages(prompt, given, before)
    elif before or tools:
        raise ValueError("has tools, system or history, for which plain text has no place; expected a chat template")
    else:
        completions = [check_text(text, name) for name, text in given.items()]
    if is_pair and pairs is False:
        return [
            Preference(where, 0, prompt, [completion], desirable=desirable, tools=tools)
            for completion, desirable in zip(completions, (True, False), strict=True)
        ]
    label = True if is_pair else _label(record["label"])
    return [Preference(where, 0, prompt, completions, label, _margin(record.get("margin")), tools)]


def _turns(value: Any, name: str, is_csv: bool) -> Turns:
    """Return a prompt or a completion: a text, or messages, which in a cell of CSV are JSON."""
    if is_csv and isinstance(value, str) and value.lstrip().startswith("["):
        read = parse_json(value)
        value = read if isinstance(read, list) and read and all(isinstance(turn, dict) for turn in read) else value
    if isinstance(value, list) and value:
        try:
            return read_messages(value)[0]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__ if value else 'empty'}, expected text or a list of messages")
    return check_text(value or "", name)


def _as_messages(
    prompt: Turns | None, given: dict[str, Turns], before: list[Message]
) -> tuple[list[Message], list[Turns]]:
    """Return the messages of the prompt and those of each completion.

    Conversations that hold the prompt as well are divided: after the prompt, or where they begin to differ.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt is None:
        if texts := [name for name, turns in given.items() if isinstance(turns, str)]:
            raise ValueError(
                f"has no prompt, and {texts[0]} is text: give prompt, or chosen and rejected as lists of messages that begin "
                f"alike"
            )
        prompt = _common_turns(*given.values())  # type: ignore[arg-type]
    completions: list[Turns] = []
    for name, turns in given.items():
        if isinstance(turns, str):
            turns = [{"role": "assistant", "content": turns}]
        elif turns[: len(prompt)] == prompt:
            turns = turns[len(prompt) :]
        if not turns or turns[0]["role"] != "assistant":
            raise ValueError(
                f"{name} begins with a {turns[0]['role'] if turns else 'missing'} turn and not with the prompt: expected the "
                f"assistant's turns alone, or the prompt and then these"
            )
        completions.append(turns)
    if before and prompt[0]["role"] == "system":
        raise ValueError("has a system key and a system turn; expected one of them")
    return before + prompt, completions


def _common_turns(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """Return the turns with which two conversations begin alike, up to an assistant's turn of each."""
    alike = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    size = min(len(chosen), len(rejected)) if alike is None else alike
    while size and not all(len(turns) > size and turns[size]["role"] == "assistant" for turns in (chosen, rejected)):
        size -= 1
    if not size:
        raise ValueError(
            "has no prompt, and chosen and rejected do not begin with the same turns: expected both to begin with the prompt"
        )
    return chosen[:size]


def _label(value: Any) -> bool:
    known = LABELS.get(str(value).strip().lower()) if isinstance(value, str | bool | int) else None
    if known is None:
        raise ValueError(f"label is {value!r:.80}, expected true (desirable) or false")
    return known


def _margin(value: Any) -> float:
    try:
        margin = float(value) if value not in (None, "") else 0.0
    except (TypeError, ValueError):
        margin = float("nan")
    if not abs(margin) < 1e9:
        raise ValueError(f"margin is {value!r:.80}, expected a number")
    return margin
