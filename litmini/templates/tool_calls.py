"""Tools, and the calls of them in messages: checked, and converted for templates."""

import json
from typing import Any


def read_objects(value: Any, what: str) -> list[dict[str, Any]]:
    """Return a list of objects, any of which, or all of which, may be JSON text; null and empty text are none.

    Raises:
        ValueError: it is something else; begins with `what`.
    """
    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
        values = [json.loads(one) if isinstance(one, str) else one for one in value or []]
    except (ValueError, TypeError, RecursionError):
        values = [None]
    if isinstance(value, dict) or not all(isinstance(one, dict) for one in values):
        raise ValueError(f"{what} is no list of objects, or of their JSON")
    return values


def read_calls(value: Any) -> list[dict[str, Any]]:
    """Return the tool calls of a turn as {"type": "function", "function": ...}; arguments stay an object or its JSON.

    Raises:
        ValueError: a call has no name, or other arguments.
    """
    calls = [
        call if "function" in call else {"type": "function", "function": call}
        for call in read_objects(value, "tool_calls")
    ]
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("tool_calls has a call without the name of its function")
        try:
            arguments = function.get("arguments", {})
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of the call of {function['name']:.60} are no object, and no JSON of one")
    return calls


def convert_arguments(messages: list[dict[str, Any]], to: type) -> list[dict[str, Any]]:
    """Return messages with the arguments of all tool calls as dict, or as str: their JSON."""

    def convert(function: dict[str, Any]) -> dict[str, Any]:
        arguments = function.get("arguments", {})
        if isinstance(arguments, to):
            return function
        return {
            **function,
            "arguments": json.loads(arguments) if to is dict else json.dumps(arguments, ensure_ascii=False),
        }

    def convert_call(call: dict[str, Any]) -> dict[str, Any]:
        return {**call, "function": convert(call["function"])} if "function" in call else convert(call)

    calls = [list(map(convert_call, message.get("tool_calls") or [])) for message in messages]
    return [{**message, "tool_calls": own} if own else message for message, own in zip(messages, calls, strict=True)]
