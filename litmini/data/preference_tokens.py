"""Records of preferences -> tokens: those of supervised finetuning (`encode.py`), two documents for each record.

Of a pair these are the chosen and the rejected completion, each after the prompt; of a single completion it and a mismatched
one, the same prompt with the completion of another, of which KTO's z is estimated.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from litmini.data import encode
from litmini.data.formats import Example, bad_records
from litmini.data.preference_records import Preference
from litmini.data.readers import CHUNK
from litmini.errors import UserError
from litmini.ops.cross_entropy import IGNORE
from litmini.tokenizer import Tokenizer

ENTRY = np.dtype(
    [
        *encode.ENTRY.descr,
        ("first", np.int32),  # tokens of its first document: the chosen completion's, or the only one's
        ("targets", np.int32),  # supervised tokens of its first document
        ("n_truncated", np.int8),  # how many of its completions are truncated
        ("other", np.int64),  # of single completions: where the mismatched completion is; its size is `other_size`
        ("other_size", np.int32),
        ("desirable", np.bool_),
        ("margin", np.float32),
        ("record", np.int64),  # number among the records as they were read, of which a pair may be two
    ]
)
SPLIT = "the chat template renders the turns of a completion differently when more follows: expected a completion of one turn"
DROPPED = {
    "equal": "chosen and rejected are equal",
    "equal_within_length": "chosen and rejected are equal within data.max_seq_len",
    "empty": "a completion is empty",
    "no_room": "the prompt leaves no room for the completions within data.max_seq_len",
    "too_long": "a conversation is longer than data.max_seq_len",
}
"""Why a record is dropped, by its key in the statistics."""


@dataclass(frozen=True)
class Document:
    """A prompt with a completion, as tokens."""

    inputs: np.ndarray
    """(tokens,) int32."""
    labels: np.ndarray
    """(tokens,) int32: the token to predict after each, of the completion's; IGNORE elsewhere."""
    is_truncated: bool

    @property
    def targets(self) -> int:
        return int(np.count_nonzero(self.labels != IGNORE))


def encode_preferences(
    records: list[Preference], tokenizer: Tokenizer, max_seq_len: int, kind: str
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, list[tuple[str, str]]]:
    """Return inputs and labels of all documents, (tokens,) int32, a table of ENTRY, and reason and place of each record
    that is dropped.

    Raises:
        UserError: records that cannot be tokenised, named by file:line.
    """
    kept: list[Document] = []
    entries: list[tuple[Any, ...]] = []
    dropped: list[tuple[str, str]] = []
    problems: list[str] = []
    others = _mismatched(records) if kind == "single" else []
    start = 0
    for first in range(0, len(records), CHUNK):
        part = records[first : first + CHUNK]
        examples = [record.example(completion) for record in part for completion in record.completions]
        examples += others[first : first + CHUNK]
        documents = encode_documents(examples, tokenizer, max_seq_len, kind == "scored", problems)
        n = len(examples) // len(part)
        for i, record in enumerate(part):
            # single completions and mismatched ones, or chosen and rejected
            both = documents[i :: len(part)] if others else documents[n * i : n * i + n]
            if reason := _why_dropped(record, both):
                dropped.append((reason, record.where))
                continue
            one, two = (document for document in both if document is not None)
            kept += [one, two]
            entries.append(_entry(start, record, first + i, one, two, bool(others)))
            start += len(one.inputs) + len(two.inputs)
    if problems:
        raise bad_records(problems)
    empty = [np.zeros(0, np.int32)]
    arrays = (
        np.concatenate([document.inputs for document in kept] or empty),
        np.concatenate([document.labels for document in kept] or empty),
    )
    return arrays, np.array(entries, ENTRY), dropped


def _entry(
    start: int, record: Preference, number: int, one: Document, two: Document, is_single: bool
) -> tuple[Any, ...]:
    """Return an entry of ENTRY for two documents that begin at `start`; data set and file are 0."""
    first, second = len(one.inputs), len(two.inputs)
    size, other = (first, second) if is_single else (first + second, 0)
    trained = one.targets + (0 if is_single else two.targets)
    n_truncated = int(one.is_truncated) + int(two.is_truncated and not is_single)
    about = (start + size, other, record.desirable, record.margin, number)
    return (0, 0, start, size, trained, record.number, n_truncated > 0, first, one.targets, n_truncated, *about)


def _why_dropped(record: Preference, documents: list[Document | None]) -> str:
    """Return the key in `DROPPED` of a record from which nothing can be learned; "" if something can."""
    if record.has_empty:
        return "empty"
    if len(record.completions) == 2 and record.completions[0] == record.completions[1]:
        return "equal"
    if None in documents:
        return "too_long"
    one, two = (document for document in documents if document is not None)
    if not one.targets or not two.targets:
        return "no_room"
    if (
        len(record.completions) == 2
        and np.array_equal(one.inputs, two.inputs)
        and np.array_equal(one.labels, two.labels)
    ):
        return "equal_within_length"
    return ""


def encode_documents(
    examples: list[Example], tokenizer: Tokenizer, max_seq_len: int, is_scored: bool, problems: list[str]
) -> list[Document | None]:
    """Return the tokens of examples. Faults are added to `problems`; such an example, and one to be scored that is too long,
    is None.

    Args:
        is_scored: the last token alone has a label, and no token is truncated.
    """
    part = encode.Part(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, encode.ENTRY), len(examples))
    found: list[Document | None] = [None] * len(examples)
    seen: set[int] = set()
    for number, ids, mask in encode.encode_texts(examples, tokenizer, "assistant", part):
        if number in seen:
            part.problems.append(f"{examples[number].where}: {SPLIT}")
        seen.add(number)
        if is_scored:
            labels = np.full(len(ids), IGNORE, np.int32)
            labels[-1] = 0
            found[number] = Document(ids, labels, False) if len(ids) <= max_seq_len else None
        else:
            size = int(np.flatnonzero(mask)[-1]) + 1  # what a template puts after the end token teaches nothing
            is_truncated, size = size > max_seq_len + 1, min(size, max_seq_len + 1)  # the last token is only predicted
            ids, mask = ids[:size], mask[:size]
            labels = np.where(mask[1:], ids[1:], np.int32(IGNORE))
            found[number] = Document(ids[:-1], labels, is_truncated)
    problems += dict.fromkeys(part.problems)
    return found


def _mismatched(records: list[Preference]) -> list[Example]:
    """Return the prompt of each record with the completion of another, so many before it, in a ring, that no run of equal
    prompts is as long. They depend on the data alone.

    Raises:
        UserError: all prompts are equal.
    """
    longest = run = 1
    for before, record in itertools.pairwise(records):
        run = run + 1 if record.prompt == before.prompt else 1
        longest = max(longest, run)
    if longest == len(records):
        raise UserError(
            f"{records[0].where.rpartition(':')[0]}: every prompt is the same, and preference.loss kto compares with the "
            f"completions of other prompts; expected two prompts or more."
        )
    return [record.example(records[i - longest].completions[0]) for i, record in enumerate(records)]
