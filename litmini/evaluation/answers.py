"""Files of answers: which answers of two models belong to the same prompt, and what people say of them."""

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from litmini.data.formats import bad_records
from litmini.data.readers import check_text, read_chunks
from litmini.errors import UserError, counted
from litmini.generation.prompts import check_messages
from litmini.tokenizer import Message

KEYS = ("answer", "completion", "response", "output")
"""Keys that may hold an answer."""
WINNERS = {"a": "a", "b": "b", "tie": "tie", "draw": "tie", "c": "tie"}
"""How people may write who wins."""


@dataclass(frozen=True)
class Pair:
    """The answers of both models to one prompt."""

    number: int
    prompt: str | list[Message]
    a: str
    b: str

    @property
    def question(self) -> str:
        """The prompt as people read it: a user's turn alone, or all turns with their roles."""
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) == 1:
            return str(self.prompt[0]["content"])
        return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in self.prompt)


def read_pairs(a: str, b: str, limit: int | None = None) -> tuple[list[Pair], int]:
    """Return the pairs of two files of answers, in the order of the first, and the number of answers without a partner.

    Answers to the same prompt are paired in their order.

    Raises:
        UserError: a file is missing or has broken lines, or no prompt is in both.
    """
    first, second = _read_answers(a), _read_answers(b)
    others = defaultdict(list)
    for prompt, answer in second:
        others[_key(prompt)].append(answer)
    pairs: list[Pair] = []
    for prompt, answer in first:
        if waiting := others[_key(prompt)]:
            pairs.append(Pair(len(pairs), prompt, answer, waiting.pop(0)))
    if not pairs:
        raise UserError(
            f"{a} and {b} have no prompt in common; expected the answers of two models to the same prompts."
        )
    return pairs[:limit], len(first) + len(second) - 2 * len(pairs)


def _key(prompt: str | list[Message]) -> str:
    """Return what two prompts have in common that are the same; a text is a user's turn."""
    return json.dumps([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, sort_keys=True)


def _records(path: str) -> list[tuple[str, dict[str, Any]]]:
    found, problems = [], []
    for where, record in (one for chunk in read_chunks(path) for one in chunk.records()):
        if isinstance(record, dict):
            found.append((where, record))
        else:
            problems.append(f"{where}: {record if isinstance(record, ValueError) else 'no JSON object'}")
    if problems:
        raise bad_records(problems)
    return found


def _prompt(record: dict[str, Any]) -> str | list[Message]:
    given = record.get("prompt", record.get("messages"))
    return check_text(given, "prompt") if isinstance(given, str) else check_messages(given)


def _read_answers(path: str) -> list[tuple[str | list[Message], str]]:
    """Return prompts and answers of a file, without the lines in which `generate.py` wrote an error."""
    found, problems = [], []
    for where, record in _records(path):
        if "error" in record and not any(key in record for key in KEYS):
            continue
        try:
            key = next((key for key in KEYS if key in record), None)
            if key is None or not ({"prompt", "messages"} & record.keys()):
                raise ValueError(f"found {', '.join(record)}; expected prompt or messages, and answer")
            if not isinstance(record[key], str):
                raise ValueError(f"{key} is no text")
            found.append((_prompt(record), check_text(record[key], key)))
        except (ValueError, UserError) as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise bad_records(problems)
    if not found:
        raise UserError(
            f"{path} has no answers; expected lines as scripts/generate.py --prompts FILE --out {path} writes."
        )
    return found


def read_human(path: str, pairs: list[Pair]) -> dict[int, str]:
    """Return number of a pair -> the winner that people named: a, b or tie. Lines are {"prompt": ..., "winner": "a"}.

    Raises:
        UserError: the file is missing or has broken lines, or none is of these pairs.
    """
    numbers = defaultdict(list)
    for pair in pairs:
        numbers[_key(pair.prompt)].append(pair.number)
    found: dict[int, str] = {}
    problems = []
    for where, record in _records(path):
        try:
            winner = WINNERS.get(str(record.get("winner")).lower())
            if winner is None:
                raise ValueError(f"winner is {record.get('winner')!r:.60}; expected a, b or tie")
            if waiting := numbers[_key(_prompt(record))]:
                found[waiting.pop(0)] = winner
        except (ValueError, UserError) as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise bad_records(problems)
    if not found:
        raise UserError(f"{path} labels none of {counted(len(pairs), 'pair')}: its prompts are others.")
    return found
