"""Special tokens in what people write: marked before a template renders it, and encoded as text in what it renders."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tokenizers import Tokenizer as FastTokenizer

START, END = "\ufdd0", "\ufdd1"
"""They stand around a special token that is text. Unicode has them for use within a program: no text holds them."""
SAID = {"<think>", "</think>", "<tool_call>", "</tool_call>"}
"""What assistants write, which some tokenizers call special."""


class Encoded(NamedTuple):
    """Tokens of a text with marks; `offsets` are characters of it."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class LiteralTokens:
    """Marks special tokens in texts, and encodes texts with marks.

    Args:
        fast: the tokenizer; it is not changed.
        special_ids: of the tokens that are text where people write them.
    """

    def __init__(self, fast: FastTokenizer, special_ids: Iterable[int]) -> None:
        self.fast, self.special_ids = fast, set(special_ids)
        texts = {str(fast.id_to_token(i)) for i in self.special_ids} - SAID
        longest_first = sorted((text for text in texts if text.strip()), key=len, reverse=True)
        either = "|".join(map(re.escape, longest_first)) or "(?!)"
        self.token, self.marked = re.compile(either), re.compile(f"{START}({either}){END}")
        self.as_text = FastTokenizer.from_str(fast.to_str())
        self.as_text.encode_special_tokens = True

    def mark(self, value: Any) -> Any:
        """Return a text, or a value of JSON with all texts in it but keys and roles, with marks around special tokens."""
        if isinstance(value, str):
            return self.token.sub(rf"{START}\g<0>{END}", value)
        if isinstance(value, dict):
            return {key: one if key == "role" else self.mark(one) for key, one in value.items()}
        return [self.mark(one) for one in value] if isinstance(value, list) else value

    def encode(self, text: str) -> Encoded:
        """Return the tokens of a text with marks: what is between two special tokens of the template is encoded as text."""
        hidden = self.marked.sub(lambda found: "\ufdd2" * len(found[0]), text)
        encoding = self.fast.encode(hidden, add_special_tokens=False)
        specials = [
            (i, a, b) for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if i in self.special_ids
        ]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        first = 0
        for special, a, b in [*specials, (None, len(text), len(text))]:
            inner = self._encode_text(text[first:a], lambda n, first=first: n + first)  # type: ignore[misc]
            ids += inner.ids
            offsets += inner.offsets
            if special is not None:
                ids.append(special)
                offsets.append((a, b))
            first = b
        return Encoded(ids, offsets)

    def _encode_text(self, text: str, place: Callable[[int], int]) -> Encoded:
        marks = {n for found in self.marked.finditer(text) for n in (found.start(), found.end() - 1)}
        kept = [n for n in range(len(text)) if n not in marks]
        encoding = self.as_text.encode("".join(text[n] for n in kept), add_special_tokens=False)
        places = [place(n) for n in [*kept, len(text)]]
        offsets = [(places[a], places[b - 1] + 1 if b > a else places[a]) for a, b in encoding.offsets]
        return Encoded(encoding.ids, offsets)
