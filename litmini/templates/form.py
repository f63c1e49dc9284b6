"""In which form a chat template wants messages that data have in several, and how it ends turns: found by rendering a few."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from litmini.literal_tokens import SAID
from litmini.templates.tool_calls import convert_arguments

ABSENT = object()
"""No content beside calls; other templates want null, or an empty text."""
Render = Callable[[list[dict[str, Any]]], str | None]
"""Messages -> text; None: the template fails."""


class TemplateForm(NamedTuple):
    """How a template wants messages."""

    arguments: type | None
    """What it writes as JSON where a tool call has it as its arguments: dict, or str; None: both, or neither."""
    empty: Any
    """The content of a turn that has only calls: `ABSENT`, None or ""."""
    has_parts: bool
    """Whether content is a list of parts."""

    def apply(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages in this form; those of which nothing is known stay as they are."""
        found = list(messages)
        if self.empty is not ABSENT:
            found = [
                {**m, "content": self.empty} if m.get("tool_calls") and m.get("content") is None else m for m in found
            ]
        if self.arguments:
            found = convert_arguments(found, self.arguments)
        if self.has_parts:
            found = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
                for m in found
            ]
        return found


def find_form(render: Render, has_calls: bool) -> TemplateForm:
    """Return the form of the template that `render` uses.

    Args:
        has_calls: whether messages have tool calls; without, their form is not looked for.
    """
    user: dict[str, Any] = {"role": "user", "content": "question"}
    parts: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "question"}]}
    has_parts = "question" not in (render([user]) or "") and "question" in (render([parts]) or "")
    if not has_calls:
        return TemplateForm(None, ABSENT, has_parts)
    user = parts if has_parts else user

    def turn(arguments: Any, content: Any) -> list[dict[str, Any]]:
        call = {"id": "call00000", "type": "function", "function": {"name": "call_name", "arguments": arguments}}
        said = {"role": "assistant", "tool_calls": [call]}
        return [user, said if content is ABSENT else {**said, "content": content}]

    def fits(content: Any) -> list[bool]:
        """Whether arguments as dict, and as str, are written as JSON: neither a repr nor JSON of JSON."""
        texts = [render(turn(arguments, content)) or "" for arguments in ({"a": 1}, '{"a": 1}')]
        return [
            "call_name" in text and not any(wrong in text for wrong in ("'a'", '\\"', "None", "null", "Undefined"))
            for text in texts
        ]

    for empty in (ABSENT, None, ""):
        if any(found := fits(empty)):
            return TemplateForm(None if all(found) else dict if found[0] else str, empty, has_parts)
    return TemplateForm(None, "", has_parts)  # it leaves calls out


class TurnEnds(NamedTuple):
    """Special tokens with which a model ends what it says, "" where there is none."""

    turn: str
    """After an assistant's turn."""
    call: str
    """After a turn that calls a tool."""
    next_turn: str
    """Where the template ends no turn: what begins the next one, which the model says to end its own (GLM-4.5)."""
    next_call: str
    """The same after a turn that calls a tool."""


def find_ends(
    after_completion: str,
    text_of: Callable[[list[dict[str, Any]]], str],
    specials: Callable[[str], list[str | None]],
    has_calls: bool,
) -> TurnEnds:
    """Return how a template ends turns.

    Args:
        after_completion: what it puts after an assistant's turn.
        text_of: messages -> text; "" if the template fails.
        specials: text -> for each token its text if it is special, or None.
        has_calls: whether the template knows tool calls.
    """
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}
    user, said = {"role": "user", "content": "question"}, {"role": "assistant", "content": "completion"}
    asks = {"role": "assistant", "tool_calls": [call]}
    result = {"role": "tool", "content": "result", "tool_call_id": "call00000"}

    def between(turns: list[dict[str, Any]], following: dict[str, Any]) -> str:
        """Return the special token with which a turn begins that follows others, or "" if it begins otherwise."""
        before, text = text_of(turns), text_of([*turns, following])
        rest = text[len(before) :] if before and text.startswith(before) else ""
        return next((token for token in specials(rest) if token and rest.startswith(token)), "")

    end = next((token for token in specials(after_completion) if token), "")
    next_turn = "" if after_completion.strip() else between([user, said], user)
    if next_turn and next_turn == between([user], said):  # what begins any turn ends none
        next_turn = ""
    call_end = ([None, *specials(text_of([user, asks]).rstrip())][-1] or "") if has_calls else ""
    next_call = between([user, asks], result) if has_calls and next_turn else ""
    return TurnEnds(end, "" if call_end in SAID else call_end, next_turn, next_call)
