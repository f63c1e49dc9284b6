"""In which form a chat template wants messages that data have in several: found by rendering a few."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from litmini.tool_calls import convert_arguments

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
