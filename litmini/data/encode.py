"""Examples -> tokens and labels: which tokens are supervised, and where an example is truncated.

The supervised text of a conversation is found by rendering it up to each answer.
"""

import functools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from litmini.chat_template import BadTemplate, Parts
from litmini.config.finetune import DataConfig
from litmini.data.formats import Example
from litmini.errors import UserError
from litmini.ops.cross_entropy import IGNORE
from litmini.tokenizer import Message, Tokenizer

Spans = list[tuple[int, int]]
Rendered = tuple[int, str, Spans]
"""Number of an example, its text, and the supervised characters of it."""
FIRST = (
    "the conversation begins with the assistant, and the chat template has no prompt before its first turn. Begin with a "
    "user's turn, or train on all tokens (--data.train_on all)"
)
CHANGES = (
    "the prompt's last tokens change with what follows, so the model would see another prompt than in training. Strip white "
    "space where prompt and completion meet (one space belongs to the completion), or change the template"
)
ENTRY = np.dtype(
    [
        ("set", np.int16),  # number of its data set
        ("file", np.int32),  # number of the file whose arrays hold its tokens
        ("start", np.int64),  # of its tokens there
        ("size", np.int32),  # tokens
        ("trained", np.int32),  # supervised tokens
        ("number", np.int64),  # of its record in the file, from 0
        ("truncated", np.bool_),
    ]
)


@dataclass
class Part:
    """Tokenised examples, concatenated; `inputs` and `labels` are (tokens,) int32."""

    inputs: np.ndarray
    labels: np.ndarray
    """labels[i] is the token to predict after inputs[i], or IGNORE: shifted here and nowhere else."""
    table: np.ndarray
    """(examples,) of ENTRY; `start` counts from the beginning of this part."""
    records: int
    """Examples that went in."""
    dropped: list[str] = field(default_factory=list)
    """Locations of those without a supervised token."""
    truncated_dropped: int = 0
    """How many of these were truncated."""
    problems: list[str] = field(default_factory=list)
    """Location and fault of those that cannot be tokenised."""


def encode_examples(examples: list[Example], tokenizer: Tokenizer, config: DataConfig) -> Part:
    """Return tokens and labels of examples; those without a supervised token are dropped."""
    dropped: list[str] = []
    problems: list[str] = []
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    entries: list[tuple[int, int, int, int, int, int, bool]] = []
    max_ids = config.max_seq_len + 1  # the last one is only predicted
    start = truncated_dropped = 0
    for number, ids, mask in _encode(examples, tokenizer, config.train_on, problems):
        targets = int(np.count_nonzero(mask[1:max_ids]))
        if not targets:
            dropped.append(examples[number].where)
            truncated_dropped += len(ids) > max_ids
            continue
        size = min(len(ids), max_ids) - 1
        entries.append((0, 0, start, size, targets, number, len(ids) > max_ids))
        kept.append((ids[: size + 1], mask[: size + 1]))
        start += size
    table = np.array(entries, ENTRY)
    flat = np.concatenate([ids for ids, _ in kept] or [np.zeros(0, np.int32)])
    mask = np.concatenate([part for _, part in kept] or [np.zeros(0, bool)])
    ends = np.cumsum(table["size"] + 1)
    labels = np.where(mask, flat, np.int32(IGNORE))
    inputs, labels = np.delete(flat, ends - 1), np.delete(labels, ends - table["size"] - 1)
    return Part(inputs, labels, table, len(examples), dropped, truncated_dropped, problems)


