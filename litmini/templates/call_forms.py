"""Calls of tools in what a model says, in the forms of published chat templates."""

import ast
import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from litmini.templates.tool_calls import read_calls


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
