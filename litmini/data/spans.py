"""Examples -> text, and which of its characters are supervised: found by rendering each conversation up to each answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from litmini.chat_template import BadTemplate, Parts
from litmini.data.formats import Example
from litmini.errors import UserError
from litmini.tokenizer import Message, Tokenizer

Spans = list[tuple[int, int]]
Rendered = tuple[int, str, Spans]
"""Number of an example, its text, and the supervised characters of it."""
FIRST = (
    "the conversation begins with the assistant, and the chat template has no prompt before its first turn. Begin with a "
    "user's turn, or train on all tokens (--data.train_on all)"
)


def render_examples(
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