def _encode(
    examples: list[Example], tokenizer: Tokenizer, train_on: str, problems: list[str]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (number, ids, mask) of examples, arrays of int32 and bool; faults of others are added to `problems`."""
    rendered = _render_examples(examples, tokenizer, train_on, problems)
    bos, prompts = tokenizer.encode(""), _prompts(tokenizer)
    whole = tokenizer.encode_batch([text for _, text, _ in rendered])
    for (number, text, spans), encoding in zip(rendered, whole, strict=True):
        is_text = examples[number].messages is None
        ids = np.array(encoding.ids, dtype=np.int32)
        try:
            mask = np.zeros(len(ids), dtype=bool)
            if spans:
                bounds = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
                mask = _supervised_mask(ids, bounds, spans, None if is_text else tokenizer.stop_ids)
                prompts.check(text, ids, bounds[:, 0], spans[-1][0])
        except ValueError as error:
            problems.append(f"{examples[number].where}: {error}")
            continue
        if is_text:  # BOS as the tokenizer adds it, and a supervised end
            ids = np.array([*bos, *ids, tokenizer.stop_ids[0]], dtype=np.int32)
            mask = np.array([*[False] * len(bos), *mask, True])
        yield number, ids, mask | (train_on == "all")


class _Prompts:
    """Checks that a prompt has the same tokens in training as alone, when the model completes it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.is_special = np.zeros(max(tokenizer.fast.get_vocab().values()) + 1, dtype=bool)
        self.is_special[list(tokenizer.special_ids)] = True
        # What follows the last special token is nearly always the same: `<|im_start|>assistant\n`
        self.encode = functools.lru_cache(10_000)(functools.partial(tokenizer.encode, special=False))

    def check(self, text: str, ids: np.ndarray, starts: np.ndarray, end: int) -> None:
        """Raise ValueError where `text[:end]` alone has other tokens than at the beginning of `text`.

        Tokens do not cross a special token, so only what follows the last one is encoded.

        Args:
            ids, starts: of the tokens of `text`; `starts` are in characters.
        """
        specials = np.flatnonzero(self.is_special[ids] & (starts < end))
        first = int(specials[-1]) if len(specials) else 0
        alone = self.encode(text[int(starts[first]) if len(specials) else 0 : end])
        if ids[first : first + len(alone)].tolist() == alone:
            return
        alone = self.encode(text[:end])  # some tokenizers begin a text in another way than what follows a special token
        if ids[: len(alone)].tolist() != alone:
            raise ValueError(CHANGES)


_prompts = functools.lru_cache(4)(_Prompts)


def _supervised_mask(ids: np.ndarray, bounds: np.ndarray, spans: Spans, stop_ids: list[int] | None) -> np.ndarray:
    """Return the mask of tokens within a span, up to its last stop token: the model does not say what follows that.

    Args:
        bounds: (tokens, 2), first character of each token and the one after the last.

    Raises:
        ValueError: a span has no stop token, or begins within a token.
    """
    starts, ends = bounds.T
    mask = np.zeros(len(ids), dtype=bool)
    for start, stop in spans:
        if ((starts < start) & (ends > start)).any():
            raise ValueError(CHANGES)
        inside = np.flatnonzero((starts >= start) & (ends <= stop) & (ends > starts))
        if stop_ids is not None:
            stops = [i for i in (np.flatnonzero(ids[inside] == stop_id) for stop_id in stop_ids) if len(i)]
            if not stops:
                raise ValueError("the chat template puts no stop token after an assistant's turn")
            inside = inside[: max(int(i[-1]) for i in stops) + 1]
        mask[inside] = True
    return mask


def _render_examples(
    examples: list[Example], tokenizer: Tokenizer, train_on: str, problems: list[str]
) -> list[Rendered]:
    """Return texts and spans of examples; the faults of others are added to `problems`.

    Raises:
        BadTemplate: the template exceeds a limit; names the example.
    """
    chats = [(example.messages, _parts(example.messages, train_on)) for example in examples if example.messages]
    end = len(tokenizer.after_answer) if chats else 0
    texts = tokenizer.render(chats) if chats else iter(())
    rendered: list[Rendered] = []
    for number, example in enumerate(examples):
        if example.messages is None:
            spans = [] if train_on == "all" else [(len(example.prompt), len(example.text))]
            rendered.append((number, example.text, spans))
            continue
        own = islice(texts, len(_parts(example.messages, train_on)))
        try:
            rendered.append((number, *_find_spans(example.messages, own, train_on, end)))
        except BadTemplate as error:
            raise BadTemplate(f"{example.where}: {error}") from None
        except (UserError, ValueError) as error:
            problems.append(f"{example.where}: {error}")
        deque(own, 0)  # what an error left
    return rendered


def _parts(messages: list[Message], train_on: str) -> Parts:
    """Return which texts show the spans of a conversation: the whole, and those that end before and after each answer.

    The whole without a turn shows whether the template knows its role: many leave out a role without a word.
    """
    parts: Parts = [(len(messages), False, None)]
    for i, message in enumerate(messages):
        if message["role"] not in ("user", "assistant") and message["content"].strip():
            parts.append((len(messages), False, i))
        elif message["role"] == "assistant" and train_on != "all":
            parts += [(i, True, None), (i + 1, False, None)][: len(messages) - i]  # after the last turn: the whole
    return parts


def _find_spans(
    messages: list[Message], texts: Iterator[str | UserError], train_on: str, end: int
) -> tuple[str, Spans]:
    """Return text and supervised spans of a conversation.

    Args:
        texts: those of `_parts`.
        end: characters that the template puts after the answer that ends a conversation.
    """

    def take() -> str:
        text = next(texts)
        if isinstance(text, UserError):
            raise text
        return text

    text = take()
    spans: Spans = []
    for i, message in enumerate(messages):
        if message["role"] not in ("user", "assistant") and message["content"].strip():
            if next(texts) == text:
                raise ValueError(
                    f"the chat template leaves out turn {i + 1}, of the role {message['role']}. Give it a role that the "
                    f"template knows, or use another template (--data.chat_template FILE)"
                )
        elif message["role"] == "assistant" and train_on != "all":
            try:
                spans.append(_find_span(i, text, take(), take() if i + 1 < len(messages) else text, end))
            except (UserError, ValueError) as error:
                if i or isinstance(error, BadTemplate):
                    raise
                raise ValueError(FIRST) from None
    return text, spans


def _find_span(i: int, text: str, before: str, after: str, end: int) -> tuple[int, int]:
    """Return the span of turn `i` in `text`, from the texts that end before and after it."""
    stop = _common_prefix(text, after)
    last_only = len(after) - stop  # some templates end the last turn in another way, after the completion
    if not text.startswith(before) or stop <= len(before) or last_only >= max(1, end):
        raise ValueError(
            f"the chat template renders turn {i + 1} differently when more follows, so its span cannot be found. "
            f"Use another template (--data.chat_template FILE) or train on all tokens (--data.train_on all)"
        )
    return len(before), stop


def _common_prefix(a: str, b: str) -> int:
    """Return the number of characters that two texts have in common at their beginning."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
