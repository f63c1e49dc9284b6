"""The items of a list in a JSON file, one after the other, as `json` reads them.

No library does that: with `ijson`, a lone surrogate becomes "?", NaN and integers of more than 64 bits are refused, and
errors name no line.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

PIECE = 1 << 20  # characters that are read at once
SPACE = re.compile(r"[ \t\n\r]*")
NO_LIST = "expected a JSON list of records"
decode = json.JSONDecoder().raw_decode


def read_items(file: TextIO) -> Iterator[Any]:
    """Yield the items of the JSON list that a file holds; no more than one of them, or `PIECE` characters, is in memory.

    Raises:
        ValueError: the file holds something else, or no JSON: then it says at which line and column.
    """
    text, at, mark, is_whole = "", 0, "", False
    line = column = 0  # of text[0]
    while True:
        try:
            items, at, mark = _next_item(text, at, mark)
        except json.JSONDecodeError as error:  # at the end of the file, it is one; before, the rest may be missing
            if is_whole:
                if mark == "]" and error.pos == len(text):
                    return
                if error.msg == NO_LIST:
                    raise ValueError(NO_LIST) from None
                column = error.colno + (column if error.lineno == 1 else 0)
                raise ValueError(f"not valid JSON: {error.msg}: line {line + error.lineno} column {column}") from None
            line += text.count("\n", 0, at)
            column = at - 1 - text.rfind("\n", 0, at) + (0 if "\n" in text[:at] else column)
            piece = file.read(max(PIECE, len(text) - at))  # the longer an item, the fewer times it is parsed again
            text, at, is_whole = text[at:] + piece, 0, not piece
            continue
        yield from items


def _next_item(text: str, at: int, mark: str) -> tuple[list[Any], int, str]:
    """Parse the next item of a list and the mark after it.

    Args:
        at: where to begin in `text`: after `mark`.
        mark: the one before: "[" or ",", or "]" at the end, or "" before the list.

    Returns:
        The item (none in an empty list), where the mark after it ends, and the mark.

    Raises:
        json.JSONDecodeError: `text` does not hold both.
    """
    at = _skip_space(text, at)
    if mark == "]":
        raise json.JSONDecodeError("Extra data", text, at)
    if not mark and text[at : at + 1] == "[":
        at = _skip_space(text, at + 1)
        if text[at : at + 1] == "]":
            return [], at + 1, "]"
        mark = "["
    value, end = decode(text, at)
    end = _skip_space(text, end)
    if not mark:
        raise json.JSONDecodeError(NO_LIST if end == len(text) else "Extra data", text, end)
    if text[end : end + 1] not in ("]", ","):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    return [value], end + 1, text[end]


def _skip_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    assert found is not None
    return found.end()
