"""The items of a JSON list, one after the other: memory does not grow with the list."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

PIECE = 1 << 20  # characters read at once
ENDS = (",", "]", " ", "\t", "\n", "\r")  # what may follow an item
SOLID = re.compile(r"[^ \t\n\r]")


def read_items(file: TextIO) -> Iterator[Any]:
    """The items of the list that a file holds.

    Raises:
        ValueError: the file holds something else, or no JSON: then it says at which line and column.
    """
    pieces = _Pieces(file)
    if pieces.next() != "[":
        pieces.value()
        if pieces.next():
            raise pieces.error("Extra data")
        raise ValueError("expected a JSON list of records")
    pieces.at += 1
    end = pieces.next() == "]"
    pieces.at += end
    while not end:
        yield pieces.value()
        mark = pieces.next()
        if mark not in ("]", ","):
            raise pieces.error("Expecting ',' delimiter")
        pieces.at += 1
        end = mark == "]"
        if not end:
            pieces.next()
    if pieces.next():
        raise pieces.error("Extra data")


class _Pieces:
    """A file of which no more than what is being read is in memory."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at = file, "", 0
        self.lines = self.columns = 0  # before the text
        self.decode = json.JSONDecoder().raw_decode

    def more(self) -> bool:
        """Read on and forget what is before `at`; whether there was more."""
        used = self.text[: self.at]
        self.lines += used.count("\n")
        self.columns = len(used) - used.rfind("\n") - 1 if "\n" in used else self.columns + len(used)
        piece = self.file.read(max(PIECE, len(self.text)))  # a long item is not begun again for each piece
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)

    def next(self) -> str:
        """The next character that is no white space, which is then at `at`; none at the end."""
        while not (found := SOLID.search(self.text, self.at)):
            self.at = len(self.text)
            if not self.more():
                return ""
        self.at = found.start()
        return found[0]

    def value(self) -> Any:
        """The value that begins at `at`."""
        last = False
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                if last or self.text[end : end + 1] in ENDS:  # else it may go on: 1, 1.5
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                if last:
                    raise self.error(error.msg, error.pos) from None
            last = not self.more()

    def error(self, what: str, at: int | None = None) -> ValueError:
        before = self.text[: self.at if at is None else at]
        column = len(before) - before.rfind("\n") if "\n" in before else self.columns + len(before) + 1
        return ValueError(f"not valid JSON: {what}: line {self.lines + before.count(chr(10)) + 1} column {column}")
