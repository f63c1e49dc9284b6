"""Tools, and the calls of them in messages: checked, converted for templates, and parsed from what a model says."""

import ast
import json
import re
from collections.abc import Callable
from contextlib import suppress
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


def parse_calls(text: str, tools: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Return what a model says before its calls, and the calls; all of it and none where a call is in no form of `FORMS`.

    Args:
        text: without special tokens.
        tools: JSON schemas of the functions that the model may call.
    """
    functions = [tool.get("function", tool) for tool in tools]
    schemas = {one["name"]: one for one in functions if isinstance(one, dict) and isinstance(one.get("name"), str)}
    for pattern, read in FORMS:
        matches = list(pattern.finditer(text))
        rest = pattern.sub("", text)
        try:
            calls = [call for found in matches for call in read(found, schemas)]
        except (ValueError, KeyError, SyntaxError, AttributeError, RecursionError, MemoryError):
            continue
        if calls and not any(mark in rest for mark in ("<tool_call>", "</tool_call>")):
            return text[: matches[0].start()].strip(), [
                {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)} for name, arguments in calls
            ]
    return text, []


Call = tuple[str, dict[str, Any]]
Schemas = dict[str, dict[str, Any]]


def _read_json(found: re.Match[str], schemas: Schemas) -> list[Call]:
    (call,) = read_calls([found[1]])
    arguments = call["function"].get("arguments", {})
    return [(call["function"]["name"], json.loads(arguments) if isinstance(arguments, str) else arguments)]


def _read_elements(found: re.Match[str], schemas: Schemas) -> list[Call]:
    """Return a call whose parameters are elements; they are JSON but where the schema says string."""
    name, types = found[1].strip(), schemas.get(found[1].strip(), {}).get("parameters", {}).get("properties", {})
    arguments: dict[str, Any] = {}
    for key, value in PARAMETER.findall(found[2]) or ARGUMENT.findall(found[2]):
        arguments[key] = value
        if types.get(key, {}).get("type") != "string":
            with suppress(ValueError):
                arguments[key] = json.loads(value)
    if not name or PARAMETER.sub("", ARGUMENT.sub("", found[2])).strip():
        raise ValueError("no name, or something beside the parameters")
    return [(name, arguments)]


def _read_bare(found: re.Match[str], schemas: Schemas) -> list[Call]:
    """Return a call of which nothing but its name says that it is one, so it must be a tool's."""
    call = json.loads(found[1])
    if not isinstance(call["parameters"], dict) or call["name"] not in schemas:
        raise ValueError("no call of a tool")
    return [(call["name"], call["parameters"])]


def _read_python(found: re.Match[str], schemas: Schemas) -> list[Call]:
    """Return calls as a list of Python: [weather(city="Rome")]."""
    tree = ast.parse(found[1], mode="eval").body
    if not isinstance(tree, ast.List):
        raise ValueError("no list")
    calls = []
    for node in tree.elts:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise ValueError("no call")
        if node.func.id not in schemas:
            raise ValueError("no call of a tool")
        calls.append((node.func.id, {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}))
    return calls


PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
FORMS: list[tuple[re.Pattern[str], Callable[[re.Match[str], Schemas], list[Call]]]] = [
    (re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL), _read_json),  # Qwen 2.5, Qwen3, Hermes
    (
        re.compile(r"<tool_call>\s*<function=([^>\n]+)>(.*?)</function>\s*</tool_call>", re.DOTALL),
        _read_elements,
    ),  # Qwen3.5
    (re.compile(r"<tool_call>([^\n<{]+)(.*?)</tool_call>", re.DOTALL), _read_elements),  # GLM-4.5
    (re.compile(r"\A\s*(\{.*\})\s*\Z", re.DOTALL), _read_bare),  # Llama 3.1
    (re.compile(r"(\[\w+\(.*\)\])\s*\Z", re.DOTALL), _read_python),  # LFM2
]
"""How models write calls, and what reads a match."""
